"""Predict new rows with the models of finished runs, in this process or shared among one process for each GPU."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from prefcls_lib.data.batching import TokenCount
from prefcls_lib.data.loading import read_rows, write_rows
from prefcls_lib.data.schema import NUM_CLASSES, TEXT_COLUMNS
from prefcls_lib.models.saved import load_fold_model
from prefcls_lib.pipeline.folder import RunFolder
from prefcls_lib.pipeline.launch import WorkerFailed, count_processes, run_side_by_side
from prefcls_lib.runtime.files import UserError, write_whole
from prefcls_lib.runtime.progress import progress_bar

BLOCK_ROWS = 512  # rows between two looks at the clock; processes share the work block by block
SECONDS_PAST_DEADLINE = 300  # for the block under way, before a process that does not end is stopped


class ModelFailed(Exception):
    """Predicting with one of several models failed; `number` says which, `__cause__` why."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def predict_run(
    folder: RunFolder, rows: pd.DataFrame, num_processes: int | None = None
) -> tuple[np.ndarray, TokenCount]:
    """Probabilities (N, 3) of new rows, averaged over the run's models; needs nothing but the run folder.

    Args:
        folder: of the run.
        rows: from `loading.read_rows`.
        num_processes: share the rows among so many processes; None: one a GPU.

    Returns:
        The probabilities, and the tokens that this process computed for them.
    """
    folders = folder.model_folders()
    total, tokens, inputs = np.zeros((len(rows), NUM_CLASSES)), TokenCount(), None
    processes = min(count_processes(num_processes), math.ceil(len(rows) / BLOCK_ROWS))
    if processes > 1:
        predict_models(folders, rows, lambda number, probs: np.add(total, probs, out=total), processes)
        return total / len(folders), tokens
    for number, path in enumerate(folders, 1):
        model = load_fold_model(path)
        inputs = inputs or model.read_inputs(rows)  # the models of a run share tokenizer and text settings
        total += model.predict_proba(rows, inputs, f"predict {number}/{len(folders)}")
        tokens += model.tokens
    return total / len(folders), tokens


def predict_models(
    folders: list[Path],
    rows: pd.DataFrame,
    add: Callable[[int, np.ndarray], None],
    num_processes: int,
    deadline: float = math.inf,
    fail: Callable[[int, BaseException], None] | None = None,
) -> None:
    """Predict rows with several models, one after the other, until a deadline.

    The rows, longest first, are cut into blocks, which the processes share. A block is predicted as a whole wherever
    that happens, so on equal devices the probabilities do not depend on the number of processes.

    Args:
        folders: of the models, in the order of their importance.
        rows: from `loading.read_rows`.
        add: called with a model's place in `folders` and its probabilities (N, 3) as soon as they are complete.
        num_processes: share the blocks among so many; 1: this one.
        deadline: `time.time()` after which no block is begun; models that are not complete are left out.
        fail: called with a model's place and the error where predicting with it failed; the others are predicted
            without it. None: the error is raised.
    """
    lengths = sum(rows[name].map(lambda turns: sum(map(len, turns))) for name in TEXT_COLUMNS)
    order = np.argsort(-lengths.to_numpy(), kind="stable")
    blocks = [order[start : start + BLOCK_ROWS] for start in range(0, len(order), BLOCK_ROWS)]
    shares = [np.concatenate(blocks[part::num_processes]) for part in range(min(num_processes, len(blocks)))]
    left = dict(enumerate(folders))

    def finish(number: int, parts: list[np.ndarray]) -> None:
        probs = np.empty((len(rows), NUM_CLASSES))
        probs[np.concatenate(shares)] = np.concatenate(parts)
        del left[number]
        add(number, probs)

    while left:
        try:
            if len(shares) > 1:
                _predict_shares(dict(left), [rows.iloc[share] for share in shares], deadline, finish)
            else:
                for number, probs in predict_blocks(dict(left), rows.iloc[order], deadline):
                    finish(number, [probs])
            return
        except ModelFailed as failed:
            if fail is None:
                raise failed.__cause__ from None
            left.pop(failed.number, None)
            fail(failed.number, failed.__cause__)


def predict_blocks(folders: dict[int, Path], rows: pd.DataFrame, deadline: float) -> Iterator[tuple[int, np.ndarray]]:
    """(number, probabilities (N, 3)) of each model in turn, block by block, while there is time.

    Raises:
        ModelFailed: on whatever goes wrong with a model.
    """
    run = inputs = None
    with progress_bar(len(folders) * len(rows), "predict", "row") as bar:
        for number, folder in folders.items():
            try:
                model = load_fold_model(folder)
                if folder.parent != run:  # a run's models share its inputs; another's are freed first
                    run, inputs = folder.parent, None
                    inputs = model.read_inputs(rows)
                probs = np.empty((len(rows), NUM_CLASSES))
                for start in range(0, len(rows), BLOCK_ROWS):
                    if time.time() > deadline:
                        return
                    block = np.arange(start, min(start + BLOCK_ROWS, len(rows)))
                    probs[block] = model.predict_proba(rows.iloc[block], inputs.take(block))
                    bar.update(len(block))
                if not np.isfinite(probs).all():
                    raise UserError(f"{folder}: predicts probabilities that are not finite. Train the run again.")
            except Exception as error:
                raise ModelFailed(number) from error
            yield number, probs


def predict_share(folders: list[Path], rows: Path, out: Path, deadline: float) -> None:
    """What a worker of `predict_models` does: predict its rows, a CSV, and write `out`/NUMBER.bin for each model."""
    try:
        for number, probs in predict_blocks(dict(enumerate(folders)), read_rows(rows, labelled=False), deadline):
            write_whole(out / f"{number}.bin", lambda temporary, probs=probs: probs.tofile(temporary))
    except ModelFailed as failed:
        raise failed.__cause__ from None


def _predict_shares(
    folders: dict[int, Path],
    shares: list[pd.DataFrame],
    deadline: float,
    finish: Callable[[int, list[np.ndarray]], None],
) -> None:
    """`predict_blocks` by a process for each share of the rows."""
    numbers, finished = list(folders), set()
    with TemporaryDirectory() as temporary:
        outs = [Path(temporary, str(part)) for part in range(len(shares))]
        for out, rows in zip(outs, shares, strict=True):
            write_rows(out / "rows.csv", rows)

        def collect() -> bool:
            """Hand on what all processes have finished; whether they must be stopped."""
            for place, number in enumerate(numbers):
                files = [out / f"{place}.bin" for out in outs]
                if number not in finished and all(file.exists() for file in files):
                    finished.add(number)
                    finish(number, [np.fromfile(file).reshape(-1, NUM_CLASSES) for file in files])
            return time.time() > deadline + SECONDS_PAST_DEADLINE

        places = ["--deadline", str(deadline), *map(str, folders.values())]
        commands = [["predict-share", "--rows", str(out / "rows.csv"), "--out", str(out), *places] for out in outs]
        try:
            run_side_by_side(commands, [f"predict {part + 1}/{len(shares)}" for part in range(len(shares))], collect)
        except WorkerFailed as error:
            done = len(list(outs[error.number].glob("[0-9]*.bin")))
            raise ModelFailed(numbers[min(done, len(numbers) - 1)]) from error
        finally:
            collect()
