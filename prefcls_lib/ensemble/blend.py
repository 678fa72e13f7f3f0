"""Finished runs, read and checked; their blend, fitted on out-of-sample predictions, scored on prompts it never saw.

blend.json   runs (folders, relative to the file where they can be), weights, temperature, tie_bias, and the scores
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.config import RunConfig
from prefcls_lib.data.schema import ID, LABEL_COLUMNS, check_probs
from prefcls_lib.evaluation import compare, scores
from prefcls_lib.evaluation.calibration import Blend, Calibration, blend_cross_fitted, fit_blend
from prefcls_lib.pipeline.folder import read_config, read_table
from prefcls_lib.runtime.files import UserError, read_json, reading, write_json

MIN_SHARED_ROWS = 10  # fewer are an accident, not a validation set
COLUMNS = list(LABEL_COLUMNS)
SHARED = ["label", "fold", "group"]  # what all runs of a blend have in common


@dataclass(frozen=True)
class Run:
    """A finished run folder, read and checked."""

    name: str
    path: Path
    settings: RunConfig
    result: dict
    share: compare.Comparison | None  # the network against its baseline; None: a run of `prefcls ladder`
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
        settings, result = read_config(path), read_json(path / "result.json")
        share = None if result["encoder_share"] is None else compare.Comparison.from_dict(result["encoder_share"])
        oof, submission = (_read_predictions(path / name) for name in ("oof.csv", "submission.csv"))
        if len(oof[["fold", "group"]]) != result["valid_rows"] or not set(oof["label"].astype(str)) <= set("012"):
            raise ValueError(f"oof.csv has {len(oof)} of {result['valid_rows']} rows, or a label is not 0, 1 or 2")
    return Run(path.resolve().name, path, settings, result, share, oof, submission)


def _read_predictions(path: Path) -> pd.DataFrame:
    """A table of a run by id, its probabilities checked."""
    table = read_table(path).set_index(ID)
    if table.index.has_duplicates:
        raise ValueError(f"{path.name}: an id is there more than once")
    check_probs(table[COLUMNS].to_numpy(dtype=float), str(path))
    return table


def fit_runs(folders: list[Path], out: Path) -> dict:
    """Fit the blend of several runs and write `out` (blend.json).

    The blend that is applied is fitted on all shared rows. Its reported log loss is nested: each row is predicted by a
    blend fitted on rows of other prompts.

    Returns:
        The content of blend.json.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"{', '.join(map(str, folders))}: one run is named twice. Name each run once.")
    runs = [read_run(folder) for folder in folders]
    ids = shared_ids(runs)
    _check_shared_rows(runs, ids)
    labels, folds, groups = (runs[0].oof.loc[ids, name].to_numpy() for name in ("label", "fold", "group"))
    predictions = [run.probs(ids) for run in runs]
    nested = blend_cross_fitted(labels, predictions, groups)
    blend = fit_blend(labels, predictions)
    single = [scores.log_loss(labels, probs) for probs in predictions]
    best = int(np.argmin(single))
    result = {
        "runs": [os.path.relpath(folder.resolve(), Path(out).resolve().parent) for folder in folders],
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


def read_blend(path: Path) -> tuple[list[Path], Blend]:
    """What a blend.json holds, without its runs of weight 0: their folders, and the blend."""
    try:
        state = read_json(path)
        blend = Blend.from_dict(state)
        runs = zip(state["runs"], blend.weights, strict=True)
        used = [(Path(path).parent / run, weight) for run, weight in runs if weight > 0]
    except (UserError, LookupError, TypeError, ValueError) as error:
        what = "`prefcls blend` did not write this" if Path(path).is_file() else "no such file"
        raise UserError(f"{path}: {what}. Name a blend.json or a run folder.") from error
    return [place for place, _ in used], Blend(tuple(weight for _, weight in used), blend.calibration)


def mix(predictions: Sequence[Sequence[np.ndarray]], blend: Blend) -> np.ndarray:
    """The blend (N, 3) of the models' probabilities, listed for each run and averaged; runs without any are left out.

    The calibration is that of all runs together.
    """
    means = [np.mean(probs, axis=0) for probs in predictions if probs]
    weights = [weight for weight, probs in zip(blend.weights, predictions, strict=True) if probs]
    calibration = blend.calibration if len(means) == len(predictions) else Calibration()
    if len(means) == 1 and calibration == Calibration():
        return means[0]
    return Blend(tuple(weight / sum(weights) for weight in weights), calibration).apply(means)


def blend_table(result: dict) -> pd.DataFrame:
    """Each run's weight and log loss on the shared rows, and the blend's nested one."""
    table = pd.DataFrame({"weight": result["weights"], "log_loss": result["run_log_loss"]}, index=result["runs"])
    table.loc["blend (nested)"] = [sum(result["weights"]), result["log_loss"]]
    return table


def shared_ids(runs: Sequence[Run]) -> list[str]:
    """The ids of the rows that all runs predicted out of sample, sorted."""
    return sorted(set.intersection(*(set(run.oof.index) for run in runs)))


def _check_shared_rows(runs: list[Run], ids: list[str]) -> None:
    """Stop where the runs share too few rows, or have other rows, folds, labels or prompt groups than the first."""
    if len(ids) < MIN_SHARED_ROWS:
        raise UserError(
            f"{', '.join(str(run.path) for run in runs)}: only {len(ids)} rows were validated in all of these "
            "runs. Name runs with the same train file and the same folds."
        )
    for run in runs[1:]:
        if run.group != runs[0].group or not run.oof.loc[ids, SHARED].equals(runs[0].oof.loc[ids, SHARED]):
            raise UserError(
                f"{run.path}: has other rows, folds or labels than {runs[0].path}. Name runs with the same train file, "
                "num_folds, fold_seed and max_train_rows."
            )
