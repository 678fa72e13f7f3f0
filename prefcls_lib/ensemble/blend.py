"""Blend runs: weights, temperature and tie bias fitted on out-of-sample predictions, scored on folds they never saw.

blend.json   runs (folders, relative to the file where they can be), weights, temperature, tie_bias, and the scores
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.ensemble.finished import Run, read_run
from prefcls_lib.evaluation import compare, scores
from prefcls_lib.evaluation.calibration import Blend, blend_out_of_fold, fit_blend
from prefcls_lib.runtime.files import UserError, read_json, reading, write_json

MIN_SHARED_ROWS = 10  # fewer are an accident, not a validation set


def fit_runs(folders: list[Path], out: Path) -> dict:
    """Fit the blend of several runs and write `out` (blend.json).

    The blend that is applied is fitted on all shared rows. Its reported log loss is nested: each fold's rows are
    predicted by a blend fitted on the other folds (on one fold: on the other half of its prompt groups).

    Returns:
        The content of blend.json.
    """
    runs = [read_run(folder) for folder in folders]
    ids = shared_ids(runs)
    _check_shared_rows(runs, ids)
    labels, folds, groups = (runs[0].oof.loc[ids, name].to_numpy() for name in ("label", "fold", "group"))
    predictions = [run.probs(ids) for run in runs]
    nested = blend_out_of_fold(labels, predictions, folds, groups)
    blend = fit_blend(labels, predictions)
    single = [scores.log_loss(labels, probs) for probs in predictions]
    best = int(np.argmin(single))
    place = Path(out).resolve().parent
    result = {
        "runs": [Path(os.path.relpath(folder.resolve(), place)).as_posix() for folder in folders],
        **blend.to_dict(),
        "rows": len(labels),
        **compare.score_predictions(labels, nested, groups, folds),
        "log_loss_fitted_rows": scores.log_loss(labels, blend.apply(predictions)),
        "run_log_loss": single,
        "best_run": best,
        "comparison": compare.compare(labels, nested, predictions[best], groups).to_dict(),
    }
    write_json(out, result)
    return result


def read_blend(path: Path) -> tuple[Blend, list[Path]]:
    """What a blend.json holds, without its runs of weight 0: the blend, and their folders."""
    with reading(path, "Fit the blend again."):
        state = read_json(path)
        blend = Blend.from_dict(state)
        runs = zip(state["runs"], blend.weights, strict=True)
        used = [(Path(path).parent / run, weight) for run, weight in runs if weight > 0]
    return Blend(tuple(weight for _, weight in used), blend.calibration), [place for place, _ in used]


def blend_table(result: dict) -> pd.DataFrame:
    """Each run's weight and log loss on the shared rows, and the blend's nested one."""
    columns = {"run": "runs", "weight": "weights", "log_loss": "run_log_loss"}
    table = pd.DataFrame({name: result[key] for name, key in columns.items()}).set_index("run")
    table.loc["blend (nested)"] = [sum(result["weights"]), result["log_loss"]]
    return table


def shared_ids(runs: Sequence[Run]) -> list[str]:
    """The ids of the rows that all runs predicted out of sample, sorted."""
    return sorted(set.intersection(*(set(run.oof.index) for run in runs)))


def _check_shared_rows(runs: list[Run], ids: list[str]) -> None:
    """Stop where the runs share too few rows, or disagree with the first on labels, folds or prompt groups."""
    if len(ids) < MIN_SHARED_ROWS:
        raise UserError(
            f"{', '.join(str(run.path) for run in runs)}: only {len(ids)} rows were predicted out of sample by all of "
            "these runs. A blend needs runs on the same train file, validated on the same folds."
        )
    for run in runs[1:]:
        for column in ("label", "fold", "group"):
            differs = run.oof.loc[ids, column].to_numpy() != runs[0].oof.loc[ids, column].to_numpy()
            if differs.any():
                raise UserError(
                    f"{run.path / 'oof.csv'}: id {ids[int(np.argmax(differs))]} has another {column} than in "
                    f"{runs[0].path}. A blend needs runs on the same data with the same num_folds, fold_seed and "
                    "max_train_rows."
                )
