"""The baseline of each fold: what the fold's network starts from and is compared with, fitted once for a run.

checkpoint/baseline-fold0/   baseline.json ...            its models; the network's model folder gets a copy of them
                             rows.npy test.npy            (N, 3) its offsets: of a training row by the models that were
                                                          fitted without it, of other rows by all
                             oof.csv                      predictions of the fold's rows by this and simpler baselines
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import softmax

from prefcls_lib.baselines.columns import BaselineInputs, read_inputs
from prefcls_lib.baselines.out_of_fold import BaselineMean, fit_out_of_fold, fit_simple
from prefcls_lib.data.schema import ID, LABEL_COLUMNS, NUM_CLASSES
from prefcls_lib.data.splits import without_shared_prompts
from prefcls_lib.data.submission import write_submission
from prefcls_lib.evaluation.calibration import geometric_mean
from prefcls_lib.pipeline.folder import FoldModel, RunFolder, hash_files, prediction_table, read_table, write_table
from prefcls_lib.pipeline.job import Job
from prefcls_lib.runtime.files import reading, write_json, write_whole


@dataclass(frozen=True)
class FoldBaseline:
    """A fold's baseline, and its offsets of the rows (N, 3), extra rows last, and of the test rows.

    Those of extra rows that the fold leaves out are NaN.
    """

    baseline: BaselineMean
    rows: np.ndarray
    test: np.ndarray


def fit_baselines(job: Job) -> pd.DataFrame:
    """Fit the baseline of each fold of the run, but for those that an earlier session has fitted.

    Where the run folder holds only the prior's submission, the baseline's takes its place.

    Returns:
        Out-of-sample predictions of each validated row by each baseline, as they are written to oof_baselines.csv: id,
        fold, label, group, three probabilities, the baseline's name, and the seconds in which the fold's were fitted.
    """
    left = [fold for fold in job.config.folds if not baseline_folder(job.folder, fold).is_dir()]
    if left:
        inputs, test_inputs = read_inputs(job.all_rows, job.features), read_inputs(job.test_rows, job.test_features)
        for fold in left:
            _fit_fold(job, inputs, test_inputs, fold)
    folders = [baseline_folder(job.folder, fold) for fold in job.config.folds]
    predictions = pd.concat([read_table(folder / "oof.csv") for folder in folders], ignore_index=True)
    write_table(job.folder / "oof_baselines.csv", predictions)
    if job.wrote_prior:
        probs = geometric_mean([softmax(np.load(folder / "test.npy"), axis=1) for folder in folders])
        write_submission(job.folder / "submission.csv", list(job.test_rows[ID]), probs)
    return predictions


def load_fold_baseline(folder: RunFolder, fold: int) -> FoldBaseline:
    """What `fit_baselines` left for a fold."""
    place = baseline_folder(folder, fold)
    with reading(place, "Delete it, and the baseline is fitted again."):
        arrays = [np.load(place / f"{name}.npy", allow_pickle=False) for name in ("rows", "test")]
        return FoldBaseline(BaselineMean.load(place), *arrays)


def baseline_folder(folder: RunFolder, fold: int) -> Path:
    """Where a fold's baseline is kept until the run is complete."""
    return folder / "checkpoint" / f"baseline-fold{fold}"


def _fit_fold(job: Job, inputs: BaselineInputs, test_inputs: BaselineInputs, fold: int) -> None:
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
    probs |= {one: softmax(values, axis=1) for one, values in members.items()}
    probs[name] = softmax(offsets[valid], axis=1)

    def write(temporary: Path) -> None:
        temporary.mkdir()
        baseline.save(temporary)
        np.save(temporary / "rows.npy", offsets)
        np.save(temporary / "test.npy", baseline.predict(test_inputs))
        seconds = time.perf_counter() - started
        tables = [prediction_table(job.rows.iloc[valid], fold, values).assign(model=one, seconds=seconds)
                  for one, values in probs.items()]  # fmt: skip
        write_table(temporary / "oof.csv", pd.concat(tables))

    write_whole(baseline_folder(job.folder, fold), write)


def save_as_models(job: Job) -> None:
    """The baselines of the folds as the models of the run, with the tables of a network's model folder."""
    for fold in job.config.folds:
        place, model = baseline_folder(job.folder, fold), FoldModel(fold)
        predictions = read_table(place / "oof.csv")
        oof = predictions[predictions["model"] == job.baseline_name].drop(columns=["model", "seconds"])
        record = {"fold": fold, "valid_rows": len(oof), "seconds": float(predictions["seconds"].iloc[0])}
        record["finished_at"] = time.time()

        def write(folder: Path, place=place, oof=oof, record=record) -> None:
            BaselineMean.load(place).save(folder)
            write_table(folder / "oof.csv", oof)
            write_table(folder / "history.csv", pd.DataFrame(columns=["fold"]))
            probs = softmax(np.load(place / "test.npy"), axis=1)
            columns = dict(zip(LABEL_COLUMNS, probs.T, strict=True))
            write_table(folder / "test.csv", pd.DataFrame({ID: job.test_rows[ID], **columns}))
            write_json(folder / "fold.json", record | {"sha256": hash_files(folder)})

        write_whole(job.folder.model_folder(model), write)
