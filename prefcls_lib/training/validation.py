"""What happens at a validation: scores, the best weights so far, and whether the encoder contributes anything."""

import math

import numpy as np
from accelerate import Accelerator
from scipy.special import softmax

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.schema import class_shares
from prefcls_lib.evaluation import scores
from prefcls_lib.evaluation.slices import flip_rate
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import embed_unique_sides, predict_from_embeddings
from prefcls_lib.runtime.devices import track
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training.checkpoint import Log, TrainingState
from prefcls_lib.training.step import within_memory

MIN_ROWS_TO_SELECT = 2000  # with fewer validation rows the best step is noise: the last weights are kept
COLLAPSE_AFTER_ROWS = 10_000  # rows after the warm-up before an encoder is judged: DeBERTa-v3 may start slowly
COLLAPSED_SPREAD = 0.01  # a healthy encoder's predictions differ by more than this from row to row
USEFUL_GAIN = 0.001  # log loss below a baseline's that is more than rounding
ADVICE = "Set learning_rate to half its value and warmup_ratio to twice its value, or train on more rows."


def validate(
    model: PreferenceModel, valid: Examples, state: TrainingState, place: dict, accelerator: Accelerator, log: Log
) -> None:
    """Score the validation rows, and keep the weights where they are the best so far.

    A good baseline hides an encoder that contributes nothing. So the rows are predicted once more by the auxiliary
    output, which knows no baseline: `encoder_log_loss` is that prediction's, `encoder_spread` its standard deviation
    over the rows, averaged over the classes. `place`, where training is, has the first values of the record.
    """
    embeddings, state.valid_tokens = within_memory(lambda: embed_unique_sides(model, valid, accelerator), state, log)
    asked, device = ((valid, False), (valid, True), (valid.swapped(), False)), accelerator.device
    predictions = [predict_from_embeddings(model, embeddings, rows, device, auxiliary) for rows, auxiliary in asked]
    probs, encoder_probs, swapped_probs = predictions
    if not np.isfinite(probs).all():
        what = f"at step {state.step} the predictions are not finite ({state.skipped_steps} steps were left out)"
        raise UserError(f"training: {what}. Set learning_rate lower, or mixed_precision=no.")
    record = place | {
        "train_log_loss": state.train_log_loss,
        "valid_log_loss": scores.log_loss(valid.labels, probs),
        "valid_accuracy": scores.accuracy(valid.labels, probs),
        "flip_rate": flip_rate(probs, swapped_probs),
        "encoder_log_loss": scores.log_loss(valid.labels, encoder_probs),
        "encoder_spread": float(encoder_probs.std(axis=0).mean()),
        "tokens_per_second": state.tokens_per_second,
        "skipped_steps": state.skipped_steps,
    }
    state.loss_sum, state.loss_rows = 0.0, 0
    state.records.append(record)
    state.valid_probs.append(probs)
    selects = len(valid) >= MIN_ROWS_TO_SELECT
    if not selects or record["valid_log_loss"] <= min(r["valid_log_loss"] for r in state.records):
        state.chosen = len(state.records) - 1
        state.best_weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()} if selects else None
    track(accelerator, record, step=state.step)
    log(
        f"step {state.step}  train {record['train_log_loss'] or math.nan:.4f}  valid log loss "
        f"{record['valid_log_loss']:.4f}  accuracy {record['valid_accuracy']:.3f}"
    )


def why_collapsed(record: dict, train: Examples, valid: Examples) -> str:
    """Why the encoder of a validation with this record counts as collapsed, "" where it may be healthy.

    It is, if its own predictions are nearly the same for every row; or if they are no better than the prior and the
    whole network is no better than the baseline that it starts from.
    """
    spread, alone, whole = record["encoder_spread"], record["encoder_log_loss"], record["valid_log_loss"]
    if spread < COLLAPSED_SPREAD:
        return f"its own predictions differ by {spread:.4f} from row to row, which is less than {COLLAPSED_SPREAD}"
    if valid.offsets is None:
        return ""
    prior = scores.log_loss(valid.labels, np.tile(class_shares(train.labels[train.own]), (len(valid), 1)))
    baseline = scores.log_loss(valid.labels, softmax(valid.offsets.astype(float), axis=1))
    if max(prior - alone, baseline - whole) > USEFUL_GAIN:
        return ""
    return (
        f"by itself its log loss is {alone:.4f} (the prior's {prior:.4f}), and the network's is {whole:.4f} "
        f"(its baseline's {baseline:.4f}); at least one must be better by more than {USEFUL_GAIN}"
    )


def judge_encoder(state: TrainingState, reason: str, train_rows: int, config: RunConfig, log: Log) -> None:
    """Log and keep why an encoder contributes nothing, if there is a `reason`; count the validations in a row at which
    it is judged and collapsed. `train_rows`: those of an epoch."""
    rows = round(state.records[-1]["epoch"] * train_rows)
    judged = rows >= config.warmup_ratio * config.num_epochs * train_rows + COLLAPSE_AFTER_ROWS
    state.flagged = state.flagged + 1 if reason and judged else 0
    if state.chosen == len(state.records) - 1:
        state.warning = reason
    if reason:
        log(f"the encoder {'has collapsed' if judged else 'does not contribute yet'} after {rows:,} rows: {reason}")
    if state.flagged == 2:
        early = "; training ended early" if state.position < state.planned_steps else ""
        log(f"the encoder had collapsed at two validations in a row{early}. {ADVICE}")
        state.warning = f"{state.warning or 'it collapsed later'}{early}. {ADVICE}"
