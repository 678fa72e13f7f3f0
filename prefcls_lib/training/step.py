"""One optimizer step: its gradients, summed over micro-batches, within the memory there is."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples, TokenCount, make_padded_batches, split_batch, to_device
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training.state import TrainingState

SMALLEST_MICRO_BATCH = 256  # tokens; running out of memory below this is not a matter of the cap


def train_step(
    model: PreferenceModel,
    train: Examples,
    step: np.ndarray,
    lengths: np.ndarray,
    max_tokens: int,
    config: RunConfig,
    accelerator: Accelerator,
    pad_id: int,
) -> tuple[torch.Tensor, TokenCount]:
    """Gradients of this process's share of one optimizer step, summed over its micro-batches.

    The loss of every micro-batch is divided by the pairs of the whole step, so the gradient is that of the step's
    mean loss whatever `max_tokens` (held for one backward pass) is, and the processes' gradients are to be summed.

    Returns:
        Sum of the unsmoothed losses of its rows (a tensor on the device), and their tokens.
    """
    model.train()
    device = accelerator.device
    loss_sum = torch.zeros((), device=device)
    tokens = TokenCount()
    mine = step[accelerator.process_index :: accelerator.num_processes]
    for rows in split_batch(mine, lengths, max_tokens):
        used, places = np.unique(train.sides[rows], return_inverse=True)
        token_ids = [train.token_ids[i] for i in used]
        multiple_of = 8 if device.type == "cuda" else 1
        batches = [batch.to(device) for batch in make_padded_batches(token_ids, pad_id, multiple_of=multiple_of)]
        with accelerator.autocast():
            embeddings = model.embed_sides(batches)
        outputs = head_outputs(model, train, rows, embeddings, device, places.reshape(len(rows), -1))
        loss = training_loss(outputs, train, rows, config.label_smoothing)
        accelerator.backward(loss / len(step))
        labels = to_device(train.labels[rows], device)
        loss_sum += torch.nn.functional.cross_entropy(outputs[0].detach(), labels, reduction="sum")
        tokens += TokenCount(sum(map(len, token_ids)), sum(batch.tokens_computed for batch in batches))
    return loss_sum, tokens


def train_step_in_memory(
    model: PreferenceModel,
    train: Examples,
    step: np.ndarray,
    lengths: np.ndarray,
    config: RunConfig,
    accelerator: Accelerator,
    pad_id: int,
    state: TrainingState,
    say: Callable[[str], None],
) -> tuple[torch.Tensor, TokenCount]:
    """`train_step`; when memory runs out, half the tokens per micro-batch and the same step again, and it is said."""
    while True:
        try:
            return train_step(model, train, step, lengths, state.max_tokens, config, accelerator, pad_id)
        except torch.OutOfMemoryError as error:
            model.zero_grad(set_to_none=True)
            if state.max_tokens // 2 < SMALLEST_MICRO_BATCH:
                raise UserError(
                    f"out of memory with {state.max_tokens} tokens per micro-batch. Set gradient_checkpointing=true "
                    "or max_length lower."
                ) from error
            state.max_tokens //= 2
            say(f"out of memory: max_tokens_per_micro_step is now {state.max_tokens}, and the step is repeated")
        torch.cuda.empty_cache()  # outside `except`, where the traceback no longer holds the tensors


def training_loss(
    outputs: tuple[torch.Tensor, torch.Tensor], train: Examples, rows: np.ndarray, label_smoothing: float
) -> torch.Tensor:
    """Cross-entropy of the logits (B, 3) of some rows against their targets, else labels; weighted, summed.

    On a baseline that of the auxiliary logits is added. Where the offset is good it leaves little gradient; the
    auxiliary output has to predict without it, so the encoder learns as much as a network without a baseline.
    """
    logits, auxiliary = outputs
    wanted = train.labels if train.targets is None else train.targets
    wanted = to_device(wanted[rows], logits.device)
    entropy = partial(torch.nn.functional.cross_entropy, label_smoothing=label_smoothing, reduction="none")
    losses = entropy(logits, wanted) if train.offsets is None else entropy(logits, wanted) + entropy(auxiliary, wanted)
    if train.weights is not None:
        losses = losses * to_device(train.weights[rows], logits.device)
    return losses.sum()


def head_outputs(
    model: PreferenceModel,
    examples: Examples,
    rows: np.ndarray,
    embeddings: torch.Tensor,
    device: torch.device,
    places: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's two outputs (B, 3) of `rows`; `places` (B, 1 or 2): their sides in `embeddings`, else `.sides`."""
    sides = to_device(examples.sides[rows] if places is None else places, device)
    x, offset = (
        None if column is None else to_device(column[rows], device) for column in (examples.features, examples.offsets)
    )
    u, *v = (embeddings[side] for side in sides.T)
    return model.head.outputs(u, v[0] if v else None, x, offset)
