"""Predict test rows with several finished runs and their blend, within a time budget: what is submitted to Kaggle.

A valid submission is there from the first second, made of the class shares. The baselines replace it, which take
seconds; then one fold of every network by falling weight, then the next folds: each model makes the submission better.
What is not complete at the deadline is left out.
"""

import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch

from prefcls_lib.data.loading import describe_rows, read_rows, sample_path
from prefcls_lib.data.schema import ID, LABEL_COLUMNS, NUM_CLASSES, class_shares
from prefcls_lib.data.submission import write_submission
from prefcls_lib.ensemble.blend import fit_runs
from prefcls_lib.evaluation.calibration import Blend, Calibration
from prefcls_lib.pipeline.folder import RunFolder, read_table
from prefcls_lib.pipeline.launch import count_processes
from prefcls_lib.pipeline.predict import predict_models
from prefcls_lib.runtime.files import UserError, read_json, write_json
from prefcls_lib.runtime.kaggle import attached_runs, find_blend, is_competition_rerun

RERUN_ROWS = 25_000  # about as many hidden test rows there are
CPU_ROWS = 60  # of the shipped ones, where there is no GPU to predict all
RESERVED = 0.1  # share of the time budget that is kept for the block under way, and for a machine that slows down


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
        """Each run's backbone, out-of-sample log loss, number of models, and weight."""
        results = [read_json(folder / "result.json") for folder in self.folders]
        lines = [
            {"run": folder.path.name, "backbone": Path(result["backbone"]).name, "log_loss": result["log_loss"],
             "folds": len(folder.model_folders()), "weight": weight}
            for folder, result, weight in zip(self.folders, results, self.blend.weights, strict=True)
        ]  # fmt: skip
        return pd.DataFrame(lines).set_index("run")

    def models(self) -> list[tuple[int, Path]]:
        """(place of its run, folder) of every model, in the order in which they predict."""
        models = []
        for run, folder in enumerate(self.folders):
            is_network = read_json(folder / "result.json")["backbone"] != "ladder"
            for number, path in enumerate(folder.model_folders()):
                models.append((is_network, number, -self.blend.weights[run], run, path))
        return [(run, path) for *_, run, path in sorted(models)]


def submit_file(test: Path, out: str | Path, time_budget_hours: float) -> dict:
    """Predict a file of test rows with the attached runs, and write the submission `out`.

    A submission of the class shares is written before any text is read. A competition rerun keeps it whatever fails
    afterwards; elsewhere the error is raised, and the shipped rows are predicted, too, to project a rerun's time.

    Returns:
        As `predict_within`.
    """
    write_prior(test, out)
    try:
        rows = read_rows(test, labelled=False)
        ensemble = find_ensemble(Path(out).parent / "blend.json")
        print(describe_rows(rows).to_string(), ensemble.table().to_string(), sep="\n\n", flush=True)
        record = predict_within(ensemble, rows, out, time_budget_hours)
    except Exception as error:
        if not is_competition_rerun():
            raise
        traceback.print_exception(error)
        return {"left_out": [f"everything: failed ({type(error).__name__}: {error})"], "runs": []}
    if not is_competition_rerun():
        project_rerun(ensemble, time_budget_hours)
    return record


def write_prior(test: Path, out: str | Path) -> None:
    """Write the submission that has the class shares of the shipped rows in every row; of `test` only ids are read."""
    ids = pd.read_csv(test, usecols=[ID], dtype=str, keep_default_na=False)[ID]
    shares = pd.read_csv(sample_path("train"), usecols=list(LABEL_COLUMNS))[list(LABEL_COLUMNS)].mean()
    write_submission(out, list(ids), np.tile(shares, (len(ids), 1)))


def project_rerun(ensemble: Ensemble, time_budget_hours: float) -> None:
    """Predict shipped rows as a rerun would, with all GPUs, and print how long one of RERUN_ROWS would take at most."""
    rows = read_rows(sample_path("train"), labelled=True).head(None if torch.cuda.is_available() else CPU_ROWS)
    with TemporaryDirectory() as folder:
        seconds = predict_within(ensemble, rows, Path(folder) / "submission.csv", time_budget_hours)["seconds"]
    hours = seconds * RERUN_ROWS / len(rows) / 3600
    print(
        f"{len(rows)} shipped rows took {seconds:.0f} s in {count_processes(None)} processes. At this pace a rerun of "
        f"{RERUN_ROWS:,} rows takes at most {hours:.1f} h; it may take {time_budget_hours * (1 - RESERVED):.1f} h.",
        flush=True,
    )


