"""Predict new rows with the models of finished runs until a deadline, on all GPUs at once."""

import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from prefcls_lib.data.schema import NUM_CLASSES, TEXT_COLUMNS
from prefcls_lib.models.saved import load_model
from prefcls_lib.pipeline.launch import count_processes
from prefcls_lib.runtime.files import UserError
from prefcls_lib.runtime.kaggle import is_competition_rerun
from prefcls_lib.runtime.progress import progress_bar

BLOCK_ROWS = 512  # rows; the deadline is checked before each block


def predict_models(
    folders: list[Path], rows: pd.DataFrame, add: Callable[[int, np.ndarray], None], deadline: float
) -> None:
    """Predict rows of `loading.read_rows` with one model after the other, on all GPUs at once.

    Blocks of rows, the longest first, are shared among the GPUs, each of which has the model. No block is begun after
    `deadline` (`time.time()`). `add` gets the model's place in `folders` and its probabilities (N, 3) once it is
    complete. In a competition rerun a model that fails is left out and its traceback printed, since nobody could
    correct it; anywhere else its error is raised.
    """
    lengths = sum(rows[name].map(lambda turns: sum(map(len, turns))) for name in TEXT_COLUMNS)
    order = np.argsort(-lengths.to_numpy(), kind="stable")
    blocks = [order[start : start + BLOCK_ROWS] for start in range(0, len(order), BLOCK_ROWS)]
    run = inputs = None
    idle = deque(range(count_processes(None)))  # GPUs; as many threads, so one is idle where a thread begins a block

    def predict(block: np.ndarray) -> np.ndarray | None:
        gpu = idle.popleft()
        try:
            with torch.cuda.device(gpu if torch.cuda.is_available() else -1):  # of this thread; -1: as it is
                return None if time.time() > deadline else models[gpu].predict_proba(inputs.take(block))
        finally:
            idle.append(gpu)

    with progress_bar(len(folders) * len(rows), "predict", "row") as bar, ThreadPoolExecutor(len(idle)) as threads:
        for number, folder in enumerate(folders):
            try:
                models = [load_model(folder) for _ in range(len(idle))]
                if folder.parent != run:  # a run's models share its inputs; another's are freed first
                    run = inputs = None
                    inputs, run = models[0].read_inputs(rows), folder.parent
                probs = np.empty((len(rows), NUM_CLASSES))
                for block, values in zip(blocks, threads.map(predict, blocks), strict=True):
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
