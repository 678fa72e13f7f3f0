"""The run folder: what a run leaves behind, and what a second start finds in it.

"Run folder" in prefcls_lib/README.md lists its files. config.json is written and compared at every start. model/fold0/
is there once that model is done. result.json is written last: a run that has it is complete, and its checkpoint/, from
which an interrupted run resumes, is deleted.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.config import RunConfig
from prefcls_lib.data.schema import ID, LABEL_COLUMNS
from prefcls_lib.data.submission import write_submission
from prefcls_lib.runtime.files import UserError, read_json, reading, sha256, write_json, write_whole
from prefcls_lib.runtime.kaggle import find_attached

LADDER = "ladder"  # the backbone of a run without a network
WRITTEN = ("README.md", "history.csv", "oof.csv", "model", "checkpoint")  # a run has written config.json before these
# settings that may differ when a run is resumed: places (their data is compared by SHA-256) and the session
FREE_SETTINGS = ("train", "test", "out", "resume_from", "time_budget_hours", "num_processes", "report_to")


def fold_models(config: RunConfig) -> dict[str, tuple[int, int]]:
    """The models of a run, fold by fold: the name of its folder (fold3, fold3-seed1) -> its fold and its seed."""
    return {
        f"fold{fold}" + (f"-seed{number}" if number else ""): (fold, (config.seed + number) % 2**32)
        for fold in config.folds
        for number in range(config.num_seeds)
    }


def read_config(run: Path) -> RunConfig:
    """The settings of a run, its recipe filled in."""
    with reading(run / "config.json", "Copy the run folder again."):
        return RunConfig(**read_json(run / "config.json")["settings"])


def model_folders(run: Path) -> list[Path]:
    """Folders of all models of a run; a UserError where one is missing."""
    folders = [run / "model" / name for name in fold_models(read_config(run))]
    if missing := [folder.name for folder in folders if not folder.is_dir()]:
        raise UserError(
            f"{run}: the run is not finished, {', '.join(missing)} is missing in model/. Run the same command again."
        )
    return folders


def earlier_run(run: Path, resume_from: str | None) -> Path:
    """The folder of the run that is resumed: `run`, or where none is in it the one that the setting names."""
    if resume_from is None or (run / "config.json").exists():
        return run
    earlier = find_attached(resume_from)
    if not (earlier / "config.json").is_file():
        raise UserError(f"setting resume_from={resume_from!r}: holds no run (config.json). Name a run folder.")
    return earlier


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder without permissions: an attached input is read-only."""
    target.mkdir()
    for path in source.iterdir():
        (copy_folder if path.is_dir() else shutil.copyfile)(path, target / path.name)


def refuse_another(run: Path, config: RunConfig, data_sha256: dict[str, str]) -> None:
    """Raise a UserError that names the setting or data file in which the run here differs, or foreign files."""
    if not (run / "config.json").exists():
        if taken := [name for name in WRITTEN if (run / name).exists()]:
            raise UserError(f"{run}: is no run, but holds {', '.join(taken)}. Name another folder with --out.")
        return
    with reading(run / "config.json", "It is not of a run of this version: name another folder with --out."):
        found, settings = read_json(run / "config.json"), config.to_dict()
        earlier, hashes = found["settings"], found["data_sha256"]
        for name in ["backbone", *sorted(earlier.keys() | settings.keys(), reverse=True)]:  # others follow from it
            before, now = earlier.get(name), settings.get(name)
            if name not in FREE_SETTINGS and before != now:
                raise UserError(
                    f"{run}: holds a run with {name}={before!r}, this one has {name}={now!r}. Set it as it was, or "
                    "name another folder with --out."
                )
        for name in (name for name, before in hashes.items() if before != data_sha256[name]):
            raise UserError(
                f"{run}: holds a run on another {name} file ({settings[name]} has changed or is a different one). Name "
                "another folder with --out; for new test rows use `prefcls predict --run`."
            )


def prediction_table(rows: pd.DataFrame, probs: np.ndarray) -> pd.DataFrame:
    """Predictions in their one format: id, fold, label and group, as far as they are known; three probabilities."""
    columns = [name for name in (ID, "fold", "label", "group") if name in rows]
    return rows[columns].reset_index(drop=True).assign(**dict(zip(LABEL_COLUMNS, probs.T, strict=True)))


def write_model_tables(folder: Path, record: dict, **tables: pd.DataFrame) -> None:
    """Write tables (history, oof, test) as CSV beside a model's files, then fold.json with the SHA-256 of all."""
    for name, table in tables.items():
        write_table(folder / f"{name}.csv", table)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in paths}
    write_json(folder / "fold.json", record | {"finished_at": time.time(), "sha256": hashes})


def gather_table(folders: Sequence[Path], name: str) -> pd.DataFrame:
    """A table of several models, one below the other; a row that several seeds predict has their mean probabilities."""
    table = pd.concat([read_table(folder / name) for folder in folders], ignore_index=True)
    rows = [column for column in table if column not in LABEL_COLUMNS]
    return table.groupby(rows, sort=False, as_index=False).mean() if ID in table else table


def write_mean(run: Path, ids: Sequence[str], models: list[Path]) -> None:
    """Write submission.csv: the mean of what these models have predicted for the test rows."""
    probs = np.mean([read_probs(model / "test.csv") for model in models], axis=0)
    write_submission(run / "submission.csv", list(ids), probs)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, whole or not at all; floats keep every bit."""
    with write_whole(path) as temporary:
        table.to_csv(temporary, index=False)


def read_table(path: Path) -> pd.DataFrame:
    """Read a table that `write_table` wrote, ids as text."""
    # Python's float reads back every bit in every version of pandas; an id such as "NA" is text, only nothing is NaN
    exact = {ID: str, "group": str, **dict.fromkeys(LABEL_COLUMNS, float)}
    with reading(path, "Copy the run folder again."):
        return pd.read_csv(path, converters=exact, keep_default_na=False, na_values=[""])


def read_probs(path: Path) -> np.ndarray:
    """(N, 3) the probabilities in a table."""
    return read_table(path)[list(LABEL_COLUMNS)].to_numpy()
