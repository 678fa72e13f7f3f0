"""Predict test rows with several finished runs and their blend, within a time budget: what is submitted to Kaggle.

A valid submission is there from the first second, made of the class shares; the runs without an encoder (the ladder)
replace it, then the networks, fold by fold. Where the measured pace says that time is short, less is predicted, in
this order: fewer folds of each network, then fewer networks (the least weight first), then none.
"""

import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.baselines.estimators import load_baseline, predict_rows
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.features import compute_features
from prefcls_lib.data.schema import ID, NUM_CLASSES
from prefcls_lib.data.submission import write_submission
from prefcls_lib.ensemble.blend import fit_runs
from prefcls_lib.evaluation.calibration import Blend, Calibration
from prefcls_lib.models.predict import predict_saved
from prefcls_lib.models.saved import SavedModel, load_model
from prefcls_lib.pipeline.folder import RunFolder, read_table
from prefcls_lib.runtime.files import UserError, read_json, write_json
from prefcls_lib.runtime.kaggle import attached_runs, find_blend, is_competition_rerun
from prefcls_lib.runtime.progress import progress_bar

BLOCK_ROWS = 1024  # rows between two looks at the clock
PILOT_SIDES = 128  # sides, spread over all lengths, that measure the pace of a network
RESERVED = 0.1  # share of the time budget that no plan uses: a pace that slows down


@dataclass(frozen=True)
class Ensemble:
    """Runs that predict together.

    Attributes:
        folders: the runs.
        blend: their weights and the calibration of the whole.
        source: where the weights come from.
    """

    folders: list[RunFolder]
    blend: Blend
    source: str

    def table(self) -> pd.DataFrame:
        """Each run's backbone, out-of-sample log loss, number of folds, and weight."""
        results = [read_json(folder / "result.json") for folder in self.folders]
        lines = [
            {"run": folder.path.name, "backbone": Path(result["backbone"]).name, "log_loss": result["log_loss"],
             "folds": len(folder.model_folders()), "weight": weight}
            for folder, result, weight in zip(self.folders, results, self.blend.weights, strict=True)
        ]  # fmt: skip
        return pd.DataFrame(lines).set_index("run")


def find_ensemble(blend_out: str | Path) -> Ensemble:
    """The attached runs and how to weigh them.

    An attached blend.json decides which runs are used. Without one all attached runs are: weights and calibration are
    fitted on the rows that all predicted out of sample, and written to `blend_out`; where the runs share none (it is
    said), each counts the same.

    Raises:
        UserError: no run is attached, or one that blend.json names is not beside it.
    """
    path = find_blend()
    if path is not None:
        state = read_json(path)
        folders = [path.parent / run for run in state["runs"]]
        return _used_runs(folders, Blend.from_dict(state), str(path))
    folders = attached_runs()
    if not folders:
        raise UserError(
            "no finished run is attached (a folder with result.json, config.json and model/). On Kaggle attach the "
            "output of a training notebook, or the data set prefcls-runs, as an input."
        )
    if len(folders) == 1:
        return _used_runs(folders, Blend((1.0,), Calibration()), "one run")
    try:
        return _used_runs(folders, Blend.from_dict(fit_runs(folders, Path(blend_out))), "fitted here")
    except UserError as error:
        print(f"every run counts the same, since no blend can be fitted: {error}", flush=True)
        equal = Blend((1 / len(folders),) * len(folders), Calibration())
        return _used_runs(folders, equal, "equal weights")


def plan_folds(seconds_per_fold: list[float], folds: list[int], weights: list[float], seconds: float) -> list[int]:
    """How many folds of each network to predict with, to be done within `seconds`.

    All, where time allows; else one fold less of the network with most folds, again and again, while one has several;
    then no fold of the network with the least weight, and so on.
    """
    planned = list(folds)
    while any(planned) and sum(n * s for n, s in zip(planned, seconds_per_fold, strict=True)) > seconds:
        if max(planned) > 1:
            planned[planned.index(max(planned))] -= 1
        else:
            planned[min((i for i, n in enumerate(planned) if n), key=lambda i: weights[i])] = 0
    return planned


