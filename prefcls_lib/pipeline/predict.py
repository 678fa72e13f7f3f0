"""Predict new rows with the models of finished runs, in this process or by several processes together."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from accelerate.utils import gather_object

from prefcls_lib.data.loading import read_rows, write_rows
from prefcls_lib.data.schema import NUM_CLASSES, TEXT_COLUMNS
from prefcls_lib.models.saved import load_model
from prefcls_lib.pipeline.launch import run_together
from prefcls_lib.runtime.devices import process_state
from prefcls_lib.runtime.files import UserError, write_whole
from prefcls_lib.runtime.progress import progress_bar

BLOCK_ROWS = 512  # rows between two looks at the clock
SECONDS_PAST_DEADLINE = 300  # for the block under way, before a process that does not end is stopped


def predict_models(
    folders: list[Path], rows: pd.DataFrame, add: Callable[[int, np.ndarray], None], num_processes: int = 1,
    deadline: float = math.inf, fail: Callable[[int, BaseException], None] | None = None,
) -> None:  # fmt: skip
    """Predict rows with several models, one after the other, until a deadline.

    Args:
        folders: of the models, in the order of their importance.
        rows: from `loading.read_rows`.
        add: called with a model's place in `folders` and its probabilities (N, 3) as soon as they are complete.
        num_processes: share the batches of each model among so many; 1: this one alone.
        deadline: `time.time()` after which no block is begun; models that are not complete are left out.
        fail: called with a model's place and the error where predicting with it failed; the others are predicted
            without it. None: the error is raised.
    """
    left = dict(enumerate(folders))

    def finish(number: int, probs: np.ndarray) -> None:
        add(number, probs)
        del left[number]

    while left:
        try:
            if num_processes > 1:
                _predict_in_processes(dict(left), rows, num_processes, deadline, finish)
            else:
                for number, probs in predict_blocks(dict(left), rows, deadline):
                    finish(number, probs)
            return
        except Exception as error:
            if fail is None or not left:
                raise
            number = min(left)  # they are predicted in this order, so it is the one that failed
            del left[number]
            fail(number, error)


def predict_blocks(folders: dict[int, Path], rows: pd.DataFrame, deadline: float) -> Iterator[tuple[int, np.ndarray]]:
    """(number, probabilities (N, 3)) of each model in turn, by blocks of rows of similar length, until the deadline."""
    lengths = sum(rows[name].map(lambda turns: sum(map(len, turns))) for name in TEXT_COLUMNS)
    order = np.argsort(-lengths.to_numpy(), kind="stable")
    blocks = [order[start : start + BLOCK_ROWS] for start in range(0, len(order), BLOCK_ROWS)]
    run = inputs = None
    with progress_bar(len(folders) * len(rows), "predict", "row", process_state().is_main_process) as bar:
        for number, folder in folders.items():
            model, probs = load_model(folder), np.empty((len(rows), NUM_CLASSES))
            if folder.parent != run:  # a run's models share its inputs; another's are freed first
                run, inputs = folder.parent, None
                inputs = model.read_inputs(rows)
            for block in blocks:
                if any(gather_object([time.time() > deadline])):  # in all processes alike
                    return
                probs[block] = model.predict_proba(inputs.take(block))
                bar.update(len(block))
            if not np.isfinite(probs).all():
                raise UserError(f"{folder}: predicts probabilities that are not finite. Train the run again.")
            yield number, probs


def predict_to_files(folders: list[Path], rows: Path, out: Path, deadline: float) -> None:
    """What a process of `predict_models` does: predict the rows, a CSV; the first writes `out`/NUMBER.npy a model."""
    for number, probs in predict_blocks(dict(enumerate(folders)), read_rows(rows, labelled=False), deadline):
        if process_state().is_main_process:
            write_whole(out / f"{number}.npy", lambda temporary, probs=probs: np.save(temporary, probs))


def _predict_in_processes(
    folders: dict[int, Path], rows: pd.DataFrame, num_processes: int, deadline: float, finish: Callable
) -> None:
    """`predict_blocks` by several processes, which share the batches of each model."""
    waiting = list(enumerate(folders))
    with TemporaryDirectory() as temporary:
        out = Path(temporary)
        write_rows(out / "rows.csv", rows)

        def collect() -> bool:
            """Hand on what is finished; whether the processes must be stopped."""
            while waiting and (out / f"{waiting[0][0]}.npy").exists():
                place, number = waiting.pop(0)
                finish(number, np.load(out / f"{place}.npy", allow_pickle=False))
            return time.time() > deadline + SECONDS_PAST_DEADLINE

        command = ["predict-models", "--rows", str(out / "rows.csv"), "--out", str(out), "--deadline", str(deadline)]
        try:
            run_together([*command, *map(str, folders.values())], num_processes, collect)
        finally:
            collect()
