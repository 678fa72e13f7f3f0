"""fit: from a model that predicts the prior to the best weights, with the history of how it got there."""

import math
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples, TokenCount, plan_epoch
from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.evaluation import metrics
from prefcls_lib.models.backbones import set_gradient_checkpointing
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import embed_unique_sides, predict_from_embeddings
from prefcls_lib.runtime.files import UserError
from prefcls_lib.runtime.progress import progress_bar
from prefcls_lib.training.collapse import Collapsed, why_dead
from prefcls_lib.training.distributed import from_main_process, share_weights, sum_counts, sum_gradients
from prefcls_lib.training.optim import (
    PACE_SHARE,
    PACE_STEPS,
    learning_rate_factor,
    make_optimizer,
    parameter_groups,
    rate_factor,
    set_learning_rate,
    steps_in_time,
    validation_steps,
)
from prefcls_lib.training.state import Stopped, TrainingState, load_state, save_state
from prefcls_lib.training.step import head_outputs, train_step_in_memory, training_loss

MIN_ROWS_TO_SELECT = 2000  # with fewer validation rows the best step is noise: the last weights are kept
MAX_SKIPPED_IN_A_ROW = 20  # steps without a finite gradient; the fp16 scaler settles within a few


@dataclass(frozen=True)
class FitResult:
    """What `fit` measured. The model itself holds the chosen weights.

    Attributes:
        history: one line a validation: step, epoch, train_log_loss and valid_log_loss (both unsmoothed),
            valid_accuracy, encoder_log_loss and encoder_spread (see `_validate`), learning_rate, gradient_norm,
            tokens_per_second, skipped_steps, seconds.
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


@dataclass(frozen=True)
class Session:
    """What a fit needs to know of the session it runs in.

    Attributes:
        state_folder: where checkpoints go, and where an earlier one is looked for; None: none are kept.
        deadline: `time.perf_counter()` by which `fit` must return; None: no time budget.
        tokens_to_predict: tokens that will still have to be predicted after `fit`, before the deadline.
        stop: set from outside to end training after the step at hand, its state saved.
        structure_log_loss: of the structure baseline on the validation rows, for the collapse watch; None: not known.
    """

    state_folder: Path | None = None
    deadline: float | None = None
    tokens_to_predict: int = 0
    stop: threading.Event | None = None
    structure_log_loss: float | None = None


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
    A checkpoint of an earlier, killed session is gone on from: on the same machine the end is the same to the bit.

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
        Collapsed: the encoder is dead, and `on_collapse` is not "warn".
    """
    session = session or Session()
    model.to(accelerator.device)
    if config.gradient_checkpointing:
        set_gradient_checkpointing(model.encoder, True)
    optimizer = accelerator.prepare_optimizer(make_optimizer(model, config, accelerator.device))
    steps_per_epoch = math.ceil(len(train) / config.batch_size)
    state = session.state_folder and load_state(session.state_folder, model, optimizer, accelerator)
    if state:
        print(f"{label}: resumed at step {state.step}", flush=True)
    else:
        state = TrainingState(steps_per_epoch * config.num_epochs, config.max_tokens_per_micro_step)
        if config.head_only_rows:
            fit_head(model, train, config, accelerator, pad_id)
    share_weights(model, accelerator)
    if accelerator.num_processes > 1 and accelerator.is_main_process:
        print(f"{label}: {accelerator.num_processes} processes share each step", flush=True)
    if accelerator.process_index:  # dropout must differ between processes
        torch.manual_seed(config.seed + 10_007 * accelerator.process_index + state.step)
    prior_log_loss = metrics.log_loss(valid.labels, _prior(train.labels, len(valid)))
    saved = started = time.perf_counter()
    first_step, elapsed_before = state.step, state.elapsed
    plan_by = started + PACE_SHARE * ((session.deadline or started) - started)
    skipped_in_a_row, planned_epoch = 0, None
    valid_tokens = None
    with progress_bar(state.total_steps, label, "step", accelerator.is_main_process) as progress:

        def say(line: str) -> None:
            if accelerator.is_main_process:
                progress.write(line)

        progress.update(state.step)
        while state.step < state.total_steps:
            epoch, position = divmod(state.step, steps_per_epoch)
            if epoch != planned_epoch:
                planned_epoch, examples = epoch, epoch_examples(train, config, epoch)
                lengths = examples.lengths
                steps = plan_epoch(lengths, config.batch_size, config.seed, epoch)
            factor = rate_factor(state.step, state.total_steps, steps_per_epoch, state.records, config)
            set_learning_rate(optimizer, factor)
            step_started = time.perf_counter()
            loss_sum, tokens = train_step_in_memory(
                model, examples, steps[position], lengths, config, accelerator, pad_id, state, say
            )
            sum_gradients(model, accelerator)
            norm = float(accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm))
            if math.isfinite(norm) or accelerator.scaler is not None:
                optimizer.step()  # with a scaler, this itself leaves out a step that is not finite
            optimizer.zero_grad()
            stopping = session.stop is not None and session.stop.is_set()
            loss_sum, tokens, stopping = sum_counts(loss_sum, tokens, stopping, accelerator)
            skipped_in_a_row = 0 if math.isfinite(norm) else skipped_in_a_row + 1
            state.skipped_steps += not math.isfinite(norm)
            state.step += 1
            state.tokens += tokens
            if math.isfinite(norm):
                state.loss_sum, state.loss_rows = state.loss_sum + loss_sum, state.loss_rows + len(steps[position])
            state.step_seconds += time.perf_counter() - step_started
            progress.update()
            if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise UserError(
                    f"training: the gradients of {skipped_in_a_row} steps in a row were not finite (now step "
                    f"{state.step}). Set learning_rate lower, or mixed_precision=no."
                )
            if session.deadline and (state.step >= first_step + PACE_STEPS or time.perf_counter() > plan_by):
                planned = state.total_steps
                state.total_steps = from_main_process(
                    _fit_into_time(state, session, valid, steps_per_epoch, config), accelerator
                )
                if state.total_steps < planned:
                    progress.total = state.total_steps
                    say(
                        f"time budget: at {state.tokens_per_second:,.0f} tokens/s {state.total_steps} of {planned} "
                        "steps fit, validation and prediction included"
                    )
            validate = state.step in validation_steps(config, steps_per_epoch, state.total_steps)
            if state.step % 10 == 0 or validate:
                pace = f"{state.tokens_per_second:,.0f} tokens/s"
                progress.set_postfix_str(f"loss {state.train_log_loss:.4f}, {pace}", refresh=False)
            if validate:
                state.elapsed = elapsed_before + time.perf_counter() - started
                embeddings, valid_tokens = embed_unique_sides(model, valid, accelerator, pad_id)
                record = _validate(model, valid, embeddings, accelerator, state) | {
                    "epoch": state.step / steps_per_epoch,
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "gradient_norm": norm if math.isfinite(norm) else None,
                }
                state.records.append(record)
                _keep_best(model, state, len(valid))
                say(
                    f"{label}: step {state.step}/{state.total_steps}  train {record['train_log_loss']:.4f}  "
                    f"valid log loss {record['valid_log_loss']:.4f}  accuracy {record['valid_accuracy']:.3f}"
                )
                reason = why_dead(record, prior_log_loss, session.structure_log_loss)
                record["collapsed"] = bool(reason) and state.step * config.batch_size >= config.collapse_after_rows
                if record["collapsed"]:
                    message = (
                        f"{label}: the encoder has collapsed after {state.step * config.batch_size:,} rows: {reason}"
                    )
                    say(message)
                    if config.on_collapse != "warn":
                        raise Collapsed(message, record)
            due = time.perf_counter() - saved >= 60 * config.save_every_minutes
            if session.state_folder and accelerator.is_main_process and (validate or due or stopping):
                state.elapsed = elapsed_before + time.perf_counter() - started
                save_state(session.state_folder, state, model, optimizer, accelerator)
                saved = time.perf_counter()
            if stopping:
                raise Stopped(f"{label}: stopped at step {state.step}")
    if valid_tokens is None:  # resumed at its very end: this session validated nothing
        _, valid_tokens = embed_unique_sides(model, valid, accelerator, pad_id)
    if config.gradient_checkpointing:
        set_gradient_checkpointing(model.encoder, False)
    chosen = len(state.records) - 1
    if state.best_weights is not None:
        chosen = state.best
        model.load_state_dict(state.best_weights)
    return FitResult(
        pd.DataFrame(state.records), np.stack(state.valid_probs), chosen, state.tokens, valid_tokens, state.step_seconds
    )


