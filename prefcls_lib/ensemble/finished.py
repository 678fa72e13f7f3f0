"""Finished run folders: found, read and checked, and compared on the rows that they share.

Two runs can be compared if training file and fold plan are the same.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.config import RunConfig, fill_earlier
from prefcls_lib.data.schema import ID, LABEL_COLUMNS
from prefcls_lib.evaluation import compare, scores
from prefcls_lib.pipeline.folder import read_table
from prefcls_lib.runtime.files import UserError, read_json

MIN_SHARED_ROWS = 10  # fewer are an accident, not a validation set
NUMBERS = ("log_loss", "accuracy", "expected_calibration_error", "calibrated_log_loss",
           "calibrated_expected_calibration_error", "seconds", "rows", "valid_rows")  # fmt: skip
FOLD_PLAN = ("num_folds", "fold_seed", "max_train_rows")
COLUMNS = list(LABEL_COLUMNS)


@dataclass(frozen=True)
class Run:
    """A finished run folder, read and checked."""

    name: str
    path: Path
    settings: dict
    result: dict
    oof: pd.DataFrame  # by id: fold, label, three probabilities, group
    history: pd.DataFrame
    submission: pd.DataFrame  # by id

    @property
    def is_ladder(self) -> bool:
        """Whether it is `prefcls ladder`'s."""
        return self.settings["backbone"] == "ladder"

    @property
    def group(self) -> tuple:
        """What two runs must share to be compared: training file and fold plan."""
        return self.result["data_sha256"]["train"], *(self.settings[name] for name in FOLD_PLAN)

    def probs(self, ids: Iterable[str]) -> np.ndarray:
        """(N, 3) out-of-sample probabilities of these rows."""
        return self.oof.loc[list(ids), COLUMNS].to_numpy()


@dataclass(frozen=True)
class Found:
    """What was found in the places that were named."""

    runs: list[Run]
    blends: list[tuple[str, Path, dict]]  # name, file, content
    left_out: list[tuple[str, str]]  # what, why


def read_runs(places: Sequence[Path]) -> Found:
    """Read every run folder and blend.json that is, or is in, one of `places`; a broken one is named and left out.

    Raises:
        UserError: a place that is not there.
    """
    runs, blends, left_out = [], [], []
    for place in places:
        if not Path(place).is_dir():
            raise UserError(f"--runs {place}: no such folder. Name a run folder, or a folder of run folders.")
        inside = sorted(path for path in Path(place).iterdir() if path.is_dir() and not path.name.startswith("."))
        for path in [Path(place)] if (Path(place) / "config.json").exists() else inside:
            try:
                runs.append(read_run(path))
            except UserError as error:
                left_out.append((str(path), str(error)))
        for path in sorted(Path(place).glob("*.json")):
            if path.stem.startswith("blend"):
                try:
                    blends.append((path.stem, path, _read_blend(path)))
                except UserError as error:
                    left_out.append((str(path), str(error)))
    order = sorted(runs, key=lambda run: not run.is_ladder)  # else by place, then by name
    return Found(order, blends, left_out)


def read_run(path: Path) -> Run:
    """One finished run folder, checked.

    Raises:
        UserError: a file is missing, broken, or does not belong to the others; says which and what.
    """
    config, result = read_json(path / "config.json"), read_json(path / "result.json")
    settings = config.get("settings") if isinstance(config, dict) else None
    names = {field.name for field in fields(RunConfig)}
    if not isinstance(settings, dict) or not {"backbone", "seed", *FOLD_PLAN} <= {*settings, "fold_seed"}:
        raise UserError(f"{path / 'config.json'}: holds no settings of a run. Copy the run folder again.")
    for name in NUMBERS:
        if not _is_number(result.get(name)):
            raise UserError(f"{path / 'result.json'}: {name} is {result.get(name)!r}, no number. Copy it again.")
    interval = result.get("log_loss_interval")
    sums = result.get("data_sha256")
    if not (isinstance(interval, list) and len(interval) == 2 and isinstance(sums, dict) and "train" in sums):
        raise UserError(f"{path / 'result.json'}: log_loss_interval or data_sha256 is missing. Copy the folder again.")
    known = fill_earlier({name: value for name, value in settings.items() if name in names})
    oof, submission = (_read_predictions(path / name) for name in ("oof.csv", "submission.csv"))
    valid, history = read_table(path / "valid.csv"), read_table(path / "history.csv")
    if len(oof) != result["valid_rows"] or oof.index.has_duplicates:
        raise UserError(
            f"{path / 'oof.csv'}: holds {len(oof)} rows, result.json says {result['valid_rows']}: rows are missing or "
            "doubled. Copy the run folder again."
        )
    if not {"fold", "label"} <= set(oof) or "group" not in valid or set(oof.index) != set(valid.get(ID, ())):
        raise UserError(f"{path / 'oof.csv'}: does not match valid.csv. Copy the run folder again.")
    oof = oof.assign(group=valid.set_index(ID)["group"])
    if not {"log_loss_fold_sd", "expected_calibration_error_if_calibrated"} <= set(result):  # of an earlier version
        scored = (oof[name].to_numpy() for name in ("label", COLUMNS, "group", "fold"))
        result = compare.score_predictions(*scored) | result
    return Run(path.resolve().name, path, known, result, oof, history, submission)


def shared_ids(runs: Sequence[Run]) -> list[str]:
    """The ids of the rows that all runs predicted out of sample, sorted."""
    return sorted(set.intersection(*(set(run.oof.index) for run in runs)))


def compare_runs(one: Run, other: Run) -> compare.Comparison | None:
    """Paired comparison on the rows that both predicted out of sample; None where they share too few."""
    ids = shared_ids((one, other))
    rows = one.oof.loc[ids]
    if one.group != other.group or len(ids) < MIN_SHARED_ROWS or rows["group"].nunique() < 2:
        return None
    return compare.compare(rows["label"].to_numpy(), one.probs(ids), other.probs(ids), rows["group"].to_numpy())


def format_verdicts(comparisons: Sequence[tuple[compare.Comparison, str]]) -> list[str]:
    """The verdicts of a table, one for each (comparison, name of the other), p corrected for all of them."""
    corrected = compare.holm_correction([c for c, _ in comparisons])
    numbers = [f"{c.describe()}, MDE {c.smallest_detectable:.4f}".replace("-", "−") for c in corrected]
    return [f"{c.against(other)}: {text}" for c, (_, other), text in zip(corrected, comparisons, numbers, strict=True)]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _read_predictions(path: Path) -> pd.DataFrame:
    """A table of a run by id, its probabilities checked."""
    table = read_table(path)
    if missing := {ID, *COLUMNS} - set(table.columns):
        raise UserError(f"{path}: the columns {', '.join(sorted(missing))} are missing. Copy the run folder again.")
    scores.check_probs(table[COLUMNS].to_numpy(dtype=float), str(path))
    return table.set_index(ID)


def _read_blend(path: Path) -> dict:
    content = read_json(path)
    names = ("rows", "log_loss", "accuracy", "expected_calibration_error")
    good = isinstance(content, dict) and all(_is_number(content.get(name)) for name in names)
    if not good or not isinstance(content.get("runs"), list) or not isinstance(content.get("comparison"), dict):
        raise UserError(f"{path}: is not what `prefcls blend` writes. Blend the runs again.")
    return content
