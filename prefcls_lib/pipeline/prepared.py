"""What networks read of the rows of a run, written once into checkpoint/ and mapped by every process that trains.

checkpoint/rows/, checkpoint/test/   of the training rows, extra rows last, and of the test rows:
    tokens.npy bounds.npy sides.npy full_lengths.npy   their sides as token ids, see `tokenization.EncodedRows`
    table.csv                                          see `PreparedRows`
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.config import RunConfig
from prefcls_lib.data.schema import ID, SOURCE
from prefcls_lib.data.tokenization import EncodedRows, encode_rows
from prefcls_lib.models.backbones import Backbone, load_backbone
from prefcls_lib.pipeline.folder import RunFolder, read_table, write_table
from prefcls_lib.pipeline.job import Job
from prefcls_lib.runtime.files import reading, write_whole

ENCODED = ("sides", "full_lengths")


@dataclass(frozen=True)
class PreparedRows:
    """N rows as networks read them.

    `table` has a line a row: id, group, label (-1: not known), fold in which the row is validated (-1: in none), file
    (0: the training file, k: the k-th extra file).
    """

    encoded: EncodedRows
    table: pd.DataFrame


@dataclass(frozen=True)
class TrainingData:
    """All that training reads of a run, in whatever process; `started_at`: `time.time()` of this session."""

    config: RunConfig
    folder: RunFolder
    backbone: Backbone
    rows: PreparedRows
    test: PreparedRows
    started_at: float


def prepare_rows(job: Job) -> TrainingData:
    """Write what networks read of the rows into checkpoint/, but for what an earlier session has written."""
    folds = np.append(job.folds, np.full(len(job.all_rows) - len(job.rows), -1))
    parts = {"rows": (job.all_rows, folds), "test": (job.test_rows, -1)}
    for name, given in parts.items():
        if not (place := job.folder.checkpoint(name)).is_dir():
            write_whole(place, lambda folder, given=given: _write_rows(folder, job, *given))
    return load_training_data(job.folder, job.started_at, job.backbone)


def load_training_data(folder: RunFolder, started_at: float, backbone: Backbone | None = None) -> TrainingData:
    """Map what `prepare_rows` wrote."""
    config = folder.read_config()
    backbone = backbone or load_backbone(config.init_from or config.backbone, config.max_length)
    rows, test = (_map_rows(folder.checkpoint(name)) for name in ("rows", "test"))
    return TrainingData(config, folder, backbone, rows, test, started_at)


def _write_rows(folder: Path, job: Job, rows: pd.DataFrame, folds: np.ndarray | int) -> None:
    texts = (job.config.max_length, job.config.text_cleaning, job.config.architecture)
    encoded = encode_rows(rows, job.backbone.tokenizer, *texts)
    arrays = {"tokens": np.concatenate(encoded.token_ids), "bounds": np.append(0, np.cumsum(encoded.lengths))}
    arrays |= {name: getattr(encoded, name) for name in ENCODED}
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    columns = {"label": rows.get("label", -1), "fold": folds, "file": rows.get(SOURCE, 0)}
    write_table(folder / "table.csv", rows[[ID, "group"]].assign(**columns))


def _map_rows(folder: Path) -> PreparedRows:
    names = ("tokens", "bounds", *ENCODED)
    with reading(folder, "Delete it, and run the same command again."):
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in names}
        encoded = EncodedRows(np.split(arrays["tokens"], arrays["bounds"][1:-1]), *(arrays[name] for name in ENCODED))
        return PreparedRows(encoded, read_table(folder / "table.csv"))
