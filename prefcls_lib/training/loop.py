"""fit: from an untrained model, which predicts its baseline or the prior, to trained weights and their history."""

import math
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples, plan_epoch
from prefcls_lib.models.backbones import set_gradient_checkpointing
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.runtime.progress import progress_bar
from prefcls_lib.training.checkpoint import Session, Stopped, TrainingState, load_checkpoint, save_checkpoint
from prefcls_lib.training.optim import make_optimizer, rate_factor
from prefcls_lib.training.step import sum_counts, train_step
from prefcls_lib.training.validation import judge_encoder, validate, why_collapsed

SAVE_EVERY_SECONDS = 1200  # a checkpoint at least this often, and at every validation
FINISH_SECONDS, FINISH_SHARE = 60, 0.1  # of a time budget, kept for saving the model: the smaller of the two
FIRST_SHARE = 0.1  # of the steps, after which the pace is known: a GPU's first one may take a hundred times as long
FORWARD_SHARE = 0.4  # of a token's time in training, reserved for each token predicted afterwards: an upper limit


def fit(
    model: PreferenceModel, train: Examples, valid: Examples, config: RunConfig, accelerator: Accelerator,
    label: str = "train", session: Session | None = None,
) -> TrainingState:  # fmt: skip
    """Train `model` in place; untrained, it predicts its baseline, or the class shares where it starts from none.

    With at least MIN_ROWS_TO_SELECT validation rows the weights of the best validation are restored, else the last are
    kept. Where an earlier session left a checkpoint, training resumes from it. On a CPU of the same kind the weights
    are the same to the bit; on a GPU not exactly, because some kernels add in any order there.

    Args:
        config: with the recipe filled in.
        label: name of the progress bar.

    Raises:
        Stopped: `session.stop` was set; the state is saved.
    """
    session, plan = session or Session(), StepPlan(train, config)
    optimizer, state = start_or_resume(model, config, accelerator, session.folder, plan.steps)
    clock, saved_at = Clock(session, int(valid.lengths.sum())), time.perf_counter()
    with progress_bar(plan.steps, label, "step", accelerator.is_main_process, state.step) as bar:

        def log(line: str) -> None:
            if accelerator.is_main_process:
                bar.write(f"{label}: {line}")

        log(f"resumed at step {state.step}" if state.step else "starts at step 0")
        while state.position < plan.steps and state.flagged < 2:
            started, before = time.perf_counter(), state.position
            rate = rate_factor(before, plan.steps, state.records, config)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            norm = train_step(model, optimizer, *plan.batch(state.step), state, config, accelerator, log)
            stopping, has_time = clock.count_step(state, started, accelerator)
            if state.step % 10 == 0:  # reading the loss waits for the GPU
                words = f"loss {state.train_log_loss or math.nan:.4f}, {state.tokens_per_second:,.0f} tokens/s"
                bar.set_postfix_str(words, refresh=False)
            bar.update()
            if validation_due := has_time and plan.validation_due(before, state.position):
                place = {"step": state.step, "epoch": state.step / plan.steps_per_epoch,
                         "learning_rate": rate * config.learning_rate, "gradient_norm": norm,
                         "seconds": state.elapsed + time.perf_counter() - started}  # fmt: skip
                validate(model, valid, state, place, accelerator, log)
                judge_encoder(state, why_collapsed(state.records[-1], train, valid), len(train), config, log)
            state.elapsed += time.perf_counter() - started
            if stopping or validation_due or time.perf_counter() - saved_at >= SAVE_EVERY_SECONDS:
                save_checkpoint(session.folder, state, model, optimizer, accelerator)
                saved_at = time.perf_counter()
            if stopping:
                raise Stopped(f"{label}: stopped at step {state.step}")
    if state.best_weights is not None:
        model.load_state_dict(state.best_weights)
        state.best_weights = None
    return state


def start_or_resume(
    model: PreferenceModel, config: RunConfig, accelerator: Accelerator, folder: Path | None, planned_steps: int
) -> tuple[torch.optim.AdamW, TrainingState]:
    """Model and optimizer on the device, and the state: those of the checkpoint in `folder`, if there is one."""
    model.to(accelerator.device)
    set_gradient_checkpointing(model.encoder, config.gradient_checkpointing)
    optimizer = make_optimizer(model, config, accelerator.device)
    if accelerator.scaler is not None:  # has a scale once it was used, which a process without rows would not do
        accelerator.scaler.scale(torch.zeros((), device=accelerator.device))
    state = load_checkpoint(folder, model, optimizer, accelerator)
    state = state or TrainingState(config.max_tokens_per_micro_step, planned_steps)
    broadcast(model.state_dict())  # in place: all processes have the weights of the first
    if accelerator.process_index:  # dropout must differ between processes
        torch.manual_seed(config.seed + 10_007 * accelerator.process_index + state.step)
    return optimizer, state


class StepPlan:
    """The planned optimizer steps: the rows of each, and after which to validate."""

    def __init__(self, train: Examples, config: RunConfig):
        self.train, self.config, self.epoch = train, config, None
        self.steps_per_epoch = math.ceil(len(train) / config.batch_size)
        self.steps = self.steps_per_epoch * config.num_epochs
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
        """Whether a step from position `before` to `after` passes a planned validation: equal parts of each epoch."""
        return any(before < planned <= after for planned in self.validations)


class Clock:
    """Counts steps and their time. Without a time budget the position of a training run is its number of steps.

    With one, a step that takes a tenth of the time that is left for steps moves it on by at least a tenth of what is
    left. So the learning rate ends at zero and the run within the budget, whatever its pace. Time for the last
    validation, the test rows and saving is reserved.
    """

    def __init__(self, session: Session, valid_tokens: int):
        self.session, self.valid_tokens = session, valid_tokens
        self.first = 0.0, 0  # seconds and tokens of the first steps
        self.end = session.deadline - min(FINISH_SECONDS, FINISH_SHARE * (session.deadline - time.perf_counter()))

    def count_step(self, state: TrainingState, started: float, accelerator: Accelerator) -> tuple[bool, bool]:
        """Count a step that began at `started`, and move the position on. Returns whether a process was asked to stop,
        and whether there is time for a validation: half of what is left for steps, or if it is the last one."""
        seconds, seconds_per_token = time.perf_counter() - started, 0.0
        state.step += 1
        state.step_seconds += seconds
        if state.position <= FIRST_SHARE * state.planned_steps:
            self.first = state.step_seconds, state.tokens.real
        else:
            paces = ((state.step_seconds - s) / (state.tokens.real - n) for s, n in ((0, 0), self.first))
            seconds_per_token = FORWARD_SHARE * min(paces)  # of those that are predicted
        left = self.end - started - seconds_per_token * (self.valid_tokens + self.session.tokens_to_predict)
        share = seconds / left if seconds < left else 1.0
        position = max(state.step, state.position + share * (state.planned_steps - state.position))
        has_time = position >= state.planned_steps or left - seconds > 2 * seconds_per_token * self.valid_tokens
        own = [position, has_time] if accelerator.is_main_process else [0, 0]  # one clock counts: all have one plan
        asked, state.position, has_time = sum_counts([self.session.stop.is_set(), *own], accelerator)
        return bool(asked), bool(has_time)
