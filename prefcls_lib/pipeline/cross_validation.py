"""The baselines on the folds that the networks use, with confidence intervals."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from prefcls_lib.baselines.columns import read_inputs
from prefcls_lib.baselines.estimators import BASELINES, ENSEMBLE, MEMBERS
from prefcls_lib.baselines.out_of_fold import BaselineMean, fit_out_of_fold, fit_simple
from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.data.splits import without_shared_prompts
from prefcls_lib.evaluation.compare import bootstrap_interval
from prefcls_lib.evaluation.scores import accuracy, row_losses


@dataclass(frozen=True)
class OutOfSample:
    """One baseline's predictions of rows that it was not fitted on."""

    probs: np.ndarray  # (N, 3); NaN where the row's fold is not in run_folds
    baselines: tuple[BaselineMean, ...]  # one for each of run_folds, in that order
    seconds: float


def cross_validate(
    rows: pd.DataFrame,
    folds: np.ndarray,
    run_folds: Sequence[int],
    seed: int,
    structure: np.ndarray | None = None,
    extra: pd.DataFrame | None = None,
    fitted: Sequence[str] = (),
) -> dict[str, OutOfSample]:
    """Each baseline (but those already `fitted`) without each fold of `run_folds`, and its predictions of that fold."""
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy()
    names = [name for name in BASELINES if name not in fitted]
    probs = {name: np.full((len(rows), NUM_CLASSES), np.nan) for name in names}
    baselines: dict[str, list[BaselineMean]] = {name: [] for name in names}
    started, inputs = time.perf_counter(), read_inputs(rows, structure)
    if extra is not None:
        inputs = inputs.joined(read_inputs(extra))
        labels, groups = (np.append(rows[name], extra[name]) for name in ("label", "group"))
    for fold in run_folds:
        train, valid = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        if extra is not None:
            train = np.append(train, len(rows) + without_shared_prompts(extra, rows, folds, fold))
        train_inputs, valid_inputs = inputs.take(train), inputs.take(valid)
        found = {name: BaselineMean((one,)) for name, one in fit_simple(train_inputs, labels[train]).items()}
        for name in ("structure_logistic", ENSEMBLE):
            if name in names:
                found[name], _ = fit_out_of_fold(name, train_inputs, labels[train], groups[train], seed)
        if ENSEMBLE in names:
            found |= {name: found[ENSEMBLE].member(name) for name in MEMBERS}
        elif set(MEMBERS) & set(names):
            for name in set(MEMBERS) & set(names):
                found[name], _ = fit_out_of_fold(name, train_inputs, labels[train], groups[train], seed)
        for name in names:
            probs[name][valid] = found[name].predict_proba(valid_inputs)
            baselines[name].append(found[name])
    seconds = time.perf_counter() - started
    return {name: OutOfSample(probs[name], tuple(baselines[name]), seconds) for name in names}


def ladder_table(results: dict[str, OutOfSample], labels: np.ndarray, groups: np.ndarray) -> pd.DataFrame:
    """One line a baseline, on the rows it predicted: rung, log_loss, low, high (95 % interval), accuracy, seconds."""
    lines = []
    for name, result in results.items():
        done = np.isfinite(result.probs[:, 0])
        losses = row_losses(labels[done], result.probs[done])
        low, high = bootstrap_interval(losses, groups[done])
        line = {"rung": name, "log_loss": losses.mean(), "low": low, "high": high}
        lines.append(line | {"accuracy": accuracy(labels[done], result.probs[done]), "seconds": result.seconds})
    return pd.DataFrame(lines)
