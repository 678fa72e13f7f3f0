"""A finished run folder, read and checked. Two runs can be compared if training file and fold plan are the same."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.config import RunConfig
from prefcls_lib.data.schema import ID, LABEL_COLUMNS
from prefcls_lib.evaluation.compare import Comparison
from prefcls_lib.evaluation.scores import check_probs
from prefcls_lib.pipeline.folder import read_table
from prefcls_lib.runtime.files import read_json, reading, shown

COLUMNS = list(LABEL_COLUMNS)
NUMBERS = ("log_loss", "accuracy", "expected_calibration_error", "expected_calibration_error_if_calibrated",
           "calibrated_log_loss", "calibrated_expected_calibration_error", "baseline_log_loss", "seconds", "rows",
           "valid_rows")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run folder, read and checked."""

    name: str
    path: Path
    settings: RunConfig
    result: dict
    share: Comparison | None  # the network against its baseline; None: a run of `prefcls ladder`, without a network
    oof: pd.DataFrame  # by id: fold, label, group, three probabilities
    submission: pd.DataFrame  # by id

    @property
    def group(self) -> tuple:
        """What two runs must share to be compared: training file and fold plan."""
        plan = self.settings.num_folds, self.settings.fold_seed, self.settings.max_train_rows
        return self.result["data_sha256"]["train"], *plan

    def probs(self, ids: Iterable[str]) -> np.ndarray:
        """(N, 3) out-of-sample probabilities of these rows."""
        return self.oof.loc[list(ids), COLUMNS].to_numpy()


def read_run(path: Path) -> Run:
    """One finished run folder; a file that is missing, broken, or does not belong to the others is a UserError."""
    with reading(path, "Copy the run folder again."):
        config, result = read_json(path / "config.json"), read_json(path / "result.json")
        settings = RunConfig.from_mapping(config["settings"], str(path / "config.json"))
        share = None if result["encoder_share"] is None else Comparison.from_dict(result["encoder_share"])
        lines = [line[name] for line in result["baselines"] for name in ("log_loss", "low", "high", "accuracy")]
        values = [*lines, *result["log_loss_interval"], *(result[name] for name in NUMBERS)]
        wrong = [value for value in values if not isinstance(value, (int, float)) or not math.isfinite(value)]
        if wrong or not isinstance(result["data_sha256"]["train"], str):
            raise ValueError(f"result.json: {shown(wrong)} should be numbers")
        oof, submission = (_read_predictions(path / name) for name in ("oof.csv", "submission.csv"))
        if len(oof[["fold", "group"]]) != result["valid_rows"] or not set(oof["label"].astype(str)) <= set("012"):
            what = f"oof.csv holds {len(oof)} rows, result.json says {result['valid_rows']}"
            raise ValueError(f"{what}: rows are missing, or a label is not 0, 1 or 2")
    return Run(path.resolve().name, path, settings, result, share, oof, submission)


def _read_predictions(path: Path) -> pd.DataFrame:
    """A table of a run by id, its probabilities checked."""
    table = read_table(path).set_index(ID)
    if table.index.has_duplicates:
        raise ValueError(f"{path.name}: an id is there more than once")
    check_probs(table[COLUMNS].to_numpy(dtype=float), str(path))
    return table
