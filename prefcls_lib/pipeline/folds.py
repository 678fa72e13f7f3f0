"""The models of a run: each trained, its predictions made, and saved in a folder of its own."""

import math
import shutil
import time
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from prefcls_lib.baselines.columns import tie_shares_shift, tie_shifts
from prefcls_lib.baselines.out_of_fold import BaselineMean
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.schema import ID, SOURCE, class_shares
from prefcls_lib.evaluation import compare, scores
from prefcls_lib.evaluation.calibration import fit_calibration_on
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import predict_proba, score_differences
from prefcls_lib.models.saved import build_model, save_model
from prefcls_lib.pipeline.folder import fold_models, prediction_table, write_model_tables
from prefcls_lib.pipeline.job import TEST, Job, load_baseline
from prefcls_lib.runtime.devices import begin_tracking, make_accelerator
from prefcls_lib.runtime.files import write_whole
from prefcls_lib.training.checkpoint import Session, stop_on_sigterm
from prefcls_lib.training.loop import fit
from prefcls_lib.training.validation import MIN_ROWS_TO_SELECT

REWARD_ROWS = 2000  # training rows that a reward model's temperature is fitted on


def train_models(job: Job, names: list[str]) -> None:
    """Train models one after the other, with an equal share of the time that is left for each."""
    tokens_to_predict = int(job.examples.lengths[job.table["fold"] == TEST].sum())
    end = job.started_at + 3600 * (job.config.time_budget_hours or math.inf)
    with stop_on_sigterm() as stop:
        for number, name in enumerate(names):
            deadline = time.perf_counter() + (end - time.time()) / (len(names) - number)
            _train_model(job, name, Session(job.folder / "checkpoint" / name, deadline, tokens_to_predict, stop))


def split_rows(job: Job, fold: int) -> tuple[Examples, Examples, Examples, BaselineMean | None]:
    """Training, validation and test examples of a fold, and the baseline that they start from.

    Extra rows are trained on, but for those that share a prompt with a validation row.
    """
    baseline, offsets = load_baseline(job.folder, fold)
    labels, folds, sources = (job.table[name].to_numpy() for name in ("label", "fold", SOURCE))
    on_baseline = job.config.start_from != "none"
    examples = replace(job.examples, labels=labels, offsets=offsets.astype(np.float32) if on_baseline else None)
    valid, test = folds == fold, folds == TEST
    is_train = np.isfinite(offsets[:, 0]) & ~valid & ~test
    train = examples.take(is_train)
    if sources.any():
        sources = sources[is_train]
        of_files = (baseline.file_shifts if on_baseline else tie_shares_shift)(train.labels, sources)
        train = replace(train, tie_shifts=tie_shifts(sources, of_files).astype(np.float32))
    return train, examples.take(valid), examples.take(test), baseline if on_baseline else None


def new_model(job: Job, train: Examples, accelerator: Accelerator) -> PreferenceModel:
    """The pretrained encoder, on the device, with a head that predicts the class shares of the training rows.

    On a baseline it predicts what the baseline does. A reward model's score is added to either, with the temperature
    and the tie bias that suit the training rows best.
    """
    model = build_model(job.backbone.path, job.config).to(accelerator.device)
    model.head.start_at_prior(tuple(class_shares(train.labels[train.own])))
    if model.head.skip is not None:
        chosen = np.random.default_rng(job.config.seed).permutation(train.own)[:REWARD_ROWS]
        start_at_scores(model, train.take(np.sort(chosen)), accelerator)
    return model


def start_at_scores(model: PreferenceModel, train: Examples, accelerator: Accelerator) -> None:
    """Divide the score of a reward model by the temperature that suits `train` best, and set the bias of a tie."""
    differences = score_differences(model, train, accelerator)
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


def _train_model(job: Job, name: str, session: Session) -> None:
    """Train one model of the run, predict, and save it with its tables in its folder."""
    started, (fold, seed) = time.perf_counter(), fold_models(job.config)[name]
    config = replace(job.config, seed=seed)
    train, valid, test, baseline = split_rows(job, fold)
    set_seed((seed + fold) % 2**32)
    accelerator = make_accelerator(config.mixed_precision, config.report_to, job.folder / "logs")
    begin_tracking(accelerator, config.to_dict(), f"{job.folder.name}-{name}")
    model = new_model(job, train, accelerator)
    seconds_before = time.time() - job.started_at
    fitted = fit(model, train, valid, config, accelerator, name, session)
    test_probs, test_tokens = predict_proba(model, test, accelerator, f"{name}: test")
    if accelerator.is_main_process:
        rows, probs = job.table[job.table["fold"] == fold], fitted.valid_probs[fitted.chosen]
        predicted = fitted.valid_tokens + test_tokens
        labels, chosen, last = rows["label"].to_numpy(), fitted.history.iloc[fitted.chosen], fitted.history.iloc[-1]
        if len(rows) >= MIN_ROWS_TO_SELECT:  # each row predicted at the validation that is best on other rows
            probs = compare.choose_cross_fitted(fitted.valid_probs, labels, rows["group"].to_numpy())
        record = {
            "fold": fold,
            "seed": seed,
            "seconds_before_training": seconds_before,
            "valid_rows": len(rows),
            "log_loss": scores.log_loss(labels, probs),
            "flip_rate": float(chosen["flip_rate"]),
            "best_epoch": float(chosen["epoch"]),
            "encoder_log_loss": float(chosen["encoder_log_loss"]),
            "encoder_warning": fitted.warning,
            "steps": int(last["step"]),
            "planned_steps": fitted.planned_steps,
            "tokens": [fitted.tokens.real, fitted.tokens.computed],
            "step_seconds": fitted.step_seconds,
            "predicted_tokens": [predicted.real, predicted.computed],
            "seconds": max(time.perf_counter() - started, float(last["seconds"])),  # the latter: of all sessions
        }
        with write_whole(job.folder / "model" / name) as folder:
            save_model(folder, model, job.backbone, job.config, baseline)
            history = fitted.history.assign(fold=fold, seed=seed)
            oof, test = prediction_table(rows, probs), prediction_table(job.test_rows[[ID]], test_probs)
            write_model_tables(folder, record, history=history, oof=oof, test=test)
        shutil.rmtree(session.folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
