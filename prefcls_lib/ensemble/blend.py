"""Blend runs: weights, temperature and tie bias fitted on out-of-sample predictions, scored on folds they never saw.

blend.json   runs (folders, relative to the file where they can be), weights, temperature, tie_bias, and the scores
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.data.schema import ID, LABEL_COLUMNS
from prefcls_lib.evaluation import metrics
from prefcls_lib.evaluation.calibration import Blend, blend_out_of_fold, fit_blend
from prefcls_lib.pipeline.folder import RunFolder, read_table
from prefcls_lib.pipeline.predict import predict_run
from prefcls_lib.runtime.files import UserError, read_json, write_json

MIN_SHARED_ROWS = 10  # fewer are an accident, not a validation set


@dataclass(frozen=True)
class SharedRows:
    """The rows that every run predicted out of sample, in order of id.

    Attributes:
        labels, folds, groups: (N,).
        predictions: one (N, 3) array a run.
    """

    labels: np.ndarray
    folds: np.ndarray
    groups: np.ndarray
    predictions: list[np.ndarray]


def read_shared_rows(folders: list[Path]) -> SharedRows:
    """Out-of-sample predictions of the rows that all runs share.

    Raises:
        UserError: a run is not complete, misses rows, or disagrees with the first on labels, folds or prompt groups;
            probabilities that are none; no shared rows.
    """
    tables = [_read_oof(folder) for folder in folders]
    ids = sorted(set.intersection(*(set(table.index) for table in tables)))
    if len(ids) < MIN_SHARED_ROWS:
        raise UserError(
            f"{', '.join(map(str, folders))}: only {len(ids)} rows were predicted out of sample by all of these runs. "
            "A blend needs runs on the same train file, validated on the same folds."
        )
    first = tables[0].loc[ids]
    for folder, table in zip(folders[1:], tables[1:], strict=True):
        for column in ("label", "fold", "group"):
            differs = table.loc[ids, column].to_numpy() != first[column].to_numpy()
            if differs.any():
                row = ids[int(np.argmax(differs))]
                raise UserError(
                    f"{folder / 'oof.csv'}: id {row} has another {column} than in {folders[0]}. A blend needs runs on "
                    "the same data with the same num_folds, seed and max_train_rows."
                )
    return SharedRows(
        first["label"].to_numpy(),
        first["fold"].to_numpy(),
        first["group"].to_numpy(),
        [table.loc[ids, list(LABEL_COLUMNS)].to_numpy() for table in tables],
    )


def fit_runs(folders: list[Path], out: Path) -> dict:
    """Fit the blend of several runs and write `out` (blend.json).

    The blend that is applied is fitted on all shared rows. Its reported log loss is nested: each fold's rows are
    predicted by a blend fitted on the other folds (on one fold: on the other half of its prompt groups).

    Returns:
        The content of blend.json.
    """
    shared = read_shared_rows(folders)
    labels, groups = shared.labels, shared.groups
    nested = blend_out_of_fold(labels, shared.predictions, shared.folds, groups)
    blend = fit_blend(labels, shared.predictions)
    single = [metrics.log_loss(labels, probs) for probs in shared.predictions]
    best = int(np.argmin(single))
    place = Path(out).resolve().parent
    result = {
        "runs": [Path(os.path.relpath(folder.resolve(), place)).as_posix() for folder in folders],
        **blend.to_dict(),
        "rows": len(labels),
        "log_loss": metrics.log_loss(labels, nested),
        "log_loss_interval": list(metrics.bootstrap_interval(metrics.row_losses(labels, nested), groups)),
        "log_loss_fitted_rows": metrics.log_loss(labels, blend.apply(shared.predictions)),
        "accuracy": metrics.accuracy(labels, nested),
        "brier_score": metrics.brier_score(labels, nested),
        "expected_calibration_error": metrics.expected_calibration_error(labels, nested),
        "run_log_loss": single,
        "best_run": best,
        "comparison": metrics.compare(labels, nested, shared.predictions[best], groups).to_dict(),
    }
    write_json(out, result)
    return result


def predict_blend(path: Path, rows: pd.DataFrame) -> np.ndarray:
    """Probabilities (N, 3) of new rows by the saved models of every run in a blend.json.

    Raises:
        UserError: blend.json is broken, or a run folder is gone.
    """
    state = read_json(path)
    blend = Blend.from_dict(state)
    runs = state.get("runs")
    if not isinstance(runs, list) or len(runs) != len(blend.weights):
        raise UserError(f"{path}: names {runs!r} as runs for {len(blend.weights)} weights. Fit the blend again.")
    folders = [RunFolder(Path(path).parent / run) for run in runs]
    for folder in folders:
        if not folder.path.is_dir():
            raise UserError(f"{path}: its run folder {folder.path} is gone. Put it back, or fit the blend again.")
    used = [folder if weight > 0 else None for folder, weight in zip(folders, blend.weights, strict=True)]
    uniform = np.full((len(rows), len(LABEL_COLUMNS)), 1 / len(LABEL_COLUMNS))  # of a run with weight 0
    return blend.apply([uniform if folder is None else predict_run(folder, rows)[0] for folder in used])


def blend_table(result: dict) -> pd.DataFrame:
    """Each run's weight and log loss on the shared rows, and the blend's nested one."""
    lines = [
        {"run": run, "weight": weight, "log_loss": loss}
        for run, weight, loss in zip(result["runs"], result["weights"], result["run_log_loss"], strict=True)
    ]
    lines.append({"run": "blend (nested)", "weight": sum(result["weights"]), "log_loss": result["log_loss"]})
    return pd.DataFrame(lines).set_index("run")


def _read_oof(folder: Path) -> pd.DataFrame:
    """A complete run's out-of-sample table with prompt groups, by id."""
    result = read_json(folder / "result.json")
    table = read_table(folder / "oof.csv")
    groups = read_table(folder / "valid.csv")
    columns = [ID, "fold", "label", *LABEL_COLUMNS]
    if list(table.columns) != columns or "group" not in groups:
        raise UserError(f"{folder / 'oof.csv'}: expected the columns {', '.join(columns)}. Copy the run folder again.")
    if len(table) != result.get("valid_rows") or table[ID].duplicated().any() or set(table[ID]) != set(groups[ID]):
        raise UserError(
            f"{folder / 'oof.csv'}: holds {len(table)} rows, result.json says {result.get('valid_rows')}: rows are "
            "missing or doubled. Copy the run folder again."
        )
    metrics.check_probs(table[list(LABEL_COLUMNS)].to_numpy(dtype=float), str(folder / "oof.csv"))
    return table.set_index(ID).assign(group=groups.set_index(ID)["group"])
