"""fit: from an untrained model, which predicts its baseline or the prior, to trained weights and their history."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from tqdm import tqdm

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples, TokenCount, plan_epoch
from prefcls_lib.models.backbones import set_gradient_checkpointing
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.runtime.progress import progress_bar
from prefcls_lib.training.checkpoint import Session, Stopped, TrainingState, load_checkpoint, save_checkpoint
from prefcls_lib.training.distributed import share_weights, sum_counts
from prefcls_lib.training.optim import make_optimizer, rate_factor, set_learning_rate
from prefcls_lib.training.step import train_step, update_weights
from prefcls_lib.training.validation import ADVICE, collapse_check, judge_encoder, validate

SAVE_EVERY_SECONDS = 1200  # a checkpoint at least this often, and at every validation
FINISH_SECONDS, FINISH_SHARE = 60, 0.1  # of a time budget, for saving the model: so many, at most this share of it
FORWARD_SHARE = 0.5  # of a step's time, for its tokens without a backward pass: an upper limit until a validation


@dataclass(frozen=True)
class FitResult:
    """What `fit` measured. The model itself holds the chosen weights.

    A line of `history` is a validation: step, epoch, train_log_loss and valid_log_loss (both unsmoothed),
    valid_accuracy, encoder_log_loss and encoder_spread (see `validate`), learning_rate, gradient_norm,
    tokens_per_second, skipped_steps, seconds.
    """

    history: pd.DataFrame
    valid_probs: np.ndarray  # (V, N, 3) probabilities of the validation rows at each validation
    chosen: int  # which validation's weights the model holds
    encoder_warning: str  # why their encoder contributes nothing, "" where it may contribute
    swapped_probs: np.ndarray  # (N, 3) of the validation rows with A and B swapped, by those weights
    tokens: TokenCount  # of all training steps
    valid_tokens: TokenCount  # of one pass over the validation rows
    step_seconds: float  # in training steps, validation left out
    planned_steps: int  # of which a time budget, or a collapse, may have left some out


def fit(
    model: PreferenceModel, train: Examples, valid: Examples, config: RunConfig, accelerator: Accelerator,
    label: str = "train", session: Session | None = None,
) -> FitResult:  # fmt: skip
    """Train `model` in place; untrained, it predicts its baseline, or the class shares where it starts from none.

    With at least MIN_ROWS_TO_SELECT validation rows the weights of the best validation are restored, else the last are
    kept. Where an earlier session left a checkpoint, training resumes from it. On a CPU of the same kind the end is the
    same to the bit; on a GPU nearly, because some kernels add in any order there.

    Args:
        config: with the recipe filled in.
        label: name of the progress bar.

    Raises:
        Stopped: `session.stop` was set; the state is saved.
    """
    session, plan = session or Session(), StepPlan(train, config)
    optimizer, state = start_or_resume(model, config, accelerator, session.folder)
    clock, why_collapsed = Clock(session, state, plan.steps, int(valid.lengths.sum())), collapse_check(train, valid)
    with progress_bar(plan.steps, label, "step", accelerator.is_main_process, state.step) as bar:

        def log(line: str) -> None:
            if accelerator.is_main_process:
                bar.write(f"{label}: {line}")

        if state.step:
            log(f"resumed at step {state.step}")
        while state.position < plan.steps and state.flagged < 2:
            started, before = time.perf_counter(), state.position
            rate = rate_factor(before, plan.steps, state.records, config)
            set_learning_rate(optimizer, rate)
            examples, batch = plan.batch(state.step)
            loss_sum, tokens = train_step(model, examples, batch, state, config, accelerator, log)
            norm = update_weights(model, optimizer, accelerator, state, log)
            stopping = clock.count_step(state, started, batch, loss_sum, tokens, norm, accelerator)
            show_progress(bar, state)
            if validation_due := plan.validation_due(before, state.position):
                place = {"step": state.step, "epoch": state.step / plan.steps_per_epoch,
                         "learning_rate": rate * config.learning_rate, "gradient_norm": norm}  # fmt: skip
                with clock.time_validation(state):
                    validate(model, valid, state, place, accelerator, log)
                judge_encoder(state, plan.warmup_rows, why_collapsed, log)
            if clock.save_due(validation_due or stopping, accelerator):
                save_checkpoint(session.folder, state, model, optimizer, accelerator)
            if stopping:
                raise Stopped(f"{label}: stopped at step {state.step}")
    return finish(model, state, config, plan.steps, why_collapsed)


def start_or_resume(
    model: PreferenceModel, config: RunConfig, accelerator: Accelerator, folder: Path | None
) -> tuple[torch.optim.AdamW, TrainingState]:
    """Model and optimizer on the device, and the state: those of the checkpoint in `folder`, if there is one."""
    model.to(accelerator.device)
    if config.gradient_checkpointing:
        set_gradient_checkpointing(model.encoder, True)
    optimizer = make_optimizer(model, config, accelerator.device)
    if accelerator.scaler is not None:  # has a scale once it was used, which a process without rows would not do
        accelerator.scaler.scale(torch.zeros((), device=accelerator.device))
    state = load_checkpoint(folder, model, optimizer, accelerator) or TrainingState(config.max_tokens_per_micro_step)
    share_weights(model, accelerator)
    if accelerator.process_index:  # dropout must differ between processes
        torch.manual_seed(config.seed + 10_007 * accelerator.process_index + state.step)
    return optimizer, state


def finish(
    model: PreferenceModel, state: TrainingState, config: RunConfig, planned_steps: int, why_collapsed: Callable
) -> FitResult:
    """What was measured; the model gets the weights of the chosen validation."""
    if config.gradient_checkpointing:
        set_gradient_checkpointing(model.encoder, False)
    if state.best_weights is not None:
        model.load_state_dict(state.best_weights)
    chosen = len(state.records) - 1 if state.best is None else state.best
    warning = why_collapsed(state.records[chosen]) + (f"; training ended early. {ADVICE}" if state.flagged == 2 else "")
    counts = (state.tokens, state.valid_tokens, state.step_seconds, planned_steps)
    history, valid_probs = pd.DataFrame(state.records), np.stack(state.valid_probs)
    return FitResult(history, valid_probs, chosen, warning, state.swapped_probs[chosen], *counts)


def show_progress(bar: tqdm, state: TrainingState) -> None:
    """One step more on the bar, with loss and pace."""
    if state.step % 10 == 0:
        pace = f"{state.tokens_per_second:,.0f} tokens/s"
        bar.set_postfix_str(f"loss {state.train_log_loss or math.nan:.4f}, {pace}", refresh=False)
    bar.update()


class StepPlan:
    """The planned optimizer steps: the rows of each, and after which to validate."""

    def __init__(self, train: Examples, config: RunConfig):
        self.train, self.config, self.epoch = train, config, None
        self.steps_per_epoch = math.ceil(len(train) / config.batch_size)
        self.steps = self.steps_per_epoch * config.num_epochs
        self.warmup_rows = config.warmup_ratio * len(train) * config.num_epochs
        parts = min(config.validations_per_epoch, self.steps_per_epoch)
        ends = [round(self.steps_per_epoch * part / parts) for part in range(1, parts + 1)]
        self.validations = [epoch * self.steps_per_epoch + end for epoch in range(config.num_epochs) for end in ends]

    def batch(self, step: int) -> tuple[Examples, np.ndarray]:
        """The rows as the epoch of this step trains on them, and the numbers (B,) of those of the step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.examples = epoch, self.train
            if self.config.architecture == "cross":  # one order of A and B, half the tokens of both
                self.examples = self.train.in_random_order(self.config.seed, epoch)
            self.batches = plan_epoch(self.examples.lengths, self.config.batch_size, self.config.seed, epoch)
        return self.examples, self.batches[place]

    def validation_due(self, before: float, after: float) -> bool:
        """Whether a step from position `before` to `after` passes a planned validation: even parts of each epoch."""
        return any(before < planned <= after for planned in self.validations)


