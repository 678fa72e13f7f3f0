"""A baseline fitted out of fold: its log-odds are the starting point of a network.

    m = (log pA - log pB) / 2,   t = log pT - (log pA + log pB) / 2,   offset = (m, -m, t)

softmax(offset) are the baseline's probabilities, and swapping the answers swaps them. A baseline fits the rows that it
was trained on better than others, and a network must not learn to rely on that. So the training rows are cut into
INNER_FOLDS by prompt group, one model is fitted without each, and a training row's offset comes from the model that has
seen no row of its prompt. Every other row gets the mean offset of all models: the geometric mean of their
probabilities. An ensemble is that mean over the models of all its members.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import psutil
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.special import softmax
from threadpoolctl import threadpool_limits

from prefcls_lib.baselines.columns import ROWS_AT_ONCE, BaselineInputs, read_inputs, tie_shares_shift
from prefcls_lib.baselines.estimators import ENSEMBLE, MEMBERS, MODELS, Baseline, LengthBins, Prior
from prefcls_lib.data.features import FEATURE_NAMES
from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.evaluation.scores import row_losses
from prefcls_lib.runtime.files import UserError, read_json, write_json

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

    @property
    def names(self) -> set[str]:
        """Those of the models."""
        return {model.name for model in self.models}

    def member(self, name: str) -> "BaselineMean":
        """The models of one member of an ensemble."""
        return BaselineMean(tuple(model for model in self.models if model.name == name))

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
        """Write baseline.json, which names the models and features, and baseline.safetensors into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {"models": [model.name for model in self.models], "features": FEATURE_NAMES}
        write_json(folder / "baseline.json", state)
        arrays = {
            f"{number}/{name}": np.array(value, order="C")
            for number, model in enumerate(self.models)
            for name, value in model.state.items()
        }
        save_file(arrays, folder / "baseline.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "BaselineMean":
        """Read `save` back; predictions are the same to the bit. Runs no code from the files."""
        saved, path = read_json(folder / "baseline.json"), folder / "baseline.safetensors"
        names = saved.get("models", [])
        if saved.get("features") != list(FEATURE_NAMES) or not names or not set(names) <= set(MODELS):
            raise UserError(f"{folder}: not a baseline of this version of prefcls_lib. Run again.")
        try:
            states: list[dict] = [{} for _ in names]
            for key, value in load_file(path).items():
                number, _, name = key.partition("/")
                states[int(number)][name] = value
        except (OSError, ValueError, IndexError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}). Copy the run again.") from error
        return cls(tuple(MODELS[name](state) for name, state in zip(names, states, strict=True)))


def fit_simple(inputs: BaselineInputs, labels: np.ndarray) -> dict[str, Baseline]:
    """The baselines that nothing starts from, by name: a comparison asks what a network adds to them, too."""
    return {kind.name: kind.fit(inputs, labels) for kind in (Prior, LengthBins)}


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
    scored = np.isin(inner, tuning) & (inputs.sources == 0)  # extra rows do not count
    for kind in kinds:
        totals = []
        for number, _ in enumerate(strengths[kind]):
            values = np.zeros((len(labels), NUM_CLASSES))
            for fold in tuning:
                values[inner == fold] = fitted[kind, fold][number][1]
            totals.append(row_losses(labels[scored], softmax(values[scored], axis=1)).sum())
        best = int(np.argmin(totals))
        fitted |= {(kind, fold): fitted[kind, fold][best : best + 1] for fold in tuning}
        strengths[kind] = strengths[kind][best : best + 1]
        if label and len(totals) > 1:
            print(f"{label}: {kind.name}, strength {strengths[kind][0]:g} is the best of {len(totals)}", flush=True)
    fitted |= _fit_all(kinds, folds[len(tuning) :], strengths, inputs, labels, inner, label)
    offsets = np.zeros((len(labels), NUM_CLASSES))
    for (_, fold), [(_, values)] in fitted.items():
        offsets[inner == fold] += values / len(kinds)
    return BaselineMean(tuple(fitted[kind, fold][0][0] for kind in kinds for fold in folds)), offsets


def assign_inner_folds(groups: np.ndarray, seed: int) -> np.ndarray:
    """(N,) the inner fold of each row: prompt groups in random order, dealt out to INNER_FOLDS."""
    _, index = np.unique(groups, return_inverse=True)
    return np.random.default_rng([seed, INNER_FOLDS]).permutation(index.max() + 1)[index] % INNER_FOLDS


def _fit_all(
    kinds: list, folds: np.ndarray, strengths: dict, inputs: BaselineInputs, labels: np.ndarray, inner: np.ndarray,
    label: str,
) -> dict[tuple, list[tuple[Baseline, np.ndarray]]]:  # fmt: skip
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
) -> tuple[list[tuple[Baseline, np.ndarray]], float]:
    """A model for each strength, fitted without the rows `held_out` (N,) bool, its offsets of these; and seconds."""
    started, train = time.perf_counter(), np.flatnonzero(~held_out)
    with threadpool_limits(limits=1):
        if len(np.unique(labels[train[inputs.sources[train] == 0]])) == NUM_CLASSES:
            models = list(kind.fit_path(inputs.take(train), labels[train], strengths))
        else:  # the shares of all rows: what the untrained network predicts, too
            models = [kind.fit_shares(labels, inputs.sources)] * len(strengths)
        rest = inputs.take(np.flatnonzero(held_out))
        path = [(model, log_odds(model.predict_proba(rest))) for model in models]
    return path, time.perf_counter() - started
