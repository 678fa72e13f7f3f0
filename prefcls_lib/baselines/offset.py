"""The baseline that a network starts from: its log-odds are a fixed offset of the network's logits.

    m = (log pA - log pB) / 2,   t = log pT - (log pA + log pB) / 2,   offset = (m, -m, t)

softmax(offset) are the baseline's probabilities, and swapping the answers swaps them. A baseline fits the rows that it
was trained on better than others, and a network must not learn to rely on that. So the training rows are cut into inner
folds by prompt group, one model is fitted without each, and a training row's offset comes from the model that has seen
no row of its prompt. Every other row gets the mean offset of all inner models: a geometric mean of their probabilities.
"""

from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
from scipy.special import softmax
from threadpoolctl import threadpool_limits

from prefcls_lib.baselines.columns import BaselineInputs
from prefcls_lib.baselines.estimators import Baseline, choose_strength, fit_baseline, load_baseline, save_baseline
from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.runtime.files import UserError, read_json, write_json
from prefcls_lib.runtime.progress import progress_bar

INNER_FOLDS = 5
ROWS_AT_ONCE = 4096  # in prediction: the text columns of more rows would take gigabytes
MIN_ROWS_TO_SHARE = 5000  # with fewer training rows, starting processes takes longer than fitting


def log_odds(probs: np.ndarray) -> np.ndarray:
    """Offsets (N, 3) = (m, -m, t) of probabilities (N, 3); softmax gives the probabilities back."""
    a, b, tie = np.log(np.clip(probs, np.finfo(np.float64).tiny, None)).T
    return np.column_stack([(a - b) / 2, (b - a) / 2, tie - (a + b) / 2])


@dataclass(frozen=True)
class BaselineMean:
    """Baselines whose log-odds are averaged: the inner models of one, or those of the ladder's entry."""

    models: tuple[Baseline, ...]

    @property
    def names(self) -> set[str]:
        """What `columns.read_inputs` must read for them."""
        return {model.name for model in self.models}

    def member(self, name: str) -> "BaselineMean":
        """The same for one member of an ensemble; where there is none of this name, all of it."""
        models = [[one for one in model.members if one.name == name] or [model] for model in self.models]
        return BaselineMean(tuple(one for found in models for one in found))

    def predict(self, inputs: BaselineInputs) -> np.ndarray:
        """Offsets (N, 3) of rows that the baseline was not trained on."""
        starts = range(0, len(inputs.kinds), ROWS_AT_ONCE)
        blocks = [inputs.take(np.arange(start, min(start + ROWS_AT_ONCE, len(inputs.kinds)))) for start in starts]
        return np.concatenate(
            [np.mean([log_odds(model.predict_proba(block)) for model in self.models], axis=0) for block in blocks]
        )

    def predict_proba(self, inputs: BaselineInputs) -> np.ndarray:
        """Probabilities (N, 3), the geometric mean of the models'."""
        return softmax(self.predict(inputs), axis=1)

    def save(self, folder: Path) -> None:
        """Write the models into `folder`: inner0, inner1, ..., and their number."""
        write_json(folder / "baseline.json", {"inner_models": len(self.models)})
        for number, model in enumerate(self.models):
            save_baseline(model, folder / f"inner{number}")

    @classmethod
    def load(cls, folder: Path) -> "BaselineMean":
        """Read `save` back.

        Raises:
            UserError: it is missing or broken.
        """
        places = sorted(folder.glob("inner*"))
        if not places or len(places) != read_json(folder / "baseline.json")["inner_models"]:
            raise UserError(f"{folder}: a baseline's models are missing or not complete. Copy the run again.")
        return cls(tuple(load_baseline(place) for place in places))


def fit_offset(
    name: str, inputs: BaselineInputs, labels: np.ndarray, groups: np.ndarray, seed: int, label: str = ""
) -> tuple[BaselineMean, np.ndarray]:
    """Fit the inner models of a baseline on the training rows of an outer fold.

    The baseline's strength is chosen once, on all of these rows.

    Args:
        name: one of `estimators.BASELINES`.
        inputs, labels (N,), prompt groups (N,): of the training rows; nothing of the outer fold's validation rows.
        seed: fixes the inner folds.
        label: shows a progress bar with this name; "" shows none.

    Returns:
        The models, and the training rows' offsets (N, 3) out of the inner folds.
    """
    strength = choose_strength(name, inputs, labels, groups, seed)
    inner = assign_inner_folds(groups, seed)
    used = np.unique(inner)
    jobs = min(len(used), joblib.cpu_count()) if len(labels) >= MIN_ROWS_TO_SHARE else 1
    fits = (joblib.delayed(_fit_inner)(name, inputs, labels, groups, inner == fold, seed, strength) for fold in used)
    models, offsets = [], np.empty((len(labels), NUM_CLASSES))
    with progress_bar(len(used), label, "fit", bool(label)) as progress:
        for fold, (model, values) in zip(used, joblib.Parallel(jobs, return_as="generator")(fits), strict=True):
            models.append(model)
            offsets[inner == fold] = values
            progress.update()
    if label and any(model.name == "prior" for model in models):
        print(
            f"{label}: a class is missing in an inner fold, the class shares take the baseline's place there",
            flush=True,
        )
    return BaselineMean(tuple(models)), offsets


def assign_inner_folds(groups: np.ndarray, seed: int) -> np.ndarray:
    """(N,) the inner fold of each row: prompt groups in random order, dealt out to INNER_FOLDS."""
    _, index = np.unique(groups, return_inverse=True)
    return np.random.default_rng([seed, INNER_FOLDS]).permutation(index.max() + 1)[index] % INNER_FOLDS


def _fit_inner(
    name: str,
    inputs: BaselineInputs,
    labels: np.ndarray,
    groups: np.ndarray,
    held_out: np.ndarray,
    seed: int,
    strength: float | tuple[float, ...],
) -> tuple[Baseline, np.ndarray]:
    """One inner model, fitted without the rows `held_out` (N,) bool, and its offsets of these rows."""
    train = np.flatnonzero(~held_out)
    own = train[inputs.sources[train] == 0]
    fitted = name if len(np.unique(labels[own])) == NUM_CLASSES else "prior"
    if fitted == "prior":
        train = np.arange(len(labels))  # the shares of all rows: what the untrained network predicts, too
    with threadpool_limits(limits=1):
        model = fit_baseline(fitted, inputs.take(train), labels[train], groups[train], seed, strength)
        return model, log_odds(model.predict_proba(inputs.take(np.flatnonzero(held_out))))
