"""The models of a run: each trained, out-of-sample predictions made, and saved in a folder of its own."""

import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator

from prefcls_lib.baselines.columns import tie_shares_shift, tie_shifts
from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.features import FeatureScaler, compute_features
from prefcls_lib.data.schema import NUM_CLASSES, SOURCE, class_shares
from prefcls_lib.data.tokenization import EncodedRows
from prefcls_lib.evaluation import compare, scores, slices
from prefcls_lib.evaluation.calibration import fit_calibration_on
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import score_margins
from prefcls_lib.models.saved import build_model, save_model
from prefcls_lib.pipeline.folder import FoldModel, fold_models, prediction_table, write_table
from prefcls_lib.pipeline.job import Job
from prefcls_lib.pipeline.offsets import extra_rows, fold_offset
from prefcls_lib.runtime.devices import choose_precision, make_accelerator, process_state, seed_everything
from prefcls_lib.runtime.files import UserError, read_json, write_json, write_whole
from prefcls_lib.training.collapse import Collapsed
from prefcls_lib.training.loop import MIN_ROWS_TO_SELECT, fit
from prefcls_lib.training.state import FitResult, Session, stop_on_sigterm

MAX_RESTARTS = 2  # after a collapse
REWARD_ROWS = 2000  # training rows that a reward model's temperature is fitted on
FINISH_SECONDS = 10  # of a time budget, for loading and saving after the last model


def fit_here(job: Job, encoded: EncodedRows, left: list[FoldModel], side_by_side: int = 1) -> None:
    """Train models one after the other in this process.

    `side_by_side`: processes that train models at the same time, and will share the prediction of the test rows.
    """
    side_tokens = encoded.lengths[encoded.sides].mean()
    tokens_to_predict = int(2 * side_tokens * len(job.test_rows) * len(fold_models(job.config))) // side_by_side
    with stop_on_sigterm() as stop:
        for number, fold_model in enumerate(left):
            deadline = job.deadline
            if deadline is not None:  # an equal share of what is left for each, after loading and saving
                now = time.perf_counter()
                deadline = now + (deadline - FINISH_SECONDS - now) / (len(left) - number)
            session = Session(job.folder.state_folder(fold_model), deadline, tokens_to_predict, stop)
            _fit_model(job, encoded, fold_model, session)


def split_rows(job: Job, encoded: EncodedRows, fold: int) -> tuple[Examples, Examples, FeatureScaler | None]:
    """Training and validation examples of a fold; features standardised on the training rows.

    Extra rows are trained on, but for those that share a prompt with a validation row.
    """
    is_train = job.folds != fold
    scaler = FeatureScaler.fit(job.features[is_train]) if job.config.structure_features else None
    everything = _make_examples(job, job.rows, encoded, scaler and scaler.transform(job.features))
    train, valid = everything.take(is_train), everything.take(~is_train)
    rows, start = extra_rows(job, fold), fold_offset(job, fold)
    if rows is not None:
        left_out = len(job.extra_rows) - len(rows)
        if process_state().is_main_process:
            print(f"fold{fold}: {len(rows):,} extra rows; {left_out:,} share a prompt with validation rows", flush=True)
        features = scaler and scaler.transform(compute_features(rows))
        own, train = len(train), train.joined(_make_examples(job, rows, job.encode(rows), features))
        sources = np.append(np.zeros(own, dtype=np.int64), rows[SOURCE])
        of_files = (start.file_shifts if start else tie_shares_shift)(train.labels, sources)
        train = replace(train, tie_shifts=tie_shifts(sources, of_files).astype(np.float32))
    if start is not None:
        train = replace(train, offsets=start.train.astype(np.float32))
        valid = replace(valid, offsets=start.valid.astype(np.float32))
    return train, valid, scaler


def _make_examples(job: Job, rows: pd.DataFrame, encoded: EncodedRows, features: np.ndarray | None) -> Examples:
    """Rows as the model sees them; with targets where extra rows shift the tie."""
    labels = rows["label"].to_numpy()
    features = None if features is None else features.astype(np.float32)
    examples = Examples(encoded.token_ids, encoded.sides, features, labels)
    if job.extra_rows is None:
        return examples
    return replace(examples, targets=np.eye(NUM_CLASSES, dtype=np.float32)[labels])


def new_model(job: Job, train: Examples, accelerator: Accelerator) -> PreferenceModel:
    """The pretrained encoder, on the device, with a head that predicts the class shares of the training rows.

    On a baseline it predicts what the baseline does. A reward model's score is added to either, with the temperature
    and the tie bias that suit the training rows best.
    """
    model = build_model(job.backbone.path, job.config).to(accelerator.device)
    model.head.start_at_prior(tuple(class_shares(train.labels[train.own])))
    if model.head.skip is not None:
        chosen = np.random.default_rng(job.config.seed).permutation(train.own)[:REWARD_ROWS]
        start_at_scores(model, train.take(np.sort(chosen)), accelerator, job.backbone.tokenizer.pad_id)
    return model


