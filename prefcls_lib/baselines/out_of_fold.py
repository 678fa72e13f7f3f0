"""A baseline fitted out of fold: its log-odds are the starting point of a network.

    m = (log pA - log pB) / 2,   t = log pT - (log pA + log pB) / 2,   offset = (m, -m, t)

softmax(offset) are the baseline's probabilities, and swapping the answers swaps them. A baseline fits the rows that it
was trained on better than others, and a network must not learn to rely on that. So the training rows are cut into
INNER_FOLDS by prompt group, one model is fitted without each, and a training row's offset comes from the model that has
seen no row of its prompt. Every other row gets the mean offset of all models: the geometric mean of their
probabilities. An ensemble is that mean over the models of all its members.
"""

import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import psutil
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.special import softmax
from threadpoolctl import threadpool_limits

from prefcls_lib.baselines.columns import ROWS_AT_ONCE, BaselineInputs, read_inputs, tie_shares_shift
from prefcls_lib.baselines.estimators import ENSEMBLE, MEMBERS, MODELS, Baseline, LengthBins, Prior, fit_prior
from prefcls_lib.data.features import FEATURE_NAMES
from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.evaluation.scores import row_losses
from prefcls_lib.runtime.files import UserError, reading

BASELINE_FILE = "baseline.safetensors"
INNER_FOLDS = 5  # of the models that are kept
TUNING_ROWS = 10_000  # held-out rows that choose a strength, in whole inner folds
MIN_ROWS_TO_SHARE = 5000  # with fewer training rows, starting processes takes longer than fitting
WORKER_BYTES, WORKER_BYTES_PER_ROW = 300_000_000, 8_000  # of memory, as measured (report/log.md)


def log_odds(probs: np.ndarray) -> np.ndarray:
    """Offsets (N, 3) = (m, -m, t) of probabilities (N, 3); softmax gives the probabilities back."""
    a, b, tie = np.log(np.clip(probs, np.finfo(np.float64).tiny, None)).T
    return np.column_stack([(a - b) / 2, (b - a) / 2, tie - (a + b) / 2])


