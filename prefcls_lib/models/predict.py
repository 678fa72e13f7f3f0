"""Probabilities for rows: each different side is embedded once, sorted by length."""

import numpy as np
import torch
from accelerate import Accelerator

from prefcls_lib.data.batching import Examples, TokenCount, plan_padded_batches, to_device
from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.runtime.progress import progress_bar

HEAD_ROWS = 4096  # rows in one pass of the head
PREDICT_SIDES = 32
PREDICT_TOKENS = 8192


def predict_proba(
    model: PreferenceModel, examples: Examples, accelerator: Accelerator, label: str = ""
) -> tuple[np.ndarray, TokenCount]:
    """Probabilities of the three classes for every row; `label` shows a progress bar with this name.

    The sides are embedded in an order that depends on their token ids alone (length, then ids), and both orders of
    a pair go through the head in calls of equal shape. So with the symmetric head, swapping A and B in the rows
    permutes the probabilities exactly, in any precision.

    Returns:
        (N, 3) float64 in LABEL_COLUMNS order, each row summing to 1; and the tokens that it took.
    """
    embeddings, tokens = embed_unique_sides(model, examples, accelerator, label)
    return predict_from_embeddings(model, embeddings, examples, accelerator.device), tokens


def predict_from_embeddings(
    model: PreferenceModel, embeddings: torch.Tensor, examples: Examples, device: torch.device, auxiliary: bool = False
) -> np.ndarray:
    """Probabilities (N, 3) float64 from the embeddings (U, H) of the examples' sides: the head alone.

    `auxiliary`: of the head's auxiliary output, which knows no baseline.
    """
    probs = np.empty((len(examples), NUM_CLASSES))
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(examples), HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            u, v = (embeddings[side] for side in to_device(examples.sides[rows].copy(), device).T)
            outputs = model.head(u, v, offsets_of(examples, rows, device))
            probs[rows] = torch.softmax(outputs[auxiliary].cpu().double(), dim=1).numpy()
    return probs


def offsets_of(examples: Examples, rows: np.ndarray | slice, device: torch.device) -> torch.Tensor | None:
    """Offsets (B, 3) of some rows on the device; None where the examples have none."""
    return None if examples.offsets is None else to_device(examples.offsets[rows], device)


def score_differences(model: PreferenceModel, examples: Examples, accelerator: Accelerator) -> np.ndarray:
    """(N,) float64: a reward model's score of A minus that of B, see `reward`."""
    embeddings, _ = embed_unique_sides(model, examples, accelerator, "scores")
    with torch.no_grad():
        scores = model.head.skip(embeddings).cpu().double().numpy()[:, 0]
    return scores[examples.sides[:, 0]] - scores[examples.sides[:, 1]]


def embed_unique_sides(
    model: PreferenceModel, examples: Examples, accelerator: Accelerator, label: str = ""
) -> tuple[torch.Tensor, TokenCount]:
    """Embeddings (U, H) fp32 of every side that the rows use (others stay zero), and the tokens.

    A batch is padded while the GPU computes the one before it. Several processes share the batches; all of them must
    call this, and each gets all embeddings.
    """
    used = np.unique(examples.sides)
    token_ids = [examples.token_ids[i] for i in used]
    device = accelerator.device
    planned = plan_padded_batches(token_ids, device, PREDICT_SIDES, PREDICT_TOKENS)
    width = model.encoder.config.hidden_size
    embeddings = torch.zeros((len(examples.token_ids), width), device=device)
    shown = bool(label) and accelerator.is_main_process
    model.eval()
    with torch.inference_mode(), progress_bar(len(used), label, "side", shown) as progress:
        for taken, length in planned[accelerator.process_index :: accelerator.num_processes]:
            with accelerator.autocast():
                embedded = model.embed(taken, length, token_ids, device)
            embeddings[to_device(used[taken], device)] = embedded
            progress.update(len(taken) * accelerator.num_processes)
    computed = sum(len(taken) * length for taken, length in planned)
    embeddings = embeddings if accelerator.num_processes == 1 else accelerator.reduce(embeddings, "sum")
    return embeddings, TokenCount(sum(map(len, token_ids)), computed)
