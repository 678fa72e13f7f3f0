"""Cross-validation of the baselines on the folds that the networks use, with confidence intervals."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from prefcls_lib.baselines.columns import read_inputs
from prefcls_lib.baselines.estimators import ENSEMBLE, MEMBERS, Baseline, fit_baseline, join_members
from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.data.splits import without_shared_prompts
from prefcls_lib.evaluation.calibration import cross_fit_parts, geometric_mean
from prefcls_lib.evaluation.compare import bootstrap_interval, standard_error
from prefcls_lib.evaluation.scores import accuracy, row_losses
from prefcls_lib.runtime.files import UserError
from prefcls_lib.runtime.progress import progress_bar


@dataclass(frozen=True)
class OutOfSample:
    """One baseline's predictions of rows that it was not fitted on."""

    probs: np.ndarray  # (N, 3); NaN where the row's fold is not in run_folds
    baselines: tuple[Baseline, ...]  # one for each of run_folds, in that order
    seconds: float  # fitting and predicting, all folds; without `read_inputs` and without members fitted before


def cross_validate(
    names: Sequence[str],
    rows: pd.DataFrame,
    folds: np.ndarray,
    run_folds: Sequence[int],
    seed: int,
    structure: np.ndarray | None = None,
    progress: bool = True,
    extra: pd.DataFrame | None = None,
) -> dict[str, OutOfSample]:
    """Fit each baseline once for each fold of `run_folds`, on all other folds, and predict that fold.

    The ensemble's members are not fitted again where they come before it in `names`.

    Args:
        rows: labelled rows of `loading.read_rows`.
        folds: (N,) from `splits.assign_folds`.
        run_folds: folds to predict; the others only train.
        structure: raw structure features (N, F) of the rows, where they are computed already.
        progress: show a bar.
        extra: more rows to fit on, with their `source`; none that shares a prompt with the predicted fold is used.

    Raises:
        UserError: a prompt group in two folds, a fold without rows or with one class only.
    """
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy()
    _check_folds(labels, groups, folds, run_folds)
    probs = {name: np.full((len(rows), NUM_CLASSES), np.nan) for name in names}
    baselines: dict[str, list[Baseline]] = {name: [] for name in names}
    seconds = dict.fromkeys(names, 0.0)
    bar = progress_bar(len(run_folds) * len(names), "ladder", "fit", shown=progress)
    with bar, threadpool_limits(limits=1):  # the fits are small: more threads are slower
        bar.set_postfix_str("reading the answers")
        inputs = read_inputs(rows, names, structure)
        if extra is not None:
            inputs = inputs.joined(read_inputs(extra, names))
            labels, groups = (np.append(rows[name], extra[name]) for name in ("label", "group"))
        for fold in run_folds:
            train, valid = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            if extra is not None:
                train = np.append(train, len(rows) + without_shared_prompts(extra, rows, folds, fold))
            train_inputs, valid_inputs = inputs.take(train), inputs.take(valid)
            fitted: dict[str, Baseline] = {}
            for name in names:
                bar.set_postfix_str(f"fold {fold}, {name}")
                start = time.perf_counter()
                if name == ENSEMBLE and fitted.keys() >= set(MEMBERS):
                    fitted[name] = join_members([fitted[member] for member in MEMBERS])
                    probs[name][valid] = geometric_mean(np.stack([probs[member][valid] for member in MEMBERS]))
                else:
                    fitted[name] = fit_baseline(name, train_inputs, labels[train], groups[train], seed)
                    probs[name][valid] = fitted[name].predict_proba(valid_inputs)
                baselines[name].append(fitted[name])
                seconds[name] += time.perf_counter() - start
                bar.update()
    return {name: OutOfSample(probs[name], tuple(baselines[name]), seconds[name]) for name in names}


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


def choose_entry(
    results: dict[str, OutOfSample], labels: np.ndarray, groups: np.ndarray, folds: np.ndarray
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The ladder's entry: the ensemble, or the geometric mean of the two baselines with the lowest log loss.

    On few rows noise decides which two those are. So they are taken only if they are better than the ensemble by more
    than one standard error of the difference, after the rule of Breiman, Friedman, Olshen and Stone 1984,
    Classification and Regression Trees, who take the standard error of the best one's loss.

    Args:
        results: of baselines on the same rows, the ensemble and at least two others.
        folds: (N,) as for `cross_validate`.

    Returns:
        names: the choice on all predicted rows; of two, the best first.
        cross_fitted: (N, 3), each fold predicted by what is chosen on the other folds (a single fold: each half of its
            prompt groups by what is chosen on the other half); NaN on rows that were not predicted.
        naive: (N, 3) of the choice `names`, which was made on these rows.
    """
    done = np.isfinite(results[ENSEMBLE].probs[:, 0])
    predictions = np.stack([result.probs[done] for result in results.values()])
    losses = np.stack([row_losses(labels[done], probs) for probs in predictions])
    ensemble = list(results).index(ENSEMBLE)

    def choose(rows: np.ndarray | slice) -> list[int]:
        best = np.argsort(losses[:, rows].mean(axis=1), kind="stable")[:2]
        gain = losses[ensemble, rows] - row_losses(labels[done][rows], geometric_mean(predictions[best][:, rows]))
        return list(best) if gain.mean() > standard_error(gain, groups[done][rows]) else [ensemble]

    cross_fitted, naive = (np.full((len(labels), NUM_CLASSES), np.nan) for _ in range(2))
    parts = cross_fit_parts(folds[done], groups[done], "ladder")
    for part in np.unique(parts):
        here = parts == part
        cross_fitted[np.flatnonzero(done)[here]] = geometric_mean(predictions[choose(~here)][:, here])
    chosen = choose(slice(None))
    naive[done] = geometric_mean(predictions[chosen])
    return [list(results)[number] for number in chosen], cross_fitted, naive


def _check_folds(labels: np.ndarray, groups: np.ndarray, folds: np.ndarray, run_folds: Sequence[int]) -> None:
    found = pd.Series(folds).groupby(groups, sort=False).agg(["min", "max"])
    for group, (one, other) in found[found["min"] != found["max"]].iterrows():
        raise UserError(
            f"folds: prompt group {group} is in folds {one} and {other}, so that validation rows would share prompts "
            "with training rows. Make the folds with `splits.assign_folds`."
        )
    for fold in run_folds:
        classes = len(np.unique(labels[folds == fold]))
        if classes < 2:
            state = "has no rows" if classes == 0 else "has rows of one class only"
            raise UserError(f"folds: fold {fold} {state}. Give more rows or set num_folds lower.")
