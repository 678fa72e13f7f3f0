"""One optimizer step: gradients summed over micro-batches, which shrink when memory runs out, and over processes.

Every process takes its share of each step's pairs, the gradients are summed, and all take the same step; so the result
is that of one process, whatever their number.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy, pad
from torch.optim import Optimizer

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples, TokenCount, plan_padded_batches, split_batch, to_device
from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import offsets_of
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training.checkpoint import Log, TrainingState

MAX_GRAD_NORM = 1.0  # gradients are scaled down to this norm
MAX_SKIPPED_IN_A_ROW = 20  # steps without a finite gradient; the fp16 scaler settles within a few
SMALLEST_MICRO_BATCH = 256  # tokens; if memory runs out below this, smaller micro-batches do not help
# What cuBLAS and cuDNN, NCCL, and the allocator of the CPU say, which have no type of error for it.
OUT_OF_MEMORY = ("ALLOC_FAILED", "out of memory", "Failed to CUDA", "allocate memory", "not enough memory")


def train_step(
    model: PreferenceModel, optimizer: Optimizer, train: Examples, batch: np.ndarray, state: TrainingState,
    config: RunConfig, accelerator: Accelerator, log: Log,
) -> float | None:  # fmt: skip
    """One optimizer step on the pairs with these row numbers (B,), of which each process takes its share.

    Its tokens and unsmoothed losses, with the tie shifts of extra rows, are added to the state. At most
    `state.max_tokens` are held for one backward pass, fewer where memory runs out.

    Returns:
        Norm of the gradients before they were clipped; None where it was not finite and the step was left out.
    """
    given = (model, train, batch[accelerator.process_index :: accelerator.num_processes], len(batch))
    loss_sum, tokens = within_memory(
        lambda: accumulate_gradients(*given, state.max_tokens, config.label_smoothing, accelerator), state, log
    )
    norm = within_memory(lambda: update_weights(model, optimizer, accelerator), state, log, repeat=False)
    loss_sum, real, computed = sum_counts([loss_sum, tokens.real, tokens.computed], accelerator)
    state.tokens += TokenCount(int(real), int(computed))
    if math.isfinite(norm):
        state.loss_sum, state.loss_rows = state.loss_sum + loss_sum, state.loss_rows + len(batch)
        state.skipped_in_a_row = 0
        return norm
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        what = f"the gradients of {state.skipped_in_a_row} steps in a row were not finite (now step {state.step + 1})"
        raise UserError(f"training: {what}. Set learning_rate lower, or mixed_precision=no.")
    return None


def accumulate_gradients(
    model: PreferenceModel, train: Examples, rows: np.ndarray, batch_size: int, max_tokens: int,
    label_smoothing: float, accelerator: Accelerator,
) -> tuple[torch.Tensor, TokenCount]:  # fmt: skip
    """Gradients of some rows (B,), summed over micro-batches of at most `max_tokens` tokens; see `train_step`.

    The loss of every micro-batch is divided by `batch_size`, the pairs of the whole step, so the gradient is that of
    the step's mean loss whatever `max_tokens` is, and the processes' gradients are to be summed.
    """
    model.zero_grad()  # of an attempt that ran out of memory
    model.train()
    device, tokens = accelerator.device, TokenCount()
    loss_sum = torch.zeros((), device=device)
    for some in split_batch(rows, train.lengths, max_tokens):
        used, places = np.unique(train.sides[some], return_inverse=True)
        token_ids = [train.token_ids[i] for i in used]
        planned = plan_padded_batches(token_ids, device)
        with accelerator.autocast():
            embeddings = model.embed_sides(token_ids, planned, device)
        u, *v = (embeddings[side] for side in to_device(places.reshape(len(some), -1), device).T)
        outputs = model.head(u, v[0] if v else None, offsets_of(train, some, device))
        accelerator.backward(training_loss(outputs, train, some, label_smoothing) / batch_size)
        loss_sum += training_loss((outputs[0].detach(),), train, some, label_smoothing=0.0)
        tokens += TokenCount(sum(map(len, token_ids)), sum(len(taken) * length for taken, length in planned))
    return loss_sum, tokens


def update_weights(model: PreferenceModel, optimizer: Optimizer, accelerator: Accelerator) -> float:
    """Sum the processes' gradients, clip them, and take the step where they are finite; their norm before clipping."""
    scaler, parameters = accelerator.scaler, [p for p in model.parameters() if p.requires_grad]
    if accelerator.num_processes > 1:
        for parameter in parameters:
            if parameter.grad is None:  # this process has not used it
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM))
    if math.isfinite(norm):
        optimizer.step()
    if scaler is not None:
        scaler.update()
    optimizer.zero_grad()
    return norm


def sum_counts(counts: list, accelerator: Accelerator) -> list:
    """Numbers that each process has counted in a step, summed over the processes."""
    if accelerator.num_processes == 1:
        return counts
    summed = torch.tensor([float(count) for count in counts], dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(summed)
    return summed.tolist()


def within_memory(work: Callable, state: TrainingState, log: Log, repeat: bool = True):
    """`work()`; when memory runs out, half the tokens per micro-batch, the allocator's cache emptied, and again.

    A UserError where the micro-batches are the smallest, and where nothing can be repeated: in an update, part of which
    may be done, or in a collective, where others wait.
    """
    while True:
        try:
            return work()
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)):
                raise
            if not repeat or state.max_tokens // 2 < SMALLEST_MICRO_BATCH:
                what = f"out of memory with {state.max_tokens} tokens per micro-batch"
                raise UserError(f"{what}. Set gradient_checkpointing=true, or max_length lower.") from error
        state.max_tokens //= 2  # outside `except`, where the traceback no longer holds the tensors
        log(f"out of memory: max_tokens_per_micro_step is now {state.max_tokens}, and the step is repeated")
        torch.cuda.empty_cache()


def training_loss(
    outputs: tuple[torch.Tensor, ...], train: Examples, rows: np.ndarray, label_smoothing: float
) -> torch.Tensor:
    """Cross-entropy of the logits (B, 3) of some rows, summed.

    On a baseline that of the auxiliary logits, if given, is added. Where the offset is good it leaves little gradient;
    the auxiliary output has to predict without it, so the encoder learns as much as a network without a baseline.
    Extra rows have their file's share of ties: a shift is added to the logit of a tie.
    """
    labels = to_device(train.labels[rows], outputs[0].device)
    if train.tie_shifts is not None:
        shift = pad(to_device(train.tie_shifts[rows], labels.device)[:, None], (NUM_CLASSES - 1, 0))
        outputs = tuple(logits + shift for logits in outputs)
    used = outputs if train.offsets is not None else outputs[:1]
    return sum(cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum") for logits in used)