@dataclass(frozen=True)
class BaselineMean:
    """Fitted baselines whose log-odds are averaged."""

    models: tuple[Baseline, ...]

    def members(self) -> dict[str, "BaselineMean"]:
        """The models of each member of an ensemble, by its name."""
        names = sorted({model.name for model in self.models})
        return {name: BaselineMean(tuple(one for one in self.models if one.name == name)) for name in names}

    def predict(self, inputs: BaselineInputs) -> np.ndarray:
        """Offsets (N, 3) of rows that the baseline was not trained on."""
        rows = np.arange(len(inputs.kinds))
        blocks = map(inputs.take, np.array_split(rows, len(rows) // ROWS_AT_ONCE + 1))
        offsets = ([log_odds(model.predict_proba(block)) for model in self.models] for block in blocks)
        return np.concatenate([np.mean(of_models, axis=0) for of_models in offsets])

    def read_inputs(self, rows: pd.DataFrame) -> BaselineInputs:
        """What the models read of rows, the words only where one of them does: see `columns.read_inputs`."""
        return read_inputs(rows, any(model.reads_text for model in self.models))

    def predict_proba(self, inputs: BaselineInputs, label: str = "") -> np.ndarray:
        """Probabilities (N, 3), the geometric mean of the models'; `label`: as a network's, without effect."""
        return softmax(self.predict(inputs), axis=1)

    def file_shifts(self, labels: np.ndarray, sources: np.ndarray) -> np.ndarray:
        """(K,) the baseline's tie shift of each extra file; of a model without, that of the files' shares of ties."""
        shifts = tie_shares_shift(labels, sources)
        fitted = [model.state.get("tie_shifts", shifts) for model in self.models]
        return np.mean([values if len(values) == len(shifts) else shifts for values in fitted], axis=0)

    def save(self, folder: Path) -> None:
        """Write the models' arrays and the names of the features into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            f"{number}/{model.name}/{name}": np.array(value, order="C")
            for number, model in enumerate(self.models)
            for name, value in model.state.items()
        }
        save_file(arrays, folder / BASELINE_FILE, {"features": " ".join(FEATURE_NAMES)})

    @classmethod
    def load(cls, folder: Path) -> "BaselineMean":
        """Read `save` back; predictions are the same to the bit. Runs no code from the file."""
        path, states = folder / BASELINE_FILE, defaultdict(dict)
        with reading(path, "Copy the run again."), safe_open(path, "numpy") as file:
            if file.metadata() != {"features": " ".join(FEATURE_NAMES)}:
                raise UserError(f"{path}: not a baseline of this version of prefcls_lib. Run again.")
            for key in sorted(file.keys()):
                number, name, array = key.split("/")
                states[int(number), name][array] = file.get_tensor(key)
            return cls(tuple(MODELS[name](state) for (_, name), state in sorted(states.items())))


def fit_simple(inputs: BaselineInputs, labels: np.ndarray) -> dict[str, Baseline]:
    """The baselines that no network starts from, by name, fitted once on training rows with labels (N,)."""
    return {kind.name: next(kind.fit_path(inputs, labels, kind.choices)) for kind in (Prior, LengthBins)}


def fit_out_of_fold(
    name: str, inputs: BaselineInputs, labels: np.ndarray, groups: np.ndarray, seed: int, label: str = ""
) -> tuple[BaselineMean, np.ndarray]:
    """Fit a baseline on the training rows of an outer fold, one model a member and inner fold.

    All strengths are tried in as many inner folds as hold out TUNING_ROWS rows, the best one in the others.

    Args:
        name: one of `estimators.MODELS`, or the ensemble.
        inputs, labels (N,), prompt groups (N,): of the training rows; nothing of the outer fold's validation rows.
        seed: fixes the inner folds.
        label: begins the printed lines, one a fit; "" prints none.

    Returns:
        The models, and the training rows' offsets (N, 3), each row's by the models that were fitted without it.
    """
    kinds = [MODELS[one] for one in (MEMBERS if name == ENSEMBLE else (name,))]
    inner = assign_inner_folds(groups, seed)
    folds = np.unique(inner)
    tuning = folds[: np.searchsorted(np.cumsum(np.bincount(inner)[folds]), TUNING_ROWS) + 1]
    strengths = {kind: kind.strengths(len(labels)) for kind in kinds}
    fitted = _fit_all(kinds, tuning, strengths, inputs, labels, inner, label)
    for kind in kinds:
        losses = np.sum([[loss for *_, loss in fitted[kind, fold]] for fold in tuning], axis=0)
        best = int(losses.argmin())
        fitted |= {(kind, fold): fitted[kind, fold][best : best + 1] for fold in tuning}
        strengths[kind] = strengths[kind][best : best + 1]
        if label and len(losses) > 1:
            print(f"{label}: {kind.name}, strength {strengths[kind][0]:g} is the best of {len(losses)}", flush=True)
    fitted |= _fit_all(kinds, folds[len(tuning) :], strengths, inputs, labels, inner, label)
    offsets = np.zeros((len(labels), NUM_CLASSES))
    for (_, fold), [(_, values, _)] in fitted.items():
        offsets[inner == fold] += values / len(kinds)
    return BaselineMean(tuple(fitted[kind, fold][0][0] for kind in kinds for fold in folds)), offsets


def assign_inner_folds(groups: np.ndarray, seed: int) -> np.ndarray:
    """(N,) the inner fold of each row: prompt groups in random order, distributed over INNER_FOLDS."""
    _, index = np.unique(groups, return_inverse=True)
    return np.random.default_rng([seed, INNER_FOLDS]).permutation(index.max() + 1)[index] % INNER_FOLDS


def _fit_all(
    kinds: list, folds: np.ndarray, strengths: dict, inputs: BaselineInputs, labels: np.ndarray, inner: np.ndarray,
    label: str,
) -> dict[tuple, list[tuple[Baseline, np.ndarray, float]]]:  # fmt: skip
    """For each kind and fold the path that `_fit_path` gives, in processes side by side; prints a line for each."""
    plan, paths = [(kind, fold) for kind in kinds for fold in folds], {}
    jobs, without_text = 1, replace(inputs, counts=None)
    if len(labels) >= MIN_ROWS_TO_SHARE:
        room = psutil.virtual_memory().available // (WORKER_BYTES + WORKER_BYTES_PER_ROW * len(labels))
        jobs = max(1, min(len(plan), joblib.cpu_count(), room))
    call = joblib.delayed(_fit_path)
    calls = (call(kind, inputs if kind.reads_text else without_text, labels, inner == fold, strengths[kind])
             for kind, fold in plan)  # fmt: skip
    for (kind, fold), (path, seconds) in zip(plan, joblib.Parallel(jobs, return_as="generator")(calls), strict=True):
        paths[kind, fold] = path
        if label:
            missing = ", a class is missing: the class shares take its place" if "prior" in path[0][0].state else ""
            print(f"{label}: {kind.name}, inner fold {fold}: {seconds:.1f} s{missing}", flush=True)
    return paths


def _fit_path(
    kind: type[Baseline], inputs: BaselineInputs, labels: np.ndarray, held_out: np.ndarray, strengths: tuple
) -> tuple[list[tuple[Baseline, np.ndarray, float]], float]:
    """For each strength a model that was fitted without the rows `held_out` (N,) bool, its offsets of these, and their
    summed loss, in which extra rows do not count; and the seconds that all took."""
    started = time.perf_counter()
    train, rest = (inputs.take(np.flatnonzero(rows)) for rows in (~held_out, held_out))
    with threadpool_limits(limits=1):
        if len(np.unique(labels[~held_out][train.sources == 0])) == NUM_CLASSES:
            models = kind.fit_path(train, labels[~held_out], strengths)
        else:  # the shares of all rows: what the untrained network predicts, too
            models = [kind(fit_prior(labels, inputs.sources))] * len(strengths)
        path, own = [], rest.sources == 0
        for model in models:
            probs = model.predict_proba(rest)
            path.append((model, log_odds(probs), row_losses(labels[held_out][own], probs[own]).sum()))
    return path, time.perf_counter() - started
