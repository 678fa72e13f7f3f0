"""fit: from a model that predicts the prior to the best weights, with the history of how it got there."""

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from scipy.special import softmax

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples, TokenCount, plan_epoch
from prefcls_lib.data.schema import class_shares
from prefcls_lib.evaluation import metrics
from prefcls_lib.models.backbones import set_gradient_checkpointing
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import embed_unique_sides, predict_from_embeddings, predict_proba
from prefcls_lib.runtime.files import UserError
from prefcls_lib.runtime.progress import progress_bar
from prefcls_lib.training.collapse import COLLAPSE_AFTER_ROWS, Collapsed, why_collapsed
from prefcls_lib.training.distributed import from_main_process, share_weights, sum_counts, sum_gradients
from prefcls_lib.training.optim import (
    PACE_SHARE,
    PACE_STEPS,
    make_optimizer,
    rate_factor,
    set_learning_rate,
    steps_in_time,
    validation_steps,
)
from prefcls_lib.training.state import Stopped, TrainingState, load_state, save_state
from prefcls_lib.training.step import MAX_GRAD_NORM, fit_head, train_step_in_memory

MIN_ROWS_TO_SELECT = 2000  # with fewer validation rows the best step is noise: the last weights are kept
MAX_SKIPPED_IN_A_ROW = 20  # steps without a finite gradient; the fp16 scaler settles within a few


@dataclass(frozen=True)
class FitResult:
    """What `fit` measured. The model itself holds the chosen weights.

    Attributes:
        history: one line a validation: step, epoch, train_log_loss and valid_log_loss (both unsmoothed),
            valid_accuracy, encoder_log_loss and encoder_spread (see `Trainer.validate`), learning_rate, gradient_norm,
            tokens_per_second, skipped_steps, seconds.
        valid_probs: (V, N, 3) probabilities of the validation rows at each validation.
        chosen: which validation's weights the model holds.
        encoder_warning: why their encoder contributes nothing, "" where it may contribute.
        swapped_probs: (N, 3) of the validation rows with A and B swapped, by those weights.
        tokens: of all training steps.
        valid_tokens: of one pass over the validation rows.
        step_seconds: seconds in training steps, validation left out.
    """

    history: pd.DataFrame
    valid_probs: np.ndarray
    chosen: int
    encoder_warning: str
    swapped_probs: np.ndarray
    tokens: TokenCount
    valid_tokens: TokenCount
    step_seconds: float


