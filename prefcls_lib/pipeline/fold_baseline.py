"""The baseline of each fold: what the fold's network starts from and is compared with, fitted once for a run.

checkpoint/baseline-fold0/   baseline.json ...            its models; the network's model folder gets a copy of them
                             rows.npy test.npy            (N, 3) its offsets: of a training row by the models that were
                                                          fitted without it, of other rows by all
                             oof.csv                      predictions of the fold's rows by this and simpler baselines
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import softmax

from prefcls_lib.baselines.columns import BaselineInputs, read_inputs
from prefcls_lib.baselines.out_of_fold import BaselineMean, fit_out_of_fold, fit_simple
from prefcls_lib.data.schema import ID, NUM_CLASSES
from prefcls_lib.data.splits import without_shared_prompts
from prefcls_lib.data.submission import write_submission
from prefcls_lib.evaluation.calibration import geometric_mean
from prefcls_lib.pipeline.folder import (
    FoldModel,
    RunFolder,
    prediction_table,
    read_table,
    write_model_tables,
    write_table,
)
from prefcls_lib.pipeline.job import Job
from prefcls_lib.runtime.files import reading, write_whole


@dataclass(frozen=True)
class FoldBaseline:
    """A fold's baseline; its offsets (N, 3) of the rows, extra rows last (NaN: left out), and of the test rows."""

    baseline: BaselineMean
    rows: np.ndarray
    test: np.ndarray


def fit_baselines(job: Job) -> pd.DataFrame:
    """Fit the baseline of each fold of the run, but for those that an earlier session has fitted.

    Where the run folder holds only the prior's submission, the baseline's takes its place.

    Returns:
        The content of oof_baselines.csv: predictions as in oof.csv, with the baseline's name (`model`) and the seconds
        in which those of the fold were fitted.
    """
    folders = {fold: job.folder.checkpoint(f"baseline-fold{fold}") for fold in job.config.folds}
    if left := {fold: place for fold, place in folders.items() if not place.is_dir()}:
        inputs, test_inputs = read_inputs(job.all_rows), read_inputs(job.test_rows)
        for fold, place in left.items():
            _fit_fold(job, inputs, test_inputs, fold, place)
    predictions = pd.concat([read_table(place / "oof.csv") for place in folders.values()], ignore_index=True)
    write_table(job.folder / "oof_baselines.csv", predictions)
    if job.wrote_prior:
        probs = geometric_mean([softmax(np.load(place / "test.npy"), axis=1) for place in folders.values()])
        write_submission(job.folder / "submission.csv", list(job.test_rows[ID]), probs)
    return predictions


def load_fold_baseline(folder: RunFolder, fold: int) -> FoldBaseline:
    """What `fit_baselines` left for a fold."""
    place = folder.checkpoint(f"baseline-fold{fold}")
    with reading(place, "Delete it, and the baseline is fitted again."):
        arrays = [np.load(place / f"{name}.npy", allow_pickle=False) for name in ("rows", "test")]
        return FoldBaseline(BaselineMean.load(place), *arrays)


def _fit_fold(job: Job, inputs: BaselineInputs, test_inputs: BaselineInputs, fold: int, place: Path) -> None:
    started, name, rows = time.perf_counter(), job.baseline_name, job.all_rows
    train, valid = np.flatnonzero(job.folds != fold), np.flatnonzero(job.folds == fold)
    if job.extra_rows is not None:
        extra = without_shared_prompts(job.extra_rows, job.rows, job.folds, fold)
        left_out = len(job.extra_rows) - len(extra)
        print(f"fold{fold}: {len(extra):,} extra rows; {left_out:,} share a prompt with validation rows", flush=True)
        train = np.append(train, len(job.rows) + extra)
    labels, groups = (rows[column].to_numpy()[train] for column in ("label", "group"))
    train_inputs, valid_inputs = inputs.take(train), inputs.take(valid)
    baseline, fitted = fit_out_of_fold(name, train_inputs, labels, groups, job.config.fold_seed, f"fold{fold}")
    members = {one: baseline.member(one).predict(valid_inputs) for one in sorted(baseline.names)}
    offsets = np.full((len(rows), NUM_CLASSES), np.nan)
    offsets[train], offsets[valid] = fitted, np.mean(list(members.values()), axis=0)
    probs = {one: model.predict_proba(valid_inputs) for one, model in fit_simple(train_inputs, labels).items()}
    probs |= {one: softmax(values, axis=1) for one, values in (members | {name: offsets[valid]}).items()}

    def write(temporary: Path) -> None:
        temporary.mkdir()
        baseline.save(temporary)
        np.save(temporary / "rows.npy", offsets)
        np.save(temporary / "test.npy", baseline.predict(test_inputs))
        predictions = partial(prediction_table, job.rows.iloc[valid], fold)
        oof = pd.concat([predictions(values).assign(model=one) for one, values in probs.items()])
        write_table(temporary / "oof.csv", oof.assign(seconds=time.perf_counter() - started))

    write_whole(place, write)


def save_as_models(job: Job) -> None:
    """The baselines of the folds as the models of the run, with the tables of a network's model folder."""
    for fold in job.config.folds:
        start = load_fold_baseline(job.folder, fold)
        predictions = read_table(job.folder.checkpoint(f"baseline-fold{fold}") / "oof.csv")
        oof = predictions[predictions["model"] == job.baseline_name].drop(columns=["model", "seconds"])
        record = {"fold": fold, "valid_rows": len(oof), "seconds": float(predictions["seconds"].iloc[0])}
        tables = (record, pd.DataFrame(columns=["fold"]), oof, job.test_rows[ID])

        def write(folder: Path, start=start, tables=tables) -> None:
            start.baseline.save(folder)
            write_model_tables(folder, *tables, softmax(start.test, axis=1))

        write_whole(job.folder.model_folder(FoldModel(fold)), write)
