"""The models of a run: each trained, its predictions made, and saved in a folder of its own."""

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
from prefcls_lib.data.batching import Examples, TokenCount
from prefcls_lib.data.features import FeatureScaler
from prefcls_lib.data.schema import ID, LABEL_COLUMNS, class_shares
from prefcls_lib.evaluation import compare, scores, slices
from prefcls_lib.evaluation.calibration import fit_calibration_on
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import predict_proba, score_differences
from prefcls_lib.models.saved import build_model, save_model
from prefcls_lib.pipeline.fold_baseline import load_fold_baseline
from prefcls_lib.pipeline.folder import FoldModel, hash_files, prediction_table, write_table
from prefcls_lib.pipeline.prepared import PreparedRows, TrainingData
from prefcls_lib.runtime import trackers
from prefcls_lib.runtime.devices import choose_precision, make_accelerator, process_state, seed_everything
from prefcls_lib.runtime.files import write_json, write_whole
from prefcls_lib.training.checkpoint import Session, stop_on_sigterm
from prefcls_lib.training.loop import FitResult, fit
from prefcls_lib.training.validation import MIN_ROWS_TO_SELECT

REWARD_ROWS = 2000  # training rows that a reward model's temperature is fitted on


def train_models(data: TrainingData, models: list[FoldModel]) -> None:
    """Train models one after the other, with an equal share of the time that is left for each."""
    tokens_to_predict = int(data.test.encoded.lengths[np.unique(data.test.encoded.sides)].sum())
    with stop_on_sigterm() as stop:
        for number, fold_model in enumerate(models):
            deadline, now = data.deadline, time.time()
            if deadline is not None:
                deadline = time.perf_counter() + (deadline - now) / (len(models) - number)
            session = Session(data.folder.state_folder(fold_model), deadline, tokens_to_predict, stop)
            _train_model(data, fold_model, session)


def split_rows(data: TrainingData, fold: int) -> tuple[Examples, Examples, Examples, FeatureScaler | None]:
    """Training, validation and test examples of a fold; features standardised on its own training rows.

    Extra rows are trained on, but for those that share a prompt with a validation row.
    """
    rows, start = data.rows, load_fold_baseline(data.folder, fold)
    own, is_valid = rows.files == 0, rows.folds == fold
    is_train = np.isfinite(start.rows[:, 0]) & ~is_valid
    scaler = FeatureScaler.fit(rows.features[own & is_train]) if data.config.structure_features else None
    on_baseline = data.config.start_from != "none"
    everything = _make_examples(rows, scaler, start.rows if on_baseline else None)
    train, valid = everything.take(is_train), everything.take(is_valid)
    test = replace(_make_examples(data.test, scaler, start.test if on_baseline else None), labels=None)
    if not own.all():
        files = rows.files[is_train]
        of_files = (start.baseline.file_shifts if on_baseline else tie_shares_shift)(train.labels, files)
        train = replace(train, tie_shifts=tie_shifts(files, of_files).astype(np.float32))
    return train, valid, test, scaler


def _make_examples(rows: PreparedRows, scaler: FeatureScaler | None, offsets: np.ndarray | None) -> Examples:
    """Rows as the model sees them."""
    features = None if scaler is None else scaler.transform(rows.features).astype(np.float32)
    offsets = None if offsets is None else offsets.astype(np.float32)
    return Examples(rows.encoded.token_ids, rows.encoded.sides, features, rows.labels, offsets)


def new_model(data: TrainingData, train: Examples, accelerator: Accelerator) -> PreferenceModel:
    """The pretrained encoder, on the device, with a head that predicts the class shares of the training rows.

    On a baseline it predicts what the baseline does. A reward model's score is added to either, with the temperature
    and the tie bias that suit the training rows best.
    """
    model = build_model(data.backbone.path, data.config).to(accelerator.device)
    model.head.start_at_prior(tuple(class_shares(train.labels[train.own])))
    if model.head.skip is not None:
        chosen = np.random.default_rng(data.config.seed).permutation(train.own)[:REWARD_ROWS]
        start_at_scores(model, train.take(np.sort(chosen)), accelerator, data.backbone.tokenizer.pad_id)
    return model


def start_at_scores(model: PreferenceModel, train: Examples, accelerator: Accelerator, pad_id: int) -> None:
    """Divide the score of a reward model by the temperature that suits `train` best, and set the bias of a tie."""
    differences = score_differences(model, train, accelerator, pad_id)
    with torch.no_grad():
        logits = np.stack([differences / 2, -differences / 2, 0 * differences], axis=1)
        last, offsets = model.head.output, np.zeros_like(logits)
        if train.offsets is not None:
            last, offsets = model.head.correction, train.offsets
        fitted = fit_calibration_on(offsets, logits, train.labels)
        model.head.skip.weight /= fitted.temperature
        if accelerator.is_main_process:
            print(f"reward model: temperature {fitted.temperature:.3f} on {len(train):,} training rows", flush=True)
        last.bias.copy_(torch.tensor([0.0, 0.0, fitted.tie_bias]))