def predict_within(ensemble: Ensemble, rows: pd.DataFrame, out: str | Path, time_budget_hours: float) -> dict:
    """Predict `rows` and write the submission `out`, better and better, until done or until time is up.

    In a competition rerun a member that fails is left out with its traceback printed, since no one could mend it;
    anywhere else it stops the notebook.

    Returns:
        What was predicted with what, and how fast; also written beside `out` as submit.json.
    """
    job = _Submission(ensemble, rows, Path(out), 3600 * time_budget_hours * (1 - RESERVED))
    job.write()
    raw = compute_features(rows)
    networks = []
    for index, folder in enumerate(ensemble.folders):
        if (folder.model_folders()[0] / "rung.json").exists():
            with _tolerate_failure(job, index):
                probs = predict_rows([load_baseline(path) for path in folder.model_folders()], rows)
                job.add(index, probs, folds=len(folder.model_folders()))
    for index, folder in enumerate(ensemble.folders):
        if index not in job.sums:
            with _tolerate_failure(job, index):
                networks.append(_Network(index, folder, rows, raw))
    if networks:
        weights = [ensemble.blend.weights[network.index] for network in networks]
        available = [len(network.paths) for network in networks]
        planned = plan_folds([n.seconds_per_fold for n in networks], available, weights, job.seconds_left)
        _predict_networks(job, networks, planned)
    return job.finish(networks)


def record_table(record: dict) -> pd.DataFrame:
    """One line a run of what `predict_within` returned, and what was left out."""
    for line in record["left_out"]:
        print(line)
    print(f"{record['rows']:,} rows in {record['seconds']:.0f} s; weights: {record['weights_from']}")
    return pd.DataFrame(record["runs"]).set_index("run")


class _Submission:
    """The submission so far: the runs' sums of probabilities over folds, and the clock."""

    def __init__(self, ensemble: Ensemble, rows: pd.DataFrame, out: Path, seconds: float):
        self.ensemble, self.rows, self.out = ensemble, rows, out
        self.started = time.perf_counter()
        self.deadline = self.started + seconds
        self.sums: dict[int, np.ndarray] = {}
        self.folds: dict[int, int] = {}
        self.left_out: list[str] = []

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.perf_counter()

    def add(self, index: int, probs: np.ndarray, folds: int = 1) -> None:
        """Count another fold's probabilities (or the mean of several) and write the submission with it."""
        self.sums[index] = self.sums.get(index, 0) + folds * probs
        self.folds[index] = self.folds.get(index, 0) + folds
        self.write()

    def write(self) -> None:
        write_submission(self.out, list(self.rows[ID]), self.blended())

    def blended(self) -> np.ndarray:
        """The blend of what is there; the calibration belongs to the whole blend and is applied to nothing less."""
        if not self.sums:
            labels = read_table(self.ensemble.folders[0] / "oof.csv")["label"]
            shares = (np.bincount(labels, minlength=NUM_CLASSES) + 1) / (len(labels) + NUM_CLASSES)
            return np.tile(shares, (len(self.rows), 1))
        there = sorted(self.sums)
        weights = np.array([self.ensemble.blend.weights[i] for i in there])
        weights = weights / weights.sum() if weights.sum() > 0 else np.full(len(there), 1 / len(there))
        whole = len(there) == len(self.ensemble.folders)
        calibration = self.ensemble.blend.calibration if whole else Calibration()
        return Blend(tuple(weights), calibration).apply([self.sums[i] / self.folds[i] for i in there])

    def finish(self, networks: list["_Network"]) -> dict:
        """Write submit.json: what was predicted with what."""
        pace = {n.index: n for n in networks}
        runs = []
        for index, folder in enumerate(self.ensemble.folders):
            network, available = pace.get(index), len(folder.model_folders())
            if self.folds.get(index, 0) < available:
                self.left_out.append(f"{folder.path.name}: {self.folds.get(index, 0)} of {available} folds were used")
            line = {"run": folder.path.name, "weight": self.ensemble.blend.weights[index], "folds": available}
            line["folds_used"] = self.folds.get(index, 0)
            if network is not None:
                line |= {"tokens_per_fold": network.tokens, "encoder_seconds": network.seconds_used}
                line["planned_seconds_per_fold"] = network.seconds_per_fold
            runs.append(line)
        record = {
            "rows": len(self.rows),
            "seconds": time.perf_counter() - self.started,
            "weights_from": self.ensemble.source,
            "left_out": self.left_out,
            "runs": runs,
        }
        write_json(self.out.parent / "submit.json", record)
        return record


