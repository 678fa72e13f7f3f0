"""Predict new rows with the models of finished runs until a deadline, in this process or a part in each of several."""

import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from prefcls_lib.data.loading import read_rows, write_rows
from prefcls_lib.data.schema import NUM_CLASSES, TEXT_COLUMNS
from prefcls_lib.models.saved import load_model
from prefcls_lib.pipeline.launch import PREFCLS, run_workers
from prefcls_lib.runtime.files import UserError, write_whole
from prefcls_lib.runtime.kaggle import is_competition_rerun
from prefcls_lib.runtime.progress import progress_bar

BLOCK_ROWS = 512  # rows between two looks at the clock
SECONDS_PAST_DEADLINE = 300  # for the block under way, before a process that does not end is stopped

Add = Callable[[int, np.ndarray], None]  # gets a model's place in the list, and its probabilities (N, 3) of the rows


def predict_models(folders: list[Path], rows: pd.DataFrame, add: Add, deadline: float = math.inf) -> None:
    """Predict rows of `loading.read_rows` with one model after the other; `add` gets each as soon as it is complete.

    No block of rows is begun after `deadline` (`time.time()`). In a competition rerun a model that fails is left out
    and its traceback printed, since nobody could correct it; anywhere else its error is raised.
    """
    lengths = sum(rows[name].map(lambda turns: sum(map(len, turns))) for name in TEXT_COLUMNS)
    order = np.argsort(-lengths.to_numpy(), kind="stable")
    blocks = [order[start : start + BLOCK_ROWS] for start in range(0, len(order), BLOCK_ROWS)]
    run = inputs = None
    with progress_bar(len(folders) * len(rows), "predict", "row") as bar:
        for number, folder in enumerate(folders):
            try:
                model, probs = load_model(folder), np.empty((len(rows), NUM_CLASSES))
                if folder.parent != run:  # a run's models share its inputs; another's are freed first
                    run, inputs = folder.parent, None
                    inputs = model.read_inputs(rows)
                for block in blocks:
                    if time.time() > deadline:
                        return
                    probs[block] = model.predict_proba(inputs.take(block))
                    bar.update(len(block))
                if not np.isfinite(probs).all():
                    raise UserError(f"{folder}: predicts probabilities that are not finite. Train the run again.")
            except Exception as error:
                if not is_competition_rerun():
                    raise
                traceback.print_exception(error)
            else:
                add(number, probs)


def predict_side_by_side(folders: list[Path], rows: pd.DataFrame, add: Add, deadline: float, processes: int) -> None:
    """As `predict_models`, with a part of the rows in each of several processes, which have a GPU each."""
    waiting = list(range(len(folders)))
    with TemporaryDirectory() as temporary:
        parts = [Path(temporary, str(part)) for part in range(processes)]

        def collect() -> bool:
            """Hand on the models with which all processes are done; whether the processes must be stopped."""
            for number in waiting.copy():
                found = [part / f"{number}.npy" for part in parts]
                if all(path.exists() for path in found):
                    probs = np.empty((len(rows), NUM_CLASSES))
                    for start, path in enumerate(found):
                        probs[start::processes] = np.load(path, allow_pickle=False)
                    waiting.remove(number)
                    add(number, probs)
            return time.time() > deadline + SECONDS_PAST_DEADLINE

        commands = {}
        for start, part in enumerate(parts):
            write_rows(part / "rows.csv", rows.iloc[start::processes])
            given = [str(part), *map(str, folders)]
            commands[f"part {start + 1}"] = [*PREFCLS, "predict-part", "--deadline", str(deadline), *given]
        try:
            run_workers(commands, processes, collect)
        finally:
            collect()


def predict_part(folder: Path, models: list[Path], deadline: float) -> None:
    """What a process of `predict_side_by_side` does: of `folder`/rows.csv a file NUMBER.npy for each model."""
    rows = read_rows(folder / "rows.csv", labelled=False)

    def save(number: int, probs: np.ndarray) -> None:
        write_whole(folder / f"{number}.npy", lambda temporary: np.save(temporary, probs))

    predict_models(models, rows, save, deadline)