def epoch_examples(train: Examples, config: RunConfig, epoch: int) -> Examples:
    """The rows as an epoch trains on them: a cross-encoder's in one order of A and B, half the tokens of both."""
    return train.in_random_order(config.seed, epoch) if config.architecture == "cross" else train


def fit_head(model: PreferenceModel, train: Examples, config: RunConfig, accelerator: Accelerator, pad_id: int) -> None:
    """Train the head alone for two epochs on frozen embeddings of at most `head_only_rows` rows.

    The embeddings are computed once. So the encoder's first gradients come through a head that already means
    something (Kumar et al. 2022, https://arxiv.org/abs/2202.10054).
    """
    rows = np.random.default_rng(config.seed).permutation(len(train))[: config.head_only_rows]
    some = train.take(np.sort(rows))
    embeddings, _ = embed_unique_sides(model, some, accelerator, pad_id, "head only")
    optimizer = torch.optim.AdamW(
        [group for group in parameter_groups(model, config) if group["params"][0] in set(model.head.parameters())]
    )
    model.head.train()
    steps_per_epoch = math.ceil(len(some) / config.batch_size)
    total_steps = 2 * steps_per_epoch
    for step in range(total_steps):
        epoch, position = divmod(step, steps_per_epoch)
        order = np.random.default_rng([config.seed, epoch]).permutation(len(some))
        batch = order[position * config.batch_size : (position + 1) * config.batch_size]
        set_learning_rate(optimizer, learning_rate_factor(step, total_steps, 0.1))
        outputs = head_outputs(model, some, batch, embeddings, accelerator.device)
        (training_loss(outputs, some, batch, config.label_smoothing) / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.head.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def _validate(
    model: PreferenceModel, valid: Examples, embeddings: torch.Tensor, accelerator: Accelerator, state: TrainingState
) -> dict:
    """What a validation measures; its predictions are kept in `state`.

    A dead encoder behind live structure features looks alive. So the rows are predicted once more with the features
    at their mean (zero, once standardised): `encoder_log_loss` is that prediction's, `encoder_spread` its standard
    deviation over the rows, averaged over the classes.

    Raises:
        UserError: no step since the last validation had a finite gradient, or the predictions are not finite.
    """
    probs = encoder_probs = predict_from_embeddings(model, embeddings, valid, accelerator)
    if valid.features is not None:
        at_mean = replace(valid, features=np.zeros_like(valid.features))
        encoder_probs = predict_from_embeddings(model, embeddings, at_mean, accelerator)
    if state.loss_rows == 0 or not np.isfinite(probs).all():
        raise UserError(
            f"training: at step {state.step} loss or predictions are not finite ({state.skipped_steps} steps were left "
            "out). Set learning_rate lower, or mixed_precision=no."
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
    }
    state.valid_probs.append(probs)
    state.loss_sum, state.loss_rows = 0.0, 0
    return record


def _keep_best(model: PreferenceModel, state: TrainingState, valid_rows: int) -> None:
    """Keep the weights of the last validation where it is the best so far, and there are rows enough to tell."""
    losses = [record["valid_log_loss"] for record in state.records]
    if valid_rows >= MIN_ROWS_TO_SELECT and losses[-1] <= min(losses):
        state.best = len(losses) - 1
        state.best_weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _prior(labels: np.ndarray, rows: int) -> np.ndarray:
    """The class shares of `labels` as a prediction (rows, 3)."""
    return np.tile(np.bincount(labels, minlength=NUM_CLASSES) / len(labels), (rows, 1))


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