@dataclass(frozen=True)
class Session:
    """What a fit needs to know of the session it runs in.

    Attributes:
        state_folder: where checkpoints go, and where an earlier one is looked for; None: none are kept.
        deadline: `time.perf_counter()` by which `fit` must return; None: no time budget.
        tokens_to_predict: tokens that will still have to be predicted after `fit`, before the deadline.
        stop: set from outside to end training after the step at hand, its state saved.
    """

    state_folder: Path | None = None
    deadline: float | None = None
    tokens_to_predict: int = 0
    stop: threading.Event | None = None


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
    Where an earlier, killed session left a checkpoint, training resumes from it, and on the same machine the end is
    the same to the bit.

    Args:
        model: its head started at the prior.
        train, valid: rows with labels.
        config: with the recipe filled in.
        accelerator: device, autocast and gradient scaling.
        pad_id: padding token of the backbone.
        label: name of the progress bar.
        session: checkpoints, deadline, stop signal.

    Raises:
        UserError: gradients are no longer finite, or not even one pair fits into memory.
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
    """A training run: `fit` calls its methods in order. `state` is where it stands; all of that is in a checkpoint."""

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
        self.optimizer = accelerator.prepare_optimizer(make_optimizer(model, config, accelerator.device))
        self.steps_per_epoch = math.ceil(len(self.train) / config.batch_size)
        self.state = folder and load_state(folder, model, self.optimizer, accelerator)
        resumed = bool(self.state)
        if not resumed:
            self.state = TrainingState(self.steps_per_epoch * config.num_epochs, config.max_tokens_per_micro_step)
            if config.head_only_rows:
                fit_head(model, self.train, config, accelerator, self.pad_id)
        share_weights(model, accelerator)
        if accelerator.process_index:  # dropout must differ between processes
            torch.manual_seed(config.seed + 10_007 * accelerator.process_index + self.state.step)
        self.started = self.saved = time.perf_counter()
        self.first_step, self.elapsed_before = self.state.step, self.state.elapsed
        self.skipped_in_a_row, self.stopping = 0, False
        self.swapped_probs = self.valid_tokens = None
        prior = class_shares(self.train.labels)
        self.prior_log_loss = metrics.log_loss(self.valid.labels, np.tile(prior, (len(self.valid), 1)))
        offsets = self.valid.offsets
        self.baseline_log_loss = (
            None if offsets is None else metrics.log_loss(self.valid.labels, softmax(offsets.astype(float), axis=1))
        )
        self.progress = progress_bar(self.state.total_steps, self.label, "step", accelerator.is_main_process)
        self.progress.update(self.state.step)
        if resumed:
            self.log(f"resumed at step {self.state.step}")
        if accelerator.num_processes > 1:
            self.log(f"{accelerator.num_processes} processes share each step")

    def log(self, line: str) -> None:
        """Print a line above the progress bar, in one of the processes."""
        if self.accelerator.is_main_process:
            self.progress.write(f"{self.label}: {line}")

    def batches(self) -> Iterator[np.ndarray]:
        """The row numbers (B,) of one optimizer step after the other, from where the state stands."""
        config, state, planned_epoch = self.config, self.state, None
        while state.step < state.total_steps:
            epoch, position = divmod(state.step, self.steps_per_epoch)
            if epoch != planned_epoch:
                planned_epoch, self.examples = epoch, epoch_examples(self.train, config, epoch)
                planned = plan_epoch(self.examples.lengths, config.batch_size, config.seed, epoch)
            yield planned[position]

    def take_step(self, batch: np.ndarray) -> None:
        """One optimizer step: rate, gradients within memory, clipping, update, counts.

        Raises:
            UserError: too many steps in a row had no finite gradient.
        """
        state, config, accelerator, step_started = self.state, self.config, self.accelerator, time.perf_counter()
        factor = rate_factor(state.step, state.total_steps, self.steps_per_epoch, state.records, config)
        set_learning_rate(self.optimizer, factor)
        loss_sum, tokens = train_step_in_memory(
            self.model, self.examples, batch, config, accelerator, self.pad_id, state, self.log
        )
        sum_gradients(self.model, accelerator)
        self.norm = float(accelerator.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM))
        is_finite = math.isfinite(self.norm)
        if is_finite or accelerator.scaler is not None:
            self.optimizer.step()  # with a scaler, this itself leaves out a step that is not finite
        self.optimizer.zero_grad()
        asked = self.session.stop is not None and self.session.stop.is_set()
        loss_sum, tokens, self.stopping = sum_counts(loss_sum, tokens, asked, accelerator)
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        state.skipped_steps += not is_finite
        state.step += 1
        state.tokens += tokens
        if is_finite:
            state.loss_sum, state.loss_rows = state.loss_sum + loss_sum, state.loss_rows + len(batch)
        state.step_seconds += time.perf_counter() - step_started
        self.progress.update()
        if state.step % 10 == 0:
            pace = f"{state.tokens_per_second:,.0f} tokens/s"
            self.progress.set_postfix_str(f"loss {state.train_log_loss:.4f}, {pace}", refresh=False)
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"training: the gradients of {self.skipped_in_a_row} steps in a row were not finite (now step "
                f"{state.step}). Set learning_rate lower, or mixed_precision=no."
            )

    def replan(self) -> None:
        """Fewer steps, where there is no time for all of them before the deadline."""
        state, deadline, now = self.state, self.session.deadline, time.perf_counter()
        if deadline is None:
            return
        plan_by = self.started + PACE_SHARE * (deadline - self.started)
        if state.step < self.first_step + PACE_STEPS and now <= plan_by:
            return
        planned = state.total_steps
        state.total_steps = from_main_process(
            _fit_into_time(state, self.session, self.valid, self.steps_per_epoch, self.config), self.accelerator
        )
        if state.total_steps < planned:
            self.progress.total = state.total_steps
            self.log(
                f"time budget: at {state.tokens_per_second:,.0f} tokens/s {state.total_steps} of {planned} steps fit, "
                "validation and prediction included"
            )

    def validation_due(self) -> bool:
        """Whether the state stands at a step after which to validate."""
        return self.state.step in validation_steps(self.config, self.steps_per_epoch, self.state.total_steps)

    def validate(self) -> None:
        """Score the validation rows, keep the weights where they are the best so far, watch for a collapse.

        A good baseline and structure features hide an encoder that contributes nothing. So the rows are predicted once
        more by the auxiliary output, which knows no baseline, with the features at their mean (zero, once
        standardised): `encoder_log_loss` is that prediction's, `encoder_spread` its standard deviation over the rows,
        averaged over the classes.

        Raises:
            UserError: no step since the last validation had a finite gradient, or the predictions are not finite.
            Collapsed: see `fit`.
        """
        state, valid = self.state, self.valid
        state.elapsed = self._elapsed()
        embeddings, self.valid_tokens = embed_unique_sides(self.model, valid, self.accelerator, self.pad_id)

        def predict(rows: Examples, auxiliary: bool = False) -> np.ndarray:
            return predict_from_embeddings(self.model, embeddings, rows, self.accelerator, auxiliary)

        at_mean = None if valid.features is None else np.zeros_like(valid.features)
        probs, encoder_probs = predict(valid), predict(replace(valid, features=at_mean), auxiliary=True)
        if state.loss_rows == 0 or not np.isfinite(probs).all():
            raise UserError(
                f"training: at step {state.step} loss or predictions are not finite ({state.skipped_steps} steps were "
                "left out). Set learning_rate lower, or mixed_precision=no."
            )
        record = {
            "step": state.step,
            "train_log_loss": state.train_log_loss,
            "valid_log_loss": metrics.log_loss(valid.labels, probs),
            "valid_accuracy": metrics.accuracy(valid.labels, probs),
            "encoder_log_loss": metrics.log_loss(valid.labels, encoder_probs),
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
        if len(valid) < MIN_ROWS_TO_SELECT:
            self.swapped_probs = predict(valid.swapped())
        elif record["valid_log_loss"] <= min(earlier["valid_log_loss"] for earlier in state.records):
            self.swapped_probs = predict(valid.swapped())
            state.best = len(state.records) - 1
            state.best_weights = {
                name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()
            }
        self.log(
            f"step {state.step}/{state.total_steps}  train {record['train_log_loss']:.4f}  valid log loss "
            f"{record['valid_log_loss']:.4f}  accuracy {record['valid_accuracy']:.3f}"
        )
        self._watch_for_collapse(record)

    def _watch_for_collapse(self, record: dict) -> None:
        rows_seen = self.state.step * self.config.batch_size
        reason = why_collapsed(record, self.prior_log_loss, self.baseline_log_loss)
        record["collapsed"] = bool(reason) and rows_seen >= COLLAPSE_AFTER_ROWS
        if reason:
            state = "has collapsed" if record["collapsed"] else "does not contribute yet"
            message = f"the encoder {state} after {rows_seen:,} rows: {reason}"
            self.log(message)
        if record["collapsed"] and self.config.on_collapse != "warn":
            raise Collapsed(f"{self.label}: {message}", record)

    def save_if_due(self) -> None:
        """A checkpoint after each validation, before a stop, and every `save_every_minutes`."""
        due = time.perf_counter() - self.saved >= 60 * self.config.save_every_minutes
        if self.session.state_folder is None or not self.accelerator.is_main_process:
            return
        if due or self.stopping or self.validation_due():
            self.state.elapsed = self._elapsed()
            save_state(self.session.state_folder, self.state, self.model, self.optimizer, self.accelerator)
            self.saved = time.perf_counter()

    def stop_if_asked(self) -> None:
        """Raises Stopped where `session.stop` is set in any of the processes."""
        if self.stopping:
            raise Stopped(f"{self.label}: stopped at step {self.state.step}")

    def result(self) -> FitResult:
        """What was measured; the model gets the weights of the chosen validation."""
        state = self.state
        if self.config.gradient_checkpointing:
            set_gradient_checkpointing(self.model.encoder, False)
        if state.best_weights is not None:
            self.model.load_state_dict(state.best_weights)
        if self.swapped_probs is None:  # the chosen validation was of an earlier session
            self.swapped_probs, self.valid_tokens = predict_proba(
                self.model, self.valid.swapped(), self.accelerator, self.pad_id
            )
        chosen = len(state.records) - 1 if state.best is None else state.best
        return FitResult(
            pd.DataFrame(state.records),
            np.stack(state.valid_probs),
            chosen,
            why_collapsed(state.records[chosen], self.prior_log_loss, self.baseline_log_loss),
            self.swapped_probs,
            state.tokens,
            self.valid_tokens,
            state.step_seconds,
        )

    def _elapsed(self) -> float:
        return self.elapsed_before + time.perf_counter() - self.started


def epoch_examples(train: Examples, config: RunConfig, epoch: int) -> Examples:
    """The rows as an epoch trains on them: a cross-encoder's in one order of A and B, half the tokens of both."""
    return train.in_random_order(config.seed, epoch) if config.architecture == "cross" else train


def _fit_into_time(
    state: TrainingState, session: Session, valid: Examples, steps_per_epoch: int, config: RunConfig
) -> int:
    """The total steps for which there is time before the deadline.

    Prediction is counted at the pace of training, though it needs no backward pass and is two to three times faster:
    that is the margin, with a tenth of the remaining time.
    """
    pace = state.tokens_per_second
    left = 0.9 * (session.deadline - time.perf_counter()) - session.tokens_to_predict / pace
    due = [step for step in validation_steps(config, steps_per_epoch, state.total_steps) if step > state.step]
    return steps_in_time(
        state.step, state.total_steps, len(due), left, state.step_seconds / state.step, valid.lengths.sum() / pace
    )
