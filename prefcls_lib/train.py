"""fit: from a model that predicts the prior to the best weights, with the history of how it got there."""

import copy
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator

from prefcls_lib import metrics
from prefcls_lib.batching import Examples, TokenCount, make_chunks, plan_epoch, split_step
from prefcls_lib.config import RunConfig
from prefcls_lib.files import UserError
from prefcls_lib.model import PreferenceModel
from prefcls_lib.optim import learning_rate_factor, make_optimizer, set_learning_rate
from prefcls_lib.predict import predict_proba
from prefcls_lib.progress import progress_bar

MIN_ROWS_TO_SELECT = 2000  # with fewer validation rows the best step is noise: the last weights are kept


@dataclass(frozen=True)
class FitResult:
    """What `fit` measured. The model itself holds the chosen weights.

    Attributes:
        history: one line a validation: step, epoch, train_log_loss and valid_log_loss (both unsmoothed),
            valid_accuracy, learning_rate, tokens_per_second, seconds.
        valid_probs: (V, N, 3) probabilities of the validation rows at each validation.
        chosen: which validation's weights the model holds.
        tokens: of all training steps.
        valid_tokens: of one pass over the validation rows.
        step_seconds: seconds in training steps, validation left out.
    """

    history: pd.DataFrame
    valid_probs: np.ndarray
    chosen: int
    tokens: TokenCount
    valid_tokens: TokenCount
    step_seconds: float


def fit(
    model: PreferenceModel,
    train: Examples,
    valid: Examples,
    config: RunConfig,
    accelerator: Accelerator,
    pad_id: int,
    label: str = "train",
) -> FitResult:
    """Train `model` in place.

    AdamW with linear warm-up and decay; validation on unsmoothed log loss at even steps of every epoch. With at
    least MIN_ROWS_TO_SELECT validation rows the weights of the best validation are restored, else the last are kept.

    Args:
        model: its head started at the prior.
        train, valid: rows with labels.
        config: with the recipe filled in.
        accelerator: device, autocast and gradient scaling.
        pad_id: padding token of the backbone.
        label: name of the progress bar.

    Raises:
        UserError: the training loss is no longer finite.
    """
    model.to(accelerator.device)
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, config, accelerator.device))
    lengths = train.lengths
    steps_per_epoch = math.ceil(len(train) / config.batch_size)
    total_steps = steps_per_epoch * config.num_epochs
    validate_after = _validation_steps(config, steps_per_epoch)
    records: list[dict] = []
    valid_probs: list[np.ndarray] = []
    best_loss, best_state = math.inf, None
    selects = len(valid) >= MIN_ROWS_TO_SELECT
    meter = _Meter(accelerator.device)
    started = time.perf_counter()
    with progress_bar(total_steps, label, "step") as progress:
        for step_number in range(total_steps):
            epoch, position = divmod(step_number, steps_per_epoch)
            if position == 0:
                steps = plan_epoch(lengths, config.batch_size, config.seed, epoch)
            set_learning_rate(optimizer, learning_rate_factor(step_number, total_steps, config.warmup_ratio))
            with meter.step():
                meter.add(*train_step(model, train, steps[position], lengths, config, accelerator, pad_id))
                accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            progress.update()
            if (step_number + 1) % 10 == 0 or step_number + 1 in validate_after:
                progress.set_postfix_str(f"loss {meter.loss():.4f}, {meter.tokens_per_second():,.0f} tokens/s")
            if step_number + 1 in validate_after:
                if not math.isfinite(meter.loss()):
                    raise UserError(
                        f"training loss is {meter.loss()} at step {step_number + 1}. Set learning_rate lower, or "
                        "mixed_precision=no."
                    )
                probs, valid_tokens = predict_proba(model, valid, accelerator, pad_id)
                valid_loss = metrics.log_loss(valid.labels, probs)
                valid_probs.append(probs)
                records.append(
                    {
                        "step": step_number + 1,
                        "epoch": (step_number + 1) / steps_per_epoch,
                        "train_log_loss": meter.loss(),
                        "valid_log_loss": valid_loss,
                        "valid_accuracy": metrics.accuracy(valid.labels, probs),
                        "learning_rate": optimizer.param_groups[0]["lr"],
                        "tokens_per_second": meter.tokens_per_second(),
                        "seconds": time.perf_counter() - started,
                    }
                )
                meter.restart_loss()
                progress.write(
                    f"{label}: step {step_number + 1}/{total_steps}  train {records[-1]['train_log_loss']:.4f}  "
                    f"valid log loss {valid_loss:.4f}  accuracy {records[-1]['valid_accuracy']:.3f}"
                )
                if selects and valid_loss < best_loss:
                    best_loss, best_state = valid_loss, copy.deepcopy(_on_cpu(model.state_dict()))
    chosen = len(records) - 1
    if best_state is not None:
        chosen = int(np.argmin([record["valid_log_loss"] for record in records]))
        model.load_state_dict(best_state)
    return FitResult(pd.DataFrame(records), np.stack(valid_probs), chosen, meter.tokens, valid_tokens, meter.seconds)