class Clock:
    """Counts steps and time. Without a time budget the position of a training run is its number of steps.

    With one it is the larger of that and of the same share of the time, so that the learning rate ends at zero and the
    run within the budget, whatever its pace. The last validation, the test rows and saving have their time reserved.
    """

    def __init__(self, session: Session, state: TrainingState, steps: int, valid_tokens: int):
        self.session, self.steps, self.opened_at, self.opened = session, steps, state.position, time.perf_counter()
        self.elapsed_before, self.saved = state.elapsed, self.opened
        self.tokens_ahead = valid_tokens + session.tokens_to_predict
        self.seconds, self.tokens = 0.0, 0  # of this session's steps
        self.seconds_per_token: float | None = None  # of a validation

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, over all sessions."""
        return self.elapsed_before + time.perf_counter() - self.opened

    def count_step(
        self, state: TrainingState, started: float, batch: np.ndarray, loss_sum: torch.Tensor, tokens: TokenCount,
        norm: float | None, accelerator: Accelerator,
    ) -> bool:  # fmt: skip
        """Put a step, begun at `started`, into the state, its counts summed over the processes; whether to stop."""
        asked = self.session.stop is not None and self.session.stop.is_set()
        state.step += 1
        own = [time.perf_counter() - started, self._position(state)]
        own = own if accelerator.is_main_process else [0, 0]  # one clock counts: all processes make the same plan
        loss_sum, counts = sum_counts(loss_sum, [tokens.real, tokens.computed, asked, *own], accelerator)
        real, computed, asked, seconds, position = counts
        state.position, state.rows_seen = max(state.position, position), state.rows_seen + len(batch)
        state.tokens += TokenCount(int(real), int(computed))
        state.step_seconds, state.elapsed = state.step_seconds + seconds, self.elapsed
        self.seconds, self.tokens = self.seconds + seconds, self.tokens + real
        if norm is not None:
            state.loss_sum, state.loss_rows = state.loss_sum + loss_sum, state.loss_rows + len(batch)
        return bool(asked)

    @contextmanager
    def time_validation(self, state: TrainingState) -> Iterator[None]:
        """Measures how long the tokens of the validation take; puts the seconds so far into its record."""
        started = time.perf_counter()
        yield
        self.seconds_per_token = (time.perf_counter() - started) / max(1, state.valid_tokens.real)
        state.elapsed = state.records[-1]["seconds"] = self.elapsed

    def save_due(self, asked: bool, accelerator: Accelerator) -> bool:
        """Whether this process writes a checkpoint: where it is asked for, and after SAVE_EVERY_SECONDS."""
        if self.session.folder is None or not accelerator.is_main_process:
            return False
        due = asked or time.perf_counter() - self.saved >= SAVE_EVERY_SECONDS
        self.saved = time.perf_counter() if due else self.saved
        return due

    def _position(self, state: TrainingState) -> float:
        if self.session.deadline is None:
            return state.step
        forward = self.seconds_per_token or FORWARD_SHARE * self.seconds / max(1, self.tokens)
        budget = self.session.deadline - self.opened
        left_for_steps = budget - min(FINISH_SECONDS, FINISH_SHARE * budget) - forward * self.tokens_ahead
        used = time.perf_counter() - self.opened
        if used >= left_for_steps:
            return self.steps
        return max(state.step, self.opened_at + (self.steps - self.opened_at) * used / left_for_steps)
