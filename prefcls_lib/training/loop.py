"""fit: from a model that predicts the prior to the best weights, with the history of how it got there."""

import math
import threading
import time
from collections.abc import Callable, Iterator
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
from prefcls_lib.models.predict import embed_unique_sides, predict_from_embeddings
from prefcls_lib.runtime.files import UserError
from prefcls_lib.runtime.progress import progress_bar
from prefcls_lib.training.collapse import COLLAPSE_AFTER_ROWS, Collapsed, why_collapsed
from prefcls_lib.training.distributed import share_weights, sum_counts, sum_gradients
from prefcls_lib.training.optim import make_optimizer, rate_factor, set_learning_rate, steps_in_time, validation_steps
from prefcls_lib.training.state import Stopped, TrainingState, load_state, save_state
from prefcls_lib.training.step import MAX_GRAD_NORM, Result, fit_head, train_step, within_memory

MIN_ROWS_TO_SELECT = 2000  # with fewer validation rows the best step is noise: the last weights are kept
MAX_SKIPPED_IN_A_ROW = 20  # steps without a finite gradient; the fp16 scaler settles within a few
PACE_STEPS = 5  # steps whose pace is measured before a time budget is planned,
PACE_SHARE = 0.1  # or fewer, where they take more than this share of it


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
    Where an earlier, killed session left a checkpoint, training resumes from it. On a CPU of the same kind the end is
    the same to the bit; on a GPU nearly, because scatter, gather and memory-efficient attention add in any order there.

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
                fit_head(model, self.train, config, accelerator, self.pad_id)
        share_weights(model, accelerator)
        if accelerator.process_index:  # dropout must differ between processes
            torch.manual_seed(config.seed + 10_007 * accelerator.process_index + self.state.step)
        self.started = self.saved = time.perf_counter()
        self.elapsed_before, self.skipped_in_a_row, self.stopping = self.state.elapsed, 0, False
        self.paces: list[tuple[int, float]] = []  # tokens and seconds of each step of this session
        self.swapped_probs = self.valid_tokens = None
        prior = class_shares(self.train.labels)
        self.prior_log_loss = metrics.log_loss(self.valid.labels, np.tile(prior, (len(self.valid), 1)))
        offsets = self.valid.offsets
        self.baseline_log_loss = (
            None if offsets is None else metrics.log_loss(self.valid.labels, softmax(offsets.astype(float), axis=1))
        )
        self.progress = progress_bar(self.state.total_steps, self.label, "step", accelerator.is_main_process)
        self.progress.update(self.state.step)
        if not is_new:
            self.log(f"resumed at step {self.state.step}")
        if accelerator.num_processes > 1:
            self.log(f"{accelerator.num_processes} processes share each step")

    def log(self, line: str) -> None:
        """Print a line above the progress bar, in one of the processes."""
        if self.accelerator.is_main_process:
            self.progress.write(f"{self.label}: {line}")

    def within_memory(self, work: Callable[[], Result], repeat: bool = True) -> Result:
        """`step.within_memory` at the state of this run."""
        return within_memory(work, self.state, self.log, repeat)

    def batches(self) -> Iterator[np.ndarray]:
        """The row numbers (B,) of one optimizer step after the other, from where the state stands."""
        config, state, planned_epoch = self.config, self.state, None
        while state.step < state.total_steps:
            epoch, position = divmod(state.step, self.steps_per_epoch)
            if epoch != planned_epoch:
                planned_epoch, self.examples = epoch, epoch_examples(self.train, config, epoch)
                planned = plan_epoch(self.examples.lengths, config.batch_size, config.seed, epoch)
                self.step_tokens = np.array([self.examples.lengths[batch].sum() for batch in planned])
            yield planned[position]

    def take_step(self, batch: np.ndarray) -> None:
        """One optimizer step: rate, gradients, update, counts.

        Raises:
            UserError: too many steps in a row had no finite gradient.
        """
        state, config, accelerator, started = self.state, self.config, self.accelerator, time.perf_counter()
        factor = rate_factor(state.step, state.total_steps, self.steps_per_epoch, state.records, config)
        set_learning_rate(self.optimizer, factor)
        loss_sum, tokens = self.within_memory(
            lambda: train_step(self.model, self.examples, batch, state.max_tokens, config, accelerator, self.pad_id)
        )
        self.within_memory(lambda: sum_gradients(self.model, accelerator), repeat=accelerator.num_processes == 1)
        is_finite = self.update_weights()
        now, asked = time.perf_counter(), self.session.stop is not None and self.session.stop.is_set()
        clock = [now - started, (self.session.deadline or now) - now]
        if not accelerator.is_main_process:  # one clock counts, so that all processes make the same plan
            clock = [0.0, 0.0]
        loss_sum, counts = sum_counts(loss_sum, [tokens.real, tokens.computed, asked, *clock], accelerator)
        real, computed, self.stopping, seconds, self.time_left = counts
        self.paces.append((self.step_tokens[state.step % self.steps_per_epoch], seconds))
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
        self.norm = float(self.within_memory(lambda: torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)))
        if math.isfinite(self.norm):
            self.within_memory(self.optimizer.step)
        if scaler is not None:
            scaler.update()
        self.optimizer.zero_grad()
        return math.isfinite(self.norm)

    def replan(self) -> None:
        """As many of the planned steps as there is time for: after PACE_STEPS, and after each hundredth of the plan.

        The pace is in tokens, without the first step, in which a GPU loads its kernels. Prediction is counted at that
        pace too, though without a backward pass it is two to three times faster: that is the margin, with a tenth of
        the remaining time.
        """
        state, done, position = self.state, len(self.paces), self.state.step % self.steps_per_epoch
        if self.session.deadline is None or (done > PACE_STEPS and state.step % max(1, state.total_steps // 100)):
            return
        used = sum(seconds for _, seconds in self.paces)
        if done < PACE_STEPS and used < PACE_SHARE * (used + self.time_left):
            return
        tokens, seconds = np.sum(self.paces[1:] or self.paces, axis=0)
        pace = tokens / max(seconds, 1e-9)
        ahead = np.full(self.planned_steps - state.step, self.step_tokens.mean())
        if position:  # the rest of this epoch is known
            ahead[: self.steps_per_epoch - position] = self.step_tokens[position:]
        tokens_left = 0.9 * self.time_left * pace - self.session.tokens_to_predict
        validations = validation_steps(self.config, self.steps_per_epoch, self.planned_steps)
        before, valid_tokens = state.total_steps, self.valid.lengths.sum()
        state.total_steps = steps_in_time(state.step, ahead, validations, valid_tokens, tokens_left)
        self.progress.total = state.total_steps
        if abs(state.total_steps - before) * 100 >= self.planned_steps:
            self.log(
                f"time budget: at {pace:,.0f} tokens/s {state.total_steps} of {self.planned_steps} steps fit, "
                "validation and prediction included"
            )

    def validation_due(self) -> bool:
        """Whether the state stands at a step after which to validate."""
        return self.state.step in validation_steps(self.config, self.steps_per_epoch, self.state.total_steps)

    def validate(self) -> None:
        """Score the validation rows, keep the weights where they are the best so far, check for a collapse.

        A good baseline and structure features hide an encoder that contributes nothing. So the rows are predicted once
        more by the auxiliary output, which knows no baseline, with the features at their mean (zero, once
        standardised): `encoder_log_loss` is that prediction's, `encoder_spread` its standard deviation over the rows,
        averaged over the classes.

        Raises:
            UserError: the predictions are not finite.
            Collapsed: see `fit`.
        """
        state, valid = self.state, self.valid
        state.elapsed = self._elapsed()
        probs, encoder_probs, swapped_probs = self.within_memory(self._predict_valid)
        if not np.isfinite(probs).all():
            raise UserError(
                f"training: at step {state.step} the predictions are not finite ({state.skipped_steps} steps were left "
                "out). Set learning_rate lower, or mixed_precision=no."
            )
        record = {
            "step": state.step,
            "train_log_loss": state.train_log_loss if state.loss_rows else None,  # None: no step had a finite gradient
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
        self._check_for_collapse(record)

    def _check_for_collapse(self, record: dict) -> None:
        rows_seen = self.state.step * self.config.batch_size
        reason = why_collapsed(record, self.prior_log_loss, self.baseline_log_loss)
        record["collapsed"] = bool(reason) and rows_seen >= COLLAPSE_AFTER_ROWS
        if reason:
            state = "has collapsed" if record["collapsed"] else "does not contribute yet"
            message = f"the encoder {state} after {rows_seen:,} rows: {reason}"
            self.log(message)
        if record["collapsed"] and self.config.on_collapse != "warn":
            raise Collapsed(f"{self.label}: {message}", record)

    def _predict_valid(self) -> tuple[np.ndarray, ...]:
        """Probabilities (N, 3) of the validation rows; by the encoder alone; and with A and B swapped."""
        embeddings, self.valid_tokens = embed_unique_sides(self.model, self.valid, self.accelerator, self.pad_id)
        at_mean = None if self.valid.features is None else np.zeros_like(self.valid.features)
        rows = (self.valid, replace(self.valid, features=at_mean), self.valid.swapped())
        return tuple(
            predict_from_embeddings(self.model, embeddings, some, self.accelerator, auxiliary)
            for some, auxiliary in zip(rows, (False, True, False), strict=True)
        )

    def save_if_due(self) -> None:
        """A checkpoint after each validation, before a stop, and every `save_every_minutes`."""
        if self.session.state_folder is None or not self.accelerator.is_main_process:
            return
        due = time.perf_counter() - self.saved >= 60 * self.config.save_every_minutes
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
        state, model = self.state, self.model
        if self.config.gradient_checkpointing:
            set_gradient_checkpointing(model.encoder, False)
        if state.best_weights is not None:
            model.load_state_dict(state.best_weights)
        if self.swapped_probs is None:  # the chosen validation was in an earlier session
            self.swapped_probs = self._predict_valid()[2]
        chosen = len(state.records) - 1 if state.best is None else state.best
        history, valid_probs = pd.DataFrame(state.records), np.stack(state.valid_probs)
        warning = why_collapsed(state.records[chosen], self.prior_log_loss, self.baseline_log_loss)
        counts = (state.tokens, self.valid_tokens, state.step_seconds)
        return FitResult(history, valid_probs, chosen, warning, self.swapped_probs, *counts)

    def _elapsed(self) -> float:
        return self.elapsed_before + time.perf_counter() - self.started


def epoch_examples(train: Examples, config: RunConfig, epoch: int) -> Examples:
    """The rows as an epoch trains on them: a cross-encoder's in one order of A and B, half the tokens of both."""
    return train.in_random_order(config.seed, epoch) if config.architecture == "cross" else train
