"""One optimizer step: gradients summed over micro-batches, within the memory there is; and the head-only phase."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples, TokenCount, make_padded_batches, padding_for, split_batch, to_device
from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import embed_unique_sides, predict_from_embeddings
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training.optim import learning_rate_factor, parameter_groups, set_learning_rate
from prefcls_lib.training.state import TrainingState

MAX_GRAD_NORM = 1.0  # gradients are scaled down to this norm
SMALLEST_MICRO_BATCH = 256  # tokens; running out of memory below this is not a matter of the cap
# What cuBLAS and cuDNN, NCCL, and the allocator of the CPU say, which have no type of error for it.
OUT_OF_MEMORY = ("ALLOC_FAILED", "out of memory", "Failed to CUDA", "allocate memory", "not enough memory")
Result = TypeVar("Result")


def train_step(
    model: PreferenceModel,
    train: Examples,
    batch: np.ndarray,
    max_tokens: int,
    config: RunConfig,
    accelerator: Accelerator,
    pad_id: int,
) -> tuple[torch.Tensor, TokenCount]:
    """Gradients of this process's share of one optimizer step, summed over its micro-batches.

    The loss of every micro-batch is divided by the pairs of the whole batch, so the gradient is that of the batch's
    mean loss whatever `max_tokens` (held for one backward pass) is, and the processes' gradients are to be summed.

    Args:
        batch: (B,) row numbers of all processes' pairs.

    Returns:
        Sum of the unsmoothed losses of its rows (a tensor on the device), and their tokens.
    """
    model.zero_grad()  # of an attempt that ran out of memory
    model.train()
    device = accelerator.device
    loss_sum = torch.zeros((), device=device)
    tokens = TokenCount()
    mine = batch[accelerator.process_index :: accelerator.num_processes]
    for rows in split_batch(mine, train.lengths, max_tokens):
        used, places = np.unique(train.sides[rows], return_inverse=True)
        token_ids = [train.token_ids[i] for i in used]
        padded = [one.to(device) for one in make_padded_batches(token_ids, pad_id, **padding_for(device))]
        with accelerator.autocast():
            embeddings = model.embed_sides(padded)
        outputs = head_outputs(model, train, rows, embeddings, device, places.reshape(len(rows), -1))
        loss = training_loss(outputs, train, rows, config.label_smoothing)
        accelerator.backward(loss / len(batch))
        labels = to_device(train.labels[rows], device)
        loss_sum += torch.nn.functional.cross_entropy(outputs[0].detach(), labels, reduction="sum")
        tokens += TokenCount(sum(map(len, token_ids)), sum(one.tokens_computed for one in padded))
    return loss_sum, tokens


def within_memory(
    work: Callable[[], Result], state: TrainingState, log: Callable[[str], None], repeat: bool = True
) -> Result:
    """`work()`; when memory runs out, half the tokens per micro-batch, the allocator's cache emptied, and again.

    Raises:
        UserError: memory runs out with the smallest micro-batches, or where nothing can be repeated: in a collective.
    """
    while True:
        try:
            return work()
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)):
                raise
            if not repeat or state.max_tokens // 2 < SMALLEST_MICRO_BATCH:
                raise UserError(
                    f"out of memory with {state.max_tokens} tokens per micro-batch. Set gradient_checkpointing=true, "
                    "or max_length lower."
                ) from error
        state.max_tokens //= 2  # outside `except`, where the traceback no longer holds the tensors
        log(f"out of memory: max_tokens_per_micro_step is now {state.max_tokens}, and the step is repeated")
        torch.cuda.empty_cache()


def training_loss(
    outputs: tuple[torch.Tensor, torch.Tensor], train: Examples, rows: np.ndarray, label_smoothing: float
) -> torch.Tensor:
    """Cross-entropy of the logits (B, 3) of some rows against their targets, else labels; weighted, summed.

    On a baseline that of the auxiliary logits is added. Where the offset is good it leaves little gradient; the
    auxiliary output has to predict without it, so the encoder learns as much as a network without a baseline.

    Extra rows have their file's share of ties: a shift is added to the logit of a tie.
    """
    wanted = train.labels if train.targets is None else train.targets
    wanted = to_device(wanted[rows], outputs[0].device)
    if train.tie_shifts is not None:
        shift = torch.nn.functional.pad(to_device(train.tie_shifts[rows], wanted.device)[:, None], (NUM_CLASSES - 1, 0))
        outputs = tuple(logits + shift for logits in outputs)
    logits, auxiliary = outputs
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


def fit_head(model: PreferenceModel, train: Examples, config: RunConfig, accelerator: Accelerator, pad_id: int) -> None:
    """Train the head alone for two epochs on frozen embeddings of at most `head_only_rows` rows.

    The embeddings are computed once. So the encoder's first gradients come through a head that already means
    something (Kumar et al. 2022, https://arxiv.org/abs/2202.10054).
    """
    rows = np.random.default_rng(config.seed).permutation(len(train))[: config.head_only_rows]
    some = train.take(np.sort(rows))
    embeddings, _ = embed_unique_sides(model, some, accelerator, pad_id, "head only")
    in_head = set(model.head.parameters())
    groups = parameter_groups(model, config)  # where both have one rate, head and encoder share a group
    groups = [{**group, "params": [p for p in group["params"] if p in in_head]} for group in groups]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    model.head.train()
    orders = [np.random.default_rng([config.seed, epoch]).permutation(len(some)) for epoch in range(2)]
    batches = [order[i : i + config.batch_size] for order in orders for i in range(0, len(some), config.batch_size)]
    for step, batch in enumerate(batches):
        set_learning_rate(optimizer, learning_rate_factor(step, len(batches), 0.1))
        outputs = head_outputs(model, some, batch, embeddings, accelerator.device)
        (training_loss(outputs, some, batch, config.label_smoothing) / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.head.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()


def epoch_examples(train: Examples, config: RunConfig, epoch: int) -> Examples:
    """The rows as an epoch trains on them: a cross-encoder's in one order of A and B, half the tokens of both."""
    return train.in_random_order(config.seed, epoch) if config.architecture == "cross" else train


def predict_valid(
    model: PreferenceModel, valid: Examples, accelerator: Accelerator, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, TokenCount]:
    """Probabilities (N, 3) of the validation rows; by the encoder alone; with A and B swapped; and the tokens."""
    embeddings, tokens = embed_unique_sides(model, valid, accelerator, pad_id)
    at_mean = replace(valid, features=None if valid.features is None else np.zeros_like(valid.features))
    asked = ((valid, False), (at_mean, True), (valid.swapped(), False))
    return *(predict_from_embeddings(model, embeddings, rows, accelerator, aux) for rows, aux in asked), tokens
