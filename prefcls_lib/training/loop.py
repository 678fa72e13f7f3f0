"""fit: from an untrained model, which predicts its baseline or the prior, to trained weights and their history."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples, TokenCount, plan_epoch
from prefcls_lib.evaluation import scores
from prefcls_lib.models.backbones import set_gradient_checkpointing
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.runtime.files import UserError
from prefcls_lib.runtime.progress import progress_bar
from prefcls_lib.training import step
from prefcls_lib.training.collapse import check_encoder, reference_log_losses, why_collapsed
from prefcls_lib.training.distributed import share_weights, sum_counts, sum_gradients
from prefcls_lib.training.optim import (
    Pace,
    make_optimizer,
    rate_factor,
    set_learning_rate,
    steps_in_time,
    validation_steps,
)
from prefcls_lib.training.state import FitResult, Session, Stopped, TrainingState, load_state, save_state

MIN_ROWS_TO_SELECT = 2000  # with fewer validation rows the best step is noise: the last weights are kept
MAX_SKIPPED_IN_A_ROW = 20  # steps without a finite gradient; the fp16 scaler settles within a few


def fit(
    model: PreferenceModel,
    train: Examples,
    valid: Examples,
    config: RunConfig,
    accelerator: Accelerator,
    pad_id: int,
    label: str = "train",
    session: Session | None = None,
) -> FitResult:
    """Train `model` in place.

    AdamW with linear warm-up and decay; validation on unsmoothed log loss at even steps of every epoch. With at
    least MIN_ROWS_TO_SELECT validation rows the weights of the best validation are restored, else the last are kept.
    Where an earlier, killed session left a checkpoint, training resumes from it. On a CPU of the same kind the end is
    the same to the bit; on a GPU nearly, because scatter, gather and memory-efficient attention add in any order there.

    Args:
        model: untrained; it predicts its baseline, or the class shares where it starts from none.
        train, valid: rows with labels.
        config: with the recipe filled in.
        accelerator: device, autocast and gradient scaling.
        pad_id: padding token of the backbone.
        label: name of the progress bar.
        session: checkpoints, deadline, stop signal.

    Raises:
        UserError: gradients or predictions are no longer finite, or not even one pair fits into memory.
        Stopped: `session.stop` was set; the state is saved.
        Collapsed: the encoder has collapsed, and `on_collapse` is not "warn".
    """
    trainer = Trainer(model, train, valid, config, accelerator, pad_id, label, session or Session())
    trainer.start_or_resume()
    with trainer.progress:
        for batch in trainer.batches():
            trainer.take_step(batch)
            trainer.replan()
            if trainer.validation_due():
                trainer.validate()
            trainer.save_if_due()
            trainer.stop_if_asked()
    return trainer.result()


@dataclass
class Trainer:
    """A training run: `fit` calls its methods in order. `state` is its position; all of it is in a checkpoint."""

    model: PreferenceModel
    train: Examples
    valid: Examples
    config: RunConfig
    accelerator: Accelerator
    pad_id: int
    label: str
    session: Session

    def start_or_resume(self) -> None:
        """Model and optimizer on the device, and the state: that of the checkpoint, else of a new run."""
        model, config, accelerator, folder = self.model, self.config, self.accelerator, self.session.state_folder
        model.to(accelerator.device)
        if config.gradient_checkpointing:
            set_gradient_checkpointing(model.encoder, True)
        self.optimizer = make_optimizer(model, config, accelerator.device)
        if accelerator.scaler is not None:  # has a scale once it was used, which a process without rows would not do
            accelerator.scaler.scale(torch.zeros((), device=accelerator.device))
        self.steps_per_epoch = math.ceil(len(self.train) / config.batch_size)
        self.planned_steps = self.steps_per_epoch * config.num_epochs
        self.state = folder and load_state(folder, model, self.optimizer, accelerator)
        is_new = not self.state
        if is_new:
            self.state = TrainingState(self.planned_steps, config.max_tokens_per_micro_step)
            if config.head_only_rows:
                step.fit_head(model, self.train, config, accelerator, self.pad_id)
        share_weights(model, accelerator)
        if accelerator.process_index:  # dropout must differ between processes
            torch.manual_seed(config.seed + 10_007 * accelerator.process_index + self.state.step)
        self.saved = time.perf_counter()
        self.started = self.saved - self.state.elapsed
        self.skipped_in_a_row, self.stopping, self.pace = 0, False, Pace()
        self.swapped_probs = self.valid_tokens = None
        self.references = reference_log_losses(self.train, self.valid)
        shown, done = accelerator.is_main_process, self.state.step
        self.progress = progress_bar(self.state.total_steps, self.label, "step", shown, done)
        if not is_new:
            self.log(f"resumed at step {self.state.step}")
        if accelerator.num_processes > 1:
            self.log(f"{accelerator.num_processes} processes share each step")

    def log(self, line: str) -> None:
        """Print a line above the progress bar, in one of the processes."""
        if self.accelerator.is_main_process:
            self.progress.write(f"{self.label}: {line}")

    def within_memory(self, work: Callable[[], step.Result], repeat: bool = True) -> step.Result:
        """`step.within_memory` at the state of this run."""
        return step.within_memory(work, self.state, self.log, repeat)

    def batches(self) -> Iterator[np.ndarray]:
        """The row numbers (B,) of one optimizer step after the other, from the state's position on."""
        config, state, planned_epoch = self.config, self.state, None
        while state.step < state.total_steps:
            epoch, position = divmod(state.step, self.steps_per_epoch)
            if epoch != planned_epoch:
                planned_epoch, self.examples = epoch, step.epoch_examples(self.train, config, epoch)
                planned = plan_epoch(self.examples.lengths, config.batch_size, config.seed, epoch)
                self.step_tokens = np.array([self.examples.lengths[batch].sum() for batch in planned])
            yield planned[position]

    def take_step(self, batch: np.ndarray) -> None:
        """One optimizer step: rate, gradients, update, counts."""
        state, config, accelerator, started = self.state, self.config, self.accelerator, time.perf_counter()
        factor = rate_factor(state.step, state.total_steps, self.steps_per_epoch, state.records, config)
        set_learning_rate(self.optimizer, factor)
        given = (self.model, self.examples, batch)
        loss_sum, tokens = self.within_memory(
            lambda: step.train_step(*given, state.max_tokens, config, accelerator, self.pad_id)
        )
        self.within_memory(lambda: sum_gradients(self.model, accelerator), repeat=accelerator.num_processes == 1)
        is_finite = self.update_weights()
        now, asked = time.perf_counter(), self.session.stop is not None and self.session.stop.is_set()
        clock = np.array([now - started, (self.session.deadline or now) - now])
        clock *= accelerator.is_main_process  # one clock counts, so that all processes make the same plan
        loss_sum, counts = sum_counts(loss_sum, [tokens.real, tokens.computed, asked, *clock.tolist()], accelerator)
        real, computed, self.stopping, seconds, self.time_left = counts
        self.pace.steps.append((self.step_tokens[state.step % self.steps_per_epoch], seconds))
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        state.skipped_steps += not is_finite
        state.step += 1
        state.tokens += TokenCount(int(real), int(computed))
        state.step_seconds += seconds
        if is_finite:
            state.loss_sum, state.loss_rows = state.loss_sum + loss_sum, state.loss_rows + len(batch)
        self.progress.update()
        if state.step % 10 == 0:
            pace = f"{state.tokens_per_second:,.0f} tokens/s"
            self.progress.set_postfix_str(f"loss {state.train_log_loss:.4f}, {pace}", refresh=False)
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"training: the gradients of {self.skipped_in_a_row} steps in a row were not finite (now step "
                f"{state.step}). Set learning_rate lower, or mixed_precision=no."
            )

    def update_weights(self) -> bool:
        """Clip the gradients and take the step, where they are finite; whether they were."""
        scaler, parameters = self.accelerator.scaler, list(self.model.parameters())
        if scaler is not None:
            self.within_memory(lambda: scaler.unscale_(self.optimizer))
        self.norm = float(self.within_memory(lambda: torch.nn.utils.clip_grad_norm_(parameters, step.MAX_GRAD_NORM)))
        if math.isfinite(self.norm):
            self.within_memory(self.optimizer.step)
        if scaler is not None:
            scaler.update()
        self.optimizer.zero_grad()
        return math.isfinite(self.norm)

    def replan(self) -> None:
        """As many of the planned steps as there is time for, at the pace so far.

        Prediction is counted at that pace too, though without a backward pass it is two to three times faster: that is
        the margin, with a tenth of the remaining time.
        """
        state, position = self.state, self.state.step % self.steps_per_epoch
        if self.session.deadline is None or not self.pace.is_due(state.step, state.total_steps, self.time_left):
            return
        ahead = np.full(self.planned_steps - state.step, self.step_tokens.mean())
        if position:  # the rest of this epoch is known
            ahead[: self.steps_per_epoch - position] = self.step_tokens[position:]
        tokens_left = 0.9 * self.time_left * self.pace.tokens_per_second - self.session.tokens_to_predict
        validations = validation_steps(self.config, self.steps_per_epoch, self.planned_steps)
        before, valid_tokens = state.total_steps, self.valid.lengths.sum()
        state.total_steps = steps_in_time(state.step, ahead, validations, valid_tokens, tokens_left)
        self.progress.total = state.total_steps
        if abs(state.total_steps - before) * 100 >= self.planned_steps:
            self.log(
                f"time budget: at {self.pace.tokens_per_second:,.0f} tokens/s {state.total_steps} of "
                f"{self.planned_steps} steps fit, validation and prediction included"
            )

    def validation_due(self) -> bool:
        """Whether to validate after the state's step."""
        return self.state.step in validation_steps(self.config, self.steps_per_epoch, self.state.total_steps)

    def validate(self) -> None:
        """Score the validation rows, keep the weights where they are the best so far, check for a collapse.

        A good baseline and structure features hide an encoder that contributes nothing. So the rows are predicted once
        more by the auxiliary output, which knows no baseline, with the features at their mean (zero, once
        standardised): `encoder_log_loss` is that prediction's, `encoder_spread` its standard deviation over the rows,
        averaged over the classes.
        """
        state, valid = self.state, self.valid
        state.elapsed = time.perf_counter() - self.started
        probs, encoder_probs, swapped_probs, self.valid_tokens = self.within_memory(self.predict_valid)
        if not np.isfinite(probs).all():
            raise UserError(
                f"training: at step {state.step} the predictions are not finite ({state.skipped_steps} steps were left "
                "out). Set learning_rate lower, or mixed_precision=no."
            )
        record = {
            "step": state.step,
            "train_log_loss": state.train_log_loss if state.loss_rows else None,  # None: no step had a finite gradient
            "valid_log_loss": scores.log_loss(valid.labels, probs),
            "valid_accuracy": scores.accuracy(valid.labels, probs),
            "encoder_log_loss": scores.log_loss(valid.labels, encoder_probs),
            "encoder_spread": float(encoder_probs.std(axis=0).mean()),
            "tokens_per_second": state.tokens_per_second,
            "skipped_steps": state.skipped_steps,
            "seconds": state.elapsed,
            "epoch": state.step / self.steps_per_epoch,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "gradient_norm": self.norm if math.isfinite(self.norm) else None,
        }
        state.valid_probs.append(probs)
        state.loss_sum, state.loss_rows = 0.0, 0
        state.records.append(record)
        is_best = record["valid_log_loss"] <= min(earlier["valid_log_loss"] for earlier in state.records)
        if is_best or len(valid) < MIN_ROWS_TO_SELECT:
            self.swapped_probs = swapped_probs
        if is_best and len(valid) >= MIN_ROWS_TO_SELECT:
            state.best = len(state.records) - 1
            state.best_weights = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        self.log(
            f"step {state.step}/{state.total_steps}  train {record['train_log_loss'] or math.nan:.4f}  valid log loss "
            f"{record['valid_log_loss']:.4f}  accuracy {record['valid_accuracy']:.3f}"
        )
        check_encoder(record, state.step * self.config.batch_size, self.references, self.config.on_collapse, self.log)

    def predict_valid(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, TokenCount]:
        """`step.predict_valid` of this run."""
        return step.predict_valid(self.model, self.valid, self.accelerator, self.pad_id)

    def save_if_due(self) -> None:
        """A checkpoint after each validation, before a stop, and every `save_every_minutes`."""
        if self.session.state_folder is None or not self.accelerator.is_main_process:
            return
        due = time.perf_counter() - self.saved >= 60 * self.config.save_every_minutes
        if due or self.stopping or self.validation_due():
            self.state.elapsed = time.perf_counter() - self.started
            save_state(self.session.state_folder, self.state, self.model, self.optimizer, self.accelerator)
            self.saved = time.perf_counter()

    def stop_if_asked(self) -> None:
        """Raises Stopped where `session.stop` is set in any of the processes."""
        if self.stopping:
            raise Stopped(f"{self.label}: stopped at step {self.state.step}")

    def result(self) -> FitResult:
        """What was measured; the model gets the weights of the chosen validation."""
        state, model = self.state, self.model
        if self.config.gradient_checkpointing:
            set_gradient_checkpointing(model.encoder, False)
        if state.best_weights is not None:
            model.load_state_dict(state.best_weights)
        if self.swapped_probs is None:  # the chosen validation was in an earlier session
            *_, self.swapped_probs, self.valid_tokens = self.within_memory(self.predict_valid)
        chosen = len(state.records) - 1 if state.best is None else state.best
        history, valid_probs = pd.DataFrame(state.records), np.stack(state.valid_probs)
        warning = why_collapsed(state.records[chosen], *self.references)
        counts = (state.tokens, self.valid_tokens, state.step_seconds)
        return FitResult(history, valid_probs, chosen, warning, self.swapped_probs, *counts)
