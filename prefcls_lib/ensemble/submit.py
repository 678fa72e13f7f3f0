"""Predict test rows with several finished runs and their blend, within a time budget: what is submitted to Kaggle.

A valid submission, made of the class shares, is written before any text is read. The models of the runs without a
network replace it; then one model of each network by falling weight, then the next ones: after each model a submission
of all that are complete is written. What is not complete at the deadline is left out.
"""

import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from prefcls_lib.data.loading import describe_rows, read_rows, sample_path
from prefcls_lib.data.schema import ID, LABEL_COLUMNS
from prefcls_lib.data.submission import write_submission
from prefcls_lib.ensemble.blend import fit_runs, mix, read_blend
from prefcls_lib.evaluation.calibration import Blend, Calibration
from prefcls_lib.pipeline.folder import LADDER, model_folders
from prefcls_lib.pipeline.predict import predict_models
from prefcls_lib.runtime.devices import machine_name
from prefcls_lib.runtime.files import UserError, read_json, write_json
from prefcls_lib.runtime.kaggle import attached_runs, find_blend, is_competition_rerun

RERUN_ROWS = 25_000  # about the number of hidden test rows
CPU_ROWS = 60  # of the shipped ones, where there is no GPU to predict all
RESERVED = 0.1  # share of the time budget that is kept for the last block, and for a machine that slows down


def submit_file(test: Path, out: str | Path, time_budget_hours: float) -> dict:
    """Predict a file of test rows with the attached runs, and write the submission `out`.

    A submission of the shipped rows' class shares is written before any text is read. A competition rerun keeps it
    whatever fails afterwards; elsewhere the error is raised, and the shipped rows are predicted, too, to project a
    rerun's time.

    Returns:
        As `predict_within`; also written beside `out` as submit.json.
    """
    ids = list(pd.read_csv(test, usecols=[ID], dtype=str, keep_default_na=False)[ID])
    shares = pd.read_csv(sample_path("train"), usecols=list(LABEL_COLUMNS))[list(LABEL_COLUMNS)].mean()
    write_submission(out, ids, np.tile(shares, (len(ids), 1)))
    try:
        rows = read_rows(test, labelled=False)
        print(describe_rows(rows).to_string(), flush=True)
        runs, blend = find_runs(Path(out).parent / "blend.json")
        record = predict_within(runs, blend, rows, lambda probs: write_submission(out, ids, probs), time_budget_hours)
        if not is_competition_rerun():
            project_rerun(runs, blend, time_budget_hours)
    except Exception as error:
        if not is_competition_rerun():
            raise
        traceback.print_exception(error)
        record = {"left_out": [f"what was not complete: failed ({type(error).__name__}: {error})"], "runs": []}
    write_json(Path(out).parent / "submit.json", record)
    return record


def project_rerun(runs: list[Path], blend: Blend, time_budget_hours: float) -> None:
    """Predict shipped rows as a rerun would, with all GPUs, and print how long one of RERUN_ROWS would take at most."""
    rows = read_rows(sample_path("train"), labelled=True).head(None if torch.cuda.is_available() else CPU_ROWS)
    seconds = predict_within(runs, blend, rows, lambda probs: None, time_budget_hours)["seconds"]
    hours = seconds * RERUN_ROWS / len(rows) / 3600
    print(
        f"{len(rows)} shipped rows took {seconds:.0f} s on {machine_name()}. At this pace a rerun of "
        f"{RERUN_ROWS:,} rows takes at most {hours:.1f} h; the limit is {time_budget_hours * (1 - RESERVED):.1f} h.",
        flush=True,
    )


def find_runs(blend_out: Path) -> tuple[list[Path], Blend]:
    """The attached runs and how to weigh them; a line says where the weights come from.

    An attached blend.json decides which runs are used. Without one all attached runs are: weights and calibration are
    fitted on the rows that all predicted out of sample, and written to `blend_out`; where the runs share none, each
    counts the same.
    """
    folders, path = attached_runs(), find_blend()
    if path is None and not folders:
        raise UserError(
            "no finished run is attached (a folder with result.json, config.json and model/). On Kaggle attach the "
            "output of a training notebook, or the data set prefcls-runs, as an input."
        )
    if path is None and len(folders) > 1:
        try:
            fit_runs(folders, blend_out)
            path = blend_out
        except UserError as error:
            print(f"all runs get the same weight, since no blend can be fitted: {error}", flush=True)
    if path is None:
        return folders, Blend((1 / len(folders),) * len(folders), Calibration())
    print(f"weights of the runs: {path}", flush=True)
    return read_blend(path)


def order_models(runs: list[Path], blend: Blend) -> list[tuple[int, Path]]:
    """(place of its run, folder) of every model, in the order in which they predict."""
    models = [
        (read_json(run / "result.json")["backbone"] != LADDER, number, -blend.weights[place], place, path)
        for place, run in enumerate(runs)
        for number, path in enumerate(model_folders(run))
    ]
    return [(place, path) for *_, place, path in sorted(models)]


def predict_within(
    runs: list[Path], blend: Blend, rows: pd.DataFrame, write: Callable[[np.ndarray], None], hours: float
) -> dict:
    """Predict `rows` (from `loading.read_rows`), model after model, until RESERVED of `hours` is left at the latest.

    `write` is called after each model with the probabilities (N, 3) of all that are complete.

    Returns:
        What was predicted with what, what was left out, and in how many seconds.
    """
    started, models = time.time(), order_models(runs, blend)
    complete: list[list[np.ndarray]] = [[] for _ in runs]

    def add(number: int, probs: np.ndarray) -> None:
        complete[models[number][0]].append(probs)
        write(mix(complete, blend))

    deadline = started + 3600 * hours * (1 - RESERVED)
    predict_models([path for _, path in models], rows, add, deadline)
    lines = []
    for run, weight, probs in zip(runs, blend.weights, complete, strict=True):
        result = read_json(run / "result.json")
        line = {"run": run.name, "backbone": Path(result["backbone"]).name, "log_loss": result["log_loss"]}
        lines.append(line | {"weight": weight, "folds": len(model_folders(run)), "folds_used": len(probs)})
    left_out = [f"{line['run']}: {line['folds_used']} of {line['folds']} folds were used"
                for line in lines if line["folds_used"] < line["folds"]]  # fmt: skip
    return {"left_out": left_out, "runs": lines, "seconds": time.time() - started}