def _train_model(data: TrainingData, fold_model: FoldModel, session: Session) -> None:
    """Train one model of the run, predict, and save it with its tables in its folder."""
    started, fold, state = time.perf_counter(), fold_model.fold, process_state()
    config = replace(data.config, seed=data.config.seed + fold_model.seed_index)
    train, valid, test, scaler = split_rows(data, fold)
    seed_everything(config.seed + fold)
    accelerator = make_accelerator(
        config.mixed_precision, trackers.find_trackers(config.report_to), data.folder / "logs"
    )
    trackers.begin(accelerator, config.to_dict(), f"{data.folder.path.name}-{fold_model.name}")
    pad_id = data.backbone.tokenizer.pad_id
    model = new_model(data, train, accelerator)
    before_training = time.time() - data.started_at
    fitted = fit(model, train, valid, config, accelerator, pad_id, fold_model.name, session)
    test_probs, test_tokens = predict_proba(model, test, accelerator, pad_id, f"{fold_model.name}: test")
    if state.is_main_process:
        times = {"seconds_before_training": before_training, "seconds": time.perf_counter() - started}
        record = _describe_model(data, config, fold_model, fitted, test_tokens, times)
        trackers.log(accelerator, {f"result/{name}": value for name, value in record.items()})
        on_baseline = config.start_from != "none"
        baseline = load_fold_baseline(data.folder, fold).baseline if on_baseline else None

        def write(folder: Path) -> None:
            save_model(folder, model, data.backbone, scaler, data.config, baseline)
            _write_tables(folder, data, record, fitted, test_probs)

        write_whole(data.folder.model_folder(fold_model), write)
        shutil.rmtree(session.folder, ignore_errors=True)
    trackers.end(accelerator)
    state.wait_for_everyone()


def _describe_model(
    data: TrainingData,
    config: RunConfig,
    fold_model: FoldModel,
    fitted: FitResult,
    test_tokens: TokenCount,
    times: dict[str, float],
) -> dict:
    """The content of fold.json; `config` has the seed of this model."""
    labels, last = data.rows.labels[data.rows.folds == fold_model.fold], fitted.history.iloc[-1]
    predicted = fitted.valid_tokens + test_tokens
    return {
        "fold": fold_model.fold,
        "seed": config.seed,
        "valid_rows": len(labels),
        "log_loss": scores.log_loss(labels, _out_of_sample(data, fold_model.fold, fitted)),
        "flip_rate": slices.flip_rate(fitted.valid_probs[fitted.chosen], fitted.swapped_probs),
        "best_epoch": float(fitted.history["epoch"][fitted.chosen]),
        "encoder_log_loss": float(fitted.history["encoder_log_loss"][fitted.chosen]),
        "encoder_warning": fitted.encoder_warning,
        "steps": int(last["step"]),
        "planned_steps": fitted.planned_steps,
        "skipped_steps": int(last["skipped_steps"]),
        "mixed_precision": choose_precision(config.mixed_precision, process_state().device),
        "tokens": [fitted.tokens.real, fitted.tokens.computed],
        "predicted_tokens": [predicted.real, predicted.computed],
        "step_seconds": fitted.step_seconds,
        **times,
        "seconds": max(times["seconds"], float(last["seconds"])),  # of all sessions
        "finished_at": time.time(),
    }


def _out_of_sample(data: TrainingData, fold: int, fitted: FitResult) -> np.ndarray:
    """(N, 3) of the fold's rows, each predicted at the validation step that is best on other rows."""
    is_valid = data.rows.folds == fold
    if is_valid.sum() < MIN_ROWS_TO_SELECT:
        return fitted.valid_probs[fitted.chosen]
    labels, groups = data.rows.labels[is_valid], data.rows.groups[is_valid]
    return compare.choose_cross_fitted(fitted.valid_probs, labels, groups)[0]


def _write_tables(folder: Path, data: TrainingData, record: dict, fitted: FitResult, test_probs: np.ndarray) -> None:
    rows, fold = data.rows, record["fold"]
    is_valid = rows.folds == fold
    valid = pd.DataFrame({ID: rows.ids[is_valid], "label": rows.labels[is_valid], "group": rows.groups[is_valid]})
    write_table(folder / "history.csv", fitted.history.assign(fold=fold, seed=record["seed"]))
    write_table(folder / "oof.csv", prediction_table(valid, fold, _out_of_sample(data, fold, fitted)))
    probs = dict(zip(LABEL_COLUMNS, test_probs.T, strict=True))
    write_table(folder / "test.csv", pd.DataFrame({ID: data.test.ids, **probs}))
    write_json(folder / "fold.json", record | {"sha256": hash_files(folder)})
