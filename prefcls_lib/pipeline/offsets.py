"""The baseline that each fold's network starts from: fitted before the networks, kept until the run is complete.

checkpoint/baseline-fold0/   inner0/ ... inner4/   the inner models; the network's folder gets a copy of them
                             offsets.npz           offsets of the fold's training rows (extra rows last) and of its
                                                   validation rows, an ensemble's members' of the latter; seconds
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import softmax

from prefcls_lib.baselines.columns import BaselineInputs, read_inputs
from prefcls_lib.baselines.estimators import ENSEMBLE, MEMBERS
from prefcls_lib.baselines.out_of_fold import BaselineMean, fit_out_of_fold
from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.data.splits import without_shared_prompts
from prefcls_lib.pipeline.cross_validation import OutOfSample
from prefcls_lib.pipeline.job import Job
from prefcls_lib.runtime.devices import process_state
from prefcls_lib.runtime.files import UserError, write_whole

SECONDS_BETWEEN_LOOKS = 2


@dataclass(frozen=True)
class FoldOffset:
    """The starting point of a fold's network: the baseline, and the offsets (N, 3) of the fold's rows."""

    baseline: BaselineMean
    train: np.ndarray
    valid: np.ndarray
    members: dict[str, np.ndarray]  # offsets of the validation rows by each member of an ensemble
    seconds: float

    def file_shifts(self, labels: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """(K,) the baseline's tie shift of each extra file."""
        return self.baseline.file_shifts(labels, sources)


def fold_offset(job: Job, fold: int) -> FoldOffset | None:
    """The fold's starting point; None with start_from=none. The run's first process fits it, all others wait for it.

    Raises:
        UserError: what an earlier session left is broken.
    """
    if job.config.start_from == "none":
        return None
    folder = _folder(job, fold)
    if process_state().is_main_process:  # for all folds of the run at once, so that their rows are read once
        left = [one for one in {*job.config.folds, fold} if not _folder(job, one).is_dir()]
        inputs = left and read_inputs(job.rows, job.features)
        for one in left:
            _fit(job, inputs, one)
    while not folder.is_dir():  # minutes at the competition's size: a collective would run into its time limit
        time.sleep(SECONDS_BETWEEN_LOOKS)
    try:
        with np.load(folder / "offsets.npz", allow_pickle=False) as arrays:
            members = {name: arrays[name] for name in MEMBERS if name in arrays}
            baseline, seconds = BaselineMean.load(folder), float(arrays["seconds"])
            return FoldOffset(baseline, arrays["train"], arrays["valid"], members, seconds)
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"{folder}: cannot be read ({error}). Delete it, and the baseline is fitted again.") from error


def read_out_of_sample_baselines(job: Job) -> dict[str, OutOfSample]:
    """The starting baseline on the rows of its folds, as `cross_validate` gives the others.

    Of an ensemble its members, too; `seconds` is that of the ensemble.
    """
    starts = {fold: fold_offset(job, fold) for fold in job.config.folds}
    seconds, found = sum(start.seconds for start in starts.values()), {}
    for name in (*next(iter(starts.values())).members, job.config.start_from):
        probs, models = np.full((len(job.rows), NUM_CLASSES), np.nan), []
        for fold, start in starts.items():
            probs[job.folds == fold] = softmax(start.members.get(name, start.valid), axis=1)
            models.append(start.baseline.member(name) if name in start.members else start.baseline)
        found[name] = OutOfSample(probs, tuple(models), seconds)
    return found


def extra_rows(job: Job, fold: int) -> pd.DataFrame | None:
    """The extra rows that a fold trains on: those that share no prompt with its validation rows; None without any."""
    if job.extra_rows is None:
        return None
    return job.extra_rows.iloc[without_shared_prompts(job.extra_rows, job.rows, job.folds, fold)]


def _folder(job: Job, fold: int) -> Path:
    return job.folder / "checkpoint" / f"baseline-fold{fold}"


def _fit(job: Job, inputs: BaselineInputs, fold: int) -> None:
    started, name = time.perf_counter(), job.config.start_from
    is_train, more = job.folds != fold, extra_rows(job, fold)
    rows, train = job.rows[is_train], inputs.take(np.flatnonzero(is_train))
    if more is not None:
        rows, train = pd.concat([rows, more]), train.joined(read_inputs(more))
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy()
    baseline, offsets = fit_out_of_fold(name, train, labels, groups, job.config.fold_seed, f"fold{fold}: {name}")
    valid_inputs = inputs.take(np.flatnonzero(~is_train))
    members = {one: baseline.member(one).predict(valid_inputs) for one in MEMBERS if name == ENSEMBLE}
    valid = np.mean(list(members.values()), axis=0) if members else baseline.predict(valid_inputs)

    def write(temporary: Path) -> None:
        temporary.mkdir()
        baseline.save(temporary)
        seconds = time.perf_counter() - started
        np.savez(temporary / "offsets.npz", train=offsets, valid=valid, **members, seconds=seconds)

    write_whole(_folder(job, fold), write)