def start_at_scores(model: PreferenceModel, train: Examples, accelerator: Accelerator, pad_id: int) -> None:
    """Divide the score of a reward model by the temperature that suits `train` best, and set the bias of a tie."""
    margins, _ = score_margins(model, train, accelerator, pad_id, "scores")
    with torch.no_grad():
        scores = np.stack([margins / 2, -margins / 2, 0 * margins], axis=1)
        last, offsets = model.head.output, np.zeros_like(scores)
        if train.offsets is not None:
            last, offsets = model.head.correction, train.offsets
        fitted = fit_calibration_on(offsets, scores, train.labels)
        model.head.skip.weight /= fitted.temperature
        if accelerator.is_main_process:
            print(f"reward model: temperature {fitted.temperature:.3f} on {len(train):,} training rows", flush=True)
        last.bias.copy_(torch.tensor([0.0, 0.0, fitted.tie_bias]))


def _fit_model(job: Job, encoded: EncodedRows, fold_model: FoldModel, session: Session) -> None:
    """Train one model of the run and save it with its tables in its folder."""
    started, fold, state = time.perf_counter(), fold_model.fold, process_state()
    train, valid, scaler = split_rows(job, encoded, fold)
    model, fitted, attempt, collapsed = _fit_until_healthy(job, train, valid, fold_model, session)
    if not state.is_main_process:
        state.wait_for_everyone()
        return
    rows, start = job.rows[job.folds == fold], fold_offset(job, fold)
    saved = cross_fitted = fitted.valid_probs[fitted.chosen]
    if len(rows) >= MIN_ROWS_TO_SELECT:
        cross_fitted, _ = compare.choose_cross_fitted(fitted.valid_probs, valid.labels, rows["group"].to_numpy())
    record = {
        "fold": fold,
        "seed": attempt.seed,
        "valid_rows": len(rows),
        "log_loss": scores.log_loss(valid.labels, cross_fitted),
        "train_rows": len(train),
        "flip_rate": slices.flip_rate(saved, fitted.swapped_probs),
        "best_epoch": float(fitted.history["epoch"][fitted.chosen]),
        "tokens": [fitted.tokens.real, fitted.tokens.computed],
        "valid_tokens": [fitted.valid_tokens.real, fitted.valid_tokens.computed],
        "step_seconds": fitted.step_seconds,
        "steps": int(fitted.history["step"].iloc[-1]),
        "planned_steps": math.ceil(len(train) / attempt.batch_size) * attempt.num_epochs,
        "collapsed": collapsed,
        "encoder_log_loss": float(fitted.history["encoder_log_loss"][fitted.chosen]),
        "encoder_warning": fitted.encoder_warning,
        "skipped_steps": int(fitted.history["skipped_steps"].iloc[-1]),
        "mixed_precision": choose_precision(attempt.mixed_precision, state.device),
        "seconds": max(time.perf_counter() - started, float(fitted.history["seconds"].iloc[-1])),  # of all sessions
        "finished_at": time.time(),
    }

    def write(folder: Path) -> None:
        save_model(folder, model, job.backbone, scaler, job.config, start and start.baseline)
        write_table(folder / "history.csv", fitted.history.assign(fold=fold, seed=attempt.seed))
        write_table(folder / "oof.csv", prediction_table(rows, fold, cross_fitted))
        write_table(folder / "valid.csv", prediction_table(rows, fold, saved).assign(group=rows["group"].to_numpy()))
        write_json(folder / "fold.json", record)

    write_whole(job.folder.model_folder(fold_model), write)
    shutil.rmtree(session.state_folder, ignore_errors=True)
    state.wait_for_everyone()


def _fit_until_healthy(
    job: Job, train: Examples, valid: Examples, fold_model: FoldModel, session: Session
) -> tuple[PreferenceModel, FitResult, RunConfig, list[dict]]:
    """Train a model, again with other settings where its encoder has collapsed.

    Every attempt after a collapse has a new seed, half the rate and twice the warm-up.

    Returns:
        The model, what `fit` measured, the settings of the last attempt, and the records of the collapsed ones.
    """
    config, state = job.config, process_state()
    attempts_file = job.folder / "checkpoint" / f"{fold_model.name}-collapsed.json"
    collapsed = read_json(attempts_file)["collapsed"] if attempts_file.exists() else []
    while True:
        tried = len(collapsed)
        attempt = replace(
            config,
            seed=config.seed + fold_model.seed_index + 1000 * tried,
            learning_rate=config.learning_rate / 2**tried,
            warmup_ratio=min(0.5, config.warmup_ratio * 2**tried),
        )
        seed_everything(attempt.seed + fold_model.fold)
        accelerator = make_accelerator(config.mixed_precision)
        model = new_model(job, train, accelerator)
        try:
            pad_id = job.backbone.tokenizer.pad_id
            fitted = fit(model, train, valid, attempt, accelerator, pad_id, fold_model.name, session)
            return model, fitted, attempt, collapsed
        except Collapsed as error:
            collapsed.append(error.record)
            del model  # weights and optimizer state are freed before the next attempt
            if state.is_main_process:
                shutil.rmtree(session.state_folder, ignore_errors=True)
                write_json(attempts_file, {"collapsed": collapsed})
            state.wait_for_everyone()
            if config.on_collapse == "stop" or len(collapsed) > MAX_RESTARTS:
                raise UserError(
                    f"{fold_model.name}: {error}. Set learning_rate lower or warmup_ratio higher; the baseline's "
                    "submission is in place."
                ) from None
            if state.is_main_process:
                tries = f"restart {len(collapsed)} of {MAX_RESTARTS}"
                print(f"{fold_model.name}: {tries}, half the rate, twice the warm-up", flush=True)
