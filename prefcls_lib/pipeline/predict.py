"""Predict new rows with the models of finished runs until a deadline, on all GPUs at once."""

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from prefcls_lib.baselines.columns import BaselineInputs
from prefcls_lib.baselines.out_of_fold import BaselineMean
from prefcls_lib.data.schema import NUM_CLASSES, TEXT_COLUMNS
from prefcls_lib.models.saved import NetworkInputs, SavedNetwork, load_model
from prefcls_lib.pipeline.launch import count_processes
from prefcls_lib.runtime.files import UserError
from prefcls_lib.runtime.kaggle import is_competition_rerun
from prefcls_lib.runtime.progress import progress_bar

BLOCK_ROWS = 512  # rows between two looks at the clock


def predict_models(
    folders: list[Path], rows: pd.DataFrame, add: Callable[[int, np.ndarray], None], deadline: float
) -> None:
    """Predict rows of `loading.read_rows` with one model after the other, on all GPUs at once.

    Blocks of rows, the longest first, are dealt out to the GPUs, each of which has the model. No block is begun after
    `deadline` (`time.time()`). `add` gets the model's place in `folders` and its probabilities (N, 3) once it is
    complete. In a competition rerun a model that fails is left out and its traceback printed, since nobody could
    correct it; anywhere else its error is raised.
    """
    lengths = sum(rows[name].map(lambda turns: sum(map(len, turns))) for name in TEXT_COLUMNS)
    order = np.argsort(-lengths.to_numpy(), kind="stable")
    blocks = [order[start : start + BLOCK_ROWS] for start in range(0, len(order), BLOCK_ROWS)]
    run = inputs = None
    with progress_bar(len(folders) * len(rows), "predict", "row") as bar:
        for number, folder in enumerate(folders):
            try:
                models = [load_model(folder) for _ in range(count_processes(None))]
                if folder.parent != run:  # a run's models share its inputs; another's are freed first
                    run = inputs = None
                    inputs, run = models[0].read_inputs(rows), folder.parent
                probs = np.empty((len(rows), NUM_CLASSES))
                for block, values in zip(blocks, predict_blocks(models, inputs, blocks, deadline), strict=True):
                    if values is None:
                        return
                    probs[block] = values
                    bar.update(len(block))
                if not np.isfinite(probs).all():
                    raise UserError(f"{folder}: predicts probabilities that are not finite. Train the run again.")
            except Exception as error:
                if not is_competition_rerun():
                    raise
                traceback.print_exception(error)
            else:
                add(number, probs)


def predict_blocks(
    models: list[SavedNetwork | BaselineMean], inputs: NetworkInputs | BaselineInputs, blocks: list[np.ndarray],
    deadline: float,
) -> Iterator[np.ndarray | None]:  # fmt: skip
    """Probabilities of blocks of rows, in their order; `models`: the same one for each GPU.

    A block goes to the GPU that is idle first. None in place of one that was not begun before the deadline.
    """
    idle = deque(enumerate(models))  # as many threads as models: one is always idle where a thread begins a block

    def predict(block: np.ndarray) -> np.ndarray | None:
        gpu, model = idle.popleft()
        try:
            with torch.cuda.device(gpu if torch.cuda.is_available() else -1):  # of this thread; -1: as it is
                return None if time.time() > deadline else model.predict_proba(inputs.take(block))
        finally:
            idle.append((gpu, model))

    with ThreadPoolExecutor(len(models)) as threads:
        yield from threads.map(predict, blocks)
