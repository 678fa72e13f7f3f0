"""What networks read of the rows of a run, written once into checkpoint/ and mapped by every process that trains.

checkpoint/rows/, checkpoint/extra/, checkpoint/test/   of the training rows, the extra rows, the test rows:
    tokens.npy bounds.npy sides.npy cut.npy answer_seen.npy   their sides as token ids, see `tokenization.EncodedRows`
    features.npy                                              raw structure features
    ids.npy groups.npy labels.npy folds.npy files.npy         the last three of labelled rows; -1: no fold
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.config import RunConfig
from prefcls_lib.data.features import compute_features
from prefcls_lib.data.schema import ID, SOURCE
from prefcls_lib.data.tokenization import EncodedRows, encode_rows
from prefcls_lib.models.backbones import Backbone, load_backbone
from prefcls_lib.pipeline.folder import RunFolder
from prefcls_lib.pipeline.job import Job
from prefcls_lib.runtime.files import UserError, read_json, write_whole

ARRAYS = ("sides", "cut", "answer_seen", "features", "ids", "groups", "labels", "folds", "files")


@dataclass(frozen=True)
class PreparedRows:
    """N rows as networks read them.

    Attributes:
        encoded: token ids.
        features: (N, F) raw structure features.
        ids, groups: (N,) str.
        labels, folds, files: (N,) int; the fold in which a row is validated (-1: none), and the number of its file: 0
            the training file, k the k-th extra file.
    """

    encoded: EncodedRows
    features: np.ndarray
    ids: np.ndarray
    groups: np.ndarray
    labels: np.ndarray
    folds: np.ndarray
    files: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class TrainingData:
    """All that training reads of a run, in whatever process: settings, backbone, rows.

    Attributes:
        extra: more rows to train on, or None.
        started_at: `time.time()` at which the run, or this session of it, was started.
    """

    config: RunConfig
    folder: RunFolder
    backbone: Backbone
    rows: PreparedRows
    extra: PreparedRows | None
    test: PreparedRows
    started_at: float

    @property
    def deadline(self) -> float | None:
        """`time.time()` at which the time budget ends, or None."""
        hours = self.config.time_budget_hours
        return None if hours is None else self.started_at + 3600 * hours


def prepare_rows(job: Job) -> TrainingData:
    """Write what networks read of the rows into checkpoint/, but for what an earlier session has written."""
    tables = {"rows": (job.rows, job.folds), "extra": (job.extra_rows, None), "test": (job.test_rows, None)}
    for name, (rows, folds) in tables.items():
        folder = job.folder / "checkpoint" / name
        if rows is not None and not folder.is_dir():
            features = {"rows": job.features, "test": job.test_features}[name] if name != "extra" else None
            write_whole(folder, lambda temporary, r=rows, f=folds, x=features: _write_rows(temporary, job, r, f, x))
    return load_training_data(job.folder, job.backbone, job.config, job.started_at)


def load_training_data(
    folder: RunFolder, backbone: Backbone | None = None, config: RunConfig | None = None, started_at: float = 0.0
) -> TrainingData:
    """Map what `prepare_rows` wrote. A worker gives neither backbone nor settings: they are those of config.json."""
    config = config or RunConfig(**read_json(folder / "config.json")["settings"])
    backbone = backbone or load_backbone(config.init_from or config.backbone, config.max_length)
    places = {name: folder / "checkpoint" / name for name in ("rows", "extra", "test")}
    found = {name: _map_rows(place) if place.is_dir() else None for name, place in places.items()}
    if found["rows"] is None or found["test"] is None:
        raise UserError(f"{folder / 'checkpoint'}: the prepared rows are missing. Run the same command again.")
    return TrainingData(config, folder, backbone, **found, started_at=started_at)


def _write_rows(
    temporary: Path, job: Job, rows: pd.DataFrame, folds: np.ndarray | None, features: np.ndarray | None
) -> None:
    settings = (job.config.max_length, job.config.text_cleaning, job.config.architecture)
    encoded, none = encode_rows(rows, job.backbone.tokenizer, *settings), np.full(len(rows), -1)
    columns = {"ids": np.array(rows[ID], dtype=str), "groups": np.array(rows["group"], dtype=str)}
    columns |= {name: getattr(encoded, name) for name in ("sides", "cut", "answer_seen")}
    columns["features"] = compute_features(rows) if features is None else features
    columns["labels"] = rows["label"].to_numpy() if "label" in rows else none
    columns["folds"] = none if folds is None else folds
    columns["files"] = rows[SOURCE].to_numpy() if SOURCE in rows else np.zeros(len(rows), dtype=np.int64)
    temporary.mkdir()
    np.save(temporary / "tokens.npy", np.concatenate(encoded.token_ids))
    np.save(temporary / "bounds.npy", np.append(0, np.cumsum(encoded.lengths)))
    for name in ARRAYS:
        np.save(temporary / f"{name}.npy", columns[name])


def _map_rows(folder: Path) -> PreparedRows:
    try:
        maps = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "bounds", *ARRAYS)}
        arrays = {name: array.view(np.ndarray) for name, array in maps.items()}
        token_ids = np.split(arrays["tokens"], arrays["bounds"][1:-1])
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder}: cannot be read ({error}). Delete it, and run the same command again.") from error
    encoded = EncodedRows(token_ids, arrays["sides"], arrays["cut"], arrays["answer_seen"])
    return PreparedRows(encoded, *(arrays[name] for name in ARRAYS[3:]))