def find_ensemble(blend_out: str | Path) -> Ensemble:
    """The attached runs and how to weigh them.

    An attached blend.json decides which runs are used. Without one all attached runs are: weights and calibration are
    fitted on the rows that all predicted out of sample, and written to `blend_out`; where the runs share none, a line
    is printed and each counts the same.

    Raises:
        UserError: no run is attached, or one that blend.json names is not beside it.
    """
    path = find_blend()
    if path is not None:
        state = read_json(path)
        return _used_runs([path.parent / run for run in state["runs"]], Blend.from_dict(state), str(path))
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


def predict_within(
    ensemble: Ensemble, rows: pd.DataFrame, out: str | Path, time_budget_hours: float, num_processes: int | None = None
) -> dict:
    """Predict `rows` and write the submission `out`, better and better, until done or until time is up.

    In a competition rerun a model that fails is left out with its traceback printed, since nobody could correct it;
    anywhere else its error is raised.

    Args:
        ensemble: of `find_ensemble`.
        rows: from `loading.read_rows`.
        out: submission CSV.
        time_budget_hours: from now; RESERVED of it is not used.
        num_processes: share the rows among so many processes; None: one a GPU.

    Returns:
        What was predicted with what, and how fast; also written beside `out` as submit.json.
    """
    started = time.time()
    submission = _Submission(ensemble, rows, Path(out))
    submission.write()
    folders = [path for _, path in submission.models]
    deadline = started + 3600 * time_budget_hours * (1 - RESERVED)
    processes = count_processes(num_processes)
    predict_models(folders, rows, submission.add, processes, deadline, submission.leave_out)
    record = submission.record() | {"seconds": time.time() - started}
    write_json(Path(out).parent / "submit.json", record)
    return record


class _Submission:
    """The submission so far: for each run the probabilities (N, 3) of those of its models that are complete."""

    def __init__(self, ensemble: Ensemble, rows: pd.DataFrame, out: Path):
        self.ensemble, self.rows, self.out = ensemble, rows, out
        self.models = ensemble.models()
        self.probs: dict[int, list[np.ndarray]] = {}
        self.seconds, self.since = [0.0] * len(ensemble.folders), time.perf_counter()  # of each run, loading included
        self.left_out: list[str] = []

    def add(self, number: int, probs: np.ndarray) -> None:
        """Write the submission with one more model's probabilities."""
        run, now = self.models[number][0], time.perf_counter()
        self.probs.setdefault(run, []).append(probs)
        self.seconds[run], self.since = self.seconds[run] + now - self.since, now
        self.write()

    def leave_out(self, number: int, error: BaseException) -> None:
        """In a competition rerun leave a model out that failed; anywhere else raise its error."""
        if not is_competition_rerun():
            raise error
        traceback.print_exception(error)
        run, path = self.models[number]
        name = f"{self.ensemble.folders[run].path.name}, {path.name}"
        self.left_out.append(f"{name}: failed ({type(error).__name__}: {error})")

    def write(self) -> None:
        write_submission(self.out, list(self.rows[ID]), self.blended())

    def blended(self) -> np.ndarray:
        """The blend of what is there; the calibration belongs to the whole blend and is applied to nothing less."""
        if not self.probs:
            labels = read_table(self.ensemble.folders[0] / "oof.csv")["label"]
            shares = class_shares(np.concatenate([labels, np.arange(NUM_CLASSES)]))  # no class has none
            return np.tile(shares, (len(self.rows), 1))
        there = sorted(self.probs)
        weights = np.array([self.ensemble.blend.weights[run] for run in there])
        weights = weights / weights.sum()
        whole = len(there) == len(self.ensemble.folders)
        calibration = self.ensemble.blend.calibration if whole else Calibration()
        return Blend(tuple(weights), calibration).apply([sum(self.probs[i]) / len(self.probs[i]) for i in there])

    def record(self) -> dict:
        """What was predicted with what."""
        runs, left_out = [], list(self.left_out)
        for run, (folder, weight) in enumerate(zip(self.ensemble.folders, self.ensemble.blend.weights, strict=True)):
            available, used = len(folder.model_folders()), len(self.probs.get(run, ()))
            if used < available:
                left_out.append(f"{folder.path.name}: {used} of {available} folds were used")
            line = {"run": folder.path.name, "weight": weight, "folds": available, "folds_used": used}
            runs.append(line | {"seconds": self.seconds[run]})
        return {"rows": len(self.rows), "weights_from": self.ensemble.source, "left_out": left_out, "runs": runs}


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