def train_step(
    model: PreferenceModel,
    train: Examples,
    step: np.ndarray,
    lengths: np.ndarray,
    config: RunConfig,
    accelerator: Accelerator,
    pad_id: int,
) -> tuple[torch.Tensor, int, TokenCount]:
    """Gradients of one optimizer step, summed over its micro-steps.

    The loss of every micro-step is divided by the pairs of the whole step, so the gradient is that of the step's
    mean loss whatever `max_tokens_per_micro_step` is.

    Returns:
        Sum of the rows' unsmoothed losses (a tensor on the device), rows, tokens.
    """
    model.train()
    device = accelerator.device
    loss_sum = torch.zeros((), device=device)
    tokens = TokenCount()
    for rows in split_step(step, lengths, config.max_tokens_per_micro_step):
        used, places = np.unique(train.sides[rows], return_inverse=True)
        token_ids = [train.token_ids[i] for i in used]
        chunks = [
            chunk.to(device) for chunk in make_chunks(token_ids, pad_id, multiple_of=8 if device.type == "cuda" else 1)
        ]
        with accelerator.autocast():
            embeddings = model.embed_sides(chunks)
        places = torch.as_tensor(places.reshape(-1, 2), device=device)
        x = None if train.features is None else torch.as_tensor(train.features[rows], device=device)
        logits = model(embeddings[places[:, 0]], embeddings[places[:, 1]], x)
        labels = torch.as_tensor(train.labels[rows], device=device)
        loss = torch.nn.functional.cross_entropy(
            logits, labels, label_smoothing=config.label_smoothing, reduction="sum"
        )
        accelerator.backward(loss / len(step))
        loss_sum += torch.nn.functional.cross_entropy(logits.detach(), labels, reduction="sum")
        tokens += TokenCount(sum(map(len, token_ids)), sum(chunk.tokens_computed for chunk in chunks))
    return loss_sum, len(step), tokens


def _validation_steps(config: RunConfig, steps_per_epoch: int) -> set[int]:
    """Step counts after which to validate: evenly spread over each epoch, its end included."""
    parts = min(config.validations_per_epoch, steps_per_epoch)
    ends = [round(steps_per_epoch * part / parts) for part in range(1, parts + 1)]
    return {epoch * steps_per_epoch + end for epoch in range(config.num_epochs) for end in ends}


def _on_cpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


class _Meter:
    """Running loss, tokens and seconds of training steps; the loss stays on the device until it is asked for."""

    def __init__(self, device: torch.device):
        self.device = device
        self.tokens = TokenCount()
        self.seconds = 0.0
        self.restart_loss()

    def restart_loss(self) -> None:
        self._sum, self._rows = torch.zeros((), device=self.device), 0

    def add(self, loss_sum: torch.Tensor, rows: int, tokens: TokenCount) -> None:
        self._sum += loss_sum
        self._rows += rows
        self.tokens += tokens

    @contextmanager
    def step(self):
        """`with meter.step():` counts the seconds of what is inside."""
        entered = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - entered

    def loss(self) -> float:
        return float(self._sum) / max(1, self._rows)

    def tokens_per_second(self) -> float:
        return self.tokens.real / max(self.seconds, 1e-9)