@contextmanager
def _tolerate_failure(job: _Submission, index: int):
    """In a competition rerun a failing member is said and left out; anywhere else its error goes on."""
    try:
        yield
    except Exception as error:
        if not is_competition_rerun():
            raise
        traceback.print_exception(error)
        job.left_out.append(f"{job.ensemble.folders[index].path.name}: failed ({type(error).__name__}: {error})")


class _Network:
    """A run with an encoder, its rows encoded, its pace measured on a few sides of every length."""

    def __init__(self, index: int, folder: RunFolder, rows: pd.DataFrame, raw: np.ndarray):
        self.index, self.rows, self.raw = index, rows, raw
        self.paths = folder.model_folders()
        saved = load_model(self.paths[0])
        self.encoded = saved.encode(rows)
        lengths = self.encoded.lengths
        self.tokens = int(lengths.sum())
        pilot = np.unique(np.linspace(0, len(lengths) - 1, min(PILOT_SIDES, len(lengths))).round().astype(int))
        pilot = pilot[: len(pilot) // 2 * 2] if len(pilot) > 1 else np.repeat(pilot, 2)
        examples = Examples(self.encoded.token_ids, pilot.reshape(-1, 2), self._features(saved, pilot[::2] * 0))
        self._predict(saved, examples)  # the first pass also loads kernels
        seconds, _ = self._predict(saved, examples)
        self.seconds_per_fold = float(seconds * self.tokens / lengths[pilot].sum())
        self.seconds_used = 0.0

    def predict_fold(self, fold: int, deadline: float, bar) -> np.ndarray | None:
        """Probabilities (N, 3) of the rows by one fold; None when `deadline` passed before the end."""
        saved = load_model(self.paths[fold])
        probs = np.empty((len(self.rows), NUM_CLASSES))
        order = np.argsort(self.encoded.lengths[self.encoded.sides].sum(axis=1), kind="stable")[::-1]
        for start in range(0, len(order), BLOCK_ROWS):
            if time.perf_counter() > deadline:
                return None
            block = order[start : start + BLOCK_ROWS]
            seconds, probs[block] = self._predict(saved, saved.make_examples(self.encoded, self.raw, block))
            self.seconds_used += seconds
            bar.update(len(block))
        return probs

    def _features(self, saved: SavedModel, rows: np.ndarray) -> np.ndarray | None:
        return None if saved.scaler is None else saved.scaler.transform(self.raw[rows]).astype(np.float32)

    def _predict(self, saved: SavedModel, examples: Examples) -> tuple[float, np.ndarray]:
        started = time.perf_counter()
        probs, _ = predict_saved(saved, examples)
        return time.perf_counter() - started, probs


def _predict_networks(job: _Submission, networks: list[_Network], planned: list[int]) -> None:
    """First one fold of every planned network, then the second, and so on, while time is left."""
    with progress_bar(sum(planned) * len(job.rows), "predict", "row") as bar:
        for fold in range(max(planned)):
            for network, folds in zip(networks, planned, strict=True):
                if fold < folds:
                    with _tolerate_failure(job, network.index):
                        probs = network.predict_fold(fold, job.deadline, bar)
                        if probs is not None:
                            job.add(network.index, probs)


def _used_runs(folders: list[Path], blend: Blend, source: str) -> Ensemble:
    """The runs without those of weight 0.

    Raises:
        UserError: a folder holds no finished run.
    """
    used = [(RunFolder(folder), weight) for folder, weight in zip(folders, blend.weights, strict=True) if weight > 0]
    for folder, _ in used:
        if not folder.complete:
            raise UserError(
                f"{source}: names {folder.path}, which holds no finished run. Attach the run folders with it."
            )
    return Ensemble([folder for folder, _ in used], Blend(tuple(w for _, w in used), blend.calibration), source)
