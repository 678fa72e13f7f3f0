"""The ladder: baselines of growing complexity, every one exactly order-equivariant.

    prior               class shares
    length_bins         a lookup by which answer is longer, and by how much
    length_logistic     a few lengths
    structure_logistic  `features.compute_features`
    structure_boosting  gradient boosted trees on the same features
    tfidf_difference    words and characters of (prompt, answer): X_a - X_b and |X_a - X_b|
    structure_tfidf     the columns of structure_logistic and tfidf_difference
    structure_ensemble  the geometric mean of structure_tfidf and structure_boosting: the networks start from it
    structure_reward    structure features and a reward model's score of A minus that of B, where there is one

Swapping A and B must swap the probabilities. The trees are trained on every row and its swapped copy, and average the
predictions of both orders; a logistic model is symmetric by the kinds of its columns (`logistic.py`).

Each extra file has a share of ties of its own, and predictions have that of the training file. A logistic model has
one more intercept of the tie for each extra file. Tables and trees give the rows of a file weights, by which its share
of ties is that of the training file. A row of a set without ties adds to a logistic model's loss that of A against B
alone, and nothing to tables and trees.

A fitted baseline is a name and a few arrays, trees included, so it is saved without pickle.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from prefcls_lib.baselines.columns import (
    REWARD_BASELINE,
    SHRINKAGE_ROWS,
    BaselineInputs,
    build_columns,
    count_kinds,
    fit_columns,
    read_inputs,
    shrink_kinds,
    tie_weights,
)
from prefcls_lib.baselines.logistic import fit_logistic, predict_logistic
from prefcls_lib.baselines.trees import first_trees, fit_trees, predict_trees
from prefcls_lib.data.features import FEATURE_NAMES, SIGNS
from prefcls_lib.data.schema import NUM_CLASSES, SWAP, class_shares
from prefcls_lib.evaluation.calibration import geometric_mean
from prefcls_lib.evaluation.scores import row_losses
from prefcls_lib.runtime.files import UserError, read_json, write_json, write_whole

FAST_BASELINES = ("prior", "length_bins", "length_logistic", "structure_logistic")
ENSEMBLE = "structure_ensemble"
MEMBERS = ("structure_tfidf", "structure_boosting")  # of the ensemble
BASELINES = (*FAST_BASELINES, "structure_boosting", "tfidf_difference", "structure_tfidf", ENSEMBLE)
KNOWN_BASELINES = (*BASELINES, REWARD_BASELINE)

STRENGTHS = (0.001, 0.003, 0.01)  # C of scikit-learn's LogisticRegression on rows and swapped copies
TREE_COUNTS = (25, 50, 100, 200)  # boosting steps tried, at LEARNING_RATE
TUNING_ROWS = 10_000
INNER_FOLDS = 3
LENGTH_EDGES = np.log((1.02, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0))  # |log ratio| of the answers' characters


@dataclass(frozen=True)
class Baseline:
    """One fitted baseline: its name, and what it learned as plain arrays."""

    name: str
    state: dict[str, np.ndarray]

    def predict_proba(self, inputs: BaselineInputs) -> np.ndarray:
        """Probabilities (N, 3); with A and B exchanged in the rows, the same with A and B exchanged."""
        if self.name == "prior":
            return np.tile(self.state["prior"], (len(inputs.kinds), 1))
        if self.name == ENSEMBLE:
            return geometric_mean(np.stack([member.predict_proba(inputs) for member in self.members]))
        return shrink_kinds(self.state["kind_counts"], inputs.kinds, _predict_base(self.name, self.state, inputs))

    @property
    def members(self) -> tuple["Baseline", ...]:
        """The models of an ensemble; of any other baseline, the baseline alone."""
        if self.name != ENSEMBLE:
            return (self,)
        states = {name: {} for name in MEMBERS}
        for key, value in self.state.items():
            name, _, key = key.partition("/")
            states[name][key] = value
        return tuple(Baseline(name, state) for name, state in states.items())


def join_members(members: Sequence[Baseline]) -> Baseline:
    """The ensemble of its fitted members."""
    return Baseline(ENSEMBLE, {f"{one.name}/{key}": value for one in members for key, value in one.state.items()})


def fit_baseline(
    name: str,
    inputs: BaselineInputs,
    labels: np.ndarray,
    groups: np.ndarray,
    seed: int,
    strength: float | tuple[float, ...] | None = None,
) -> Baseline:
    """Fit one baseline on training rows with labels (N,).

    `strength`: from `choose_strength`; None: chosen here, on inner folds of the prompt groups (N,).

    Raises:
        UserError: no such baseline, or a class without rows.
    """
    if name not in KNOWN_BASELINES:
        raise UserError(f"ladder: no baseline {name!r}. Baselines are: {', '.join(KNOWN_BASELINES)}.")
    if name == ENSEMBLE:
        strengths = (None, None) if strength is None else strength
        fits = zip(MEMBERS, strengths, strict=True)
        return join_members([fit_baseline(one, inputs, labels, groups, seed, value) for one, value in fits])
    weights = tie_weights(labels, inputs.sources)
    shares = class_shares(labels, weights)
    if not shares.all():
        raise UserError("ladder: a class has no training row. Give more rows or set num_folds lower.")
    if name == "prior":
        return Baseline(name, {"prior": _symmetrise(shares)})
    if name == "length_bins":
        state = {"bins": _fit_length_bins(inputs.structure, labels, weights)}
    else:
        strength = choose_strength(name, inputs, labels, groups, seed) if strength is None else strength
        state = _fit_base(name, inputs, labels, strength)
    return Baseline(name, {**state, "kind_counts": count_kinds(inputs.kinds, labels, weights)})


def predict_rows(baselines: Sequence[Baseline], rows: pd.DataFrame) -> np.ndarray:
    """Mean probabilities (N, 3) of the same baseline fitted on several folds."""
    inputs = read_inputs(rows, [baseline.name for baseline in baselines])
    return np.mean([baseline.predict_proba(inputs) for baseline in baselines], axis=0)


def save_baseline(baseline: Baseline, folder: str | Path) -> None:
    """Write `rung.json` and `arrays.safetensors` into `folder`, whole or not at all (an upload would unpack .npz)."""

    def write(temporary: Path) -> None:
        temporary.mkdir()
        write_json(temporary / "rung.json", {"rung": baseline.name, "features": FEATURE_NAMES})
        arrays = {name: np.array(value, order="C") for name, value in baseline.state.items()}
        save_file(arrays, temporary / "arrays.safetensors")

    write_whole(folder, write)


def load_baseline(folder: str | Path) -> Baseline:
    """Read `save_baseline` back; its predictions are the same to the bit. Runs no code from the files.

    Raises:
        UserError: a file is missing or broken, or was saved for other features.
    """
    folder = Path(folder)
    saved = read_json(folder / "rung.json")
    if saved.get("rung") not in KNOWN_BASELINES or tuple(saved.get("features", ())) != FEATURE_NAMES:
        raise UserError(f"{folder}: not a baseline of this version of prefcls_lib. Run the ladder again.")
    path = folder / "arrays.safetensors"
    try:
        if path.exists():
            return Baseline(saved["rung"], load_file(path))
        path = folder / "arrays.npz"  # of an earlier version
        with np.load(path, allow_pickle=False) as arrays:
            return Baseline(saved["rung"], dict(arrays))
    except (OSError, ValueError, EOFError, KeyError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Run the ladder again.") from error


def _symmetrise(table: np.ndarray) -> np.ndarray:
    """Mean of class values (..., 3) and their swap."""
    return (table + table[..., list(SWAP)]) / 2


def choose_strength(
    name: str, inputs: BaselineInputs, labels: np.ndarray, groups: np.ndarray, seed: int
) -> float | tuple[float, ...]:
    """The C (or the number of trees) with the lowest log loss on inner folds of at most TUNING_ROWS rows.

    Inner folds never share a prompt group, and extra rows are not scored. With too few rows for them: the strongest
    regularisation. For the ensemble: that of each member.
    """
    if name == ENSEMBLE:
        return tuple(choose_strength(one, inputs, labels, groups, seed) for one in MEMBERS)
    choices = TREE_COUNTS if name == "structure_boosting" else STRENGTHS
    totals = np.zeros(len(choices))
    for train, valid in _inner_splits(labels, groups, seed):
        valid = valid[inputs.sources[valid] == 0]
        fit_inputs, score_inputs = inputs.take(train), inputs.take(valid)
        for number, base in enumerate(_predict_path(name, choices, fit_inputs, labels[train], score_inputs)):
            totals[number] += row_losses(labels[valid], base).sum()
    return choices[int(totals.argmin())]


def _inner_splits(labels: np.ndarray, groups: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions to fit and to score on, by prompt group; a split whose training part lacks a class is left out."""
    _, index = np.unique(groups, return_inverse=True)
    rank = np.random.default_rng(seed).permutation(index.max() + 1)[index]
    used = (np.cumsum(np.bincount(rank)) <= TUNING_ROWS)[rank]
    for fold in range(INNER_FOLDS):
        train = np.flatnonzero(used & (rank % INNER_FOLDS != fold))
        valid = np.flatnonzero(used & (rank % INNER_FOLDS == fold))
        if len(valid) and len(np.unique(labels[train])) == NUM_CLASSES:
            yield train, valid


def _predict_path(
    name: str, choices: Sequence[float], inputs: BaselineInputs, labels: np.ndarray, score_inputs: BaselineInputs
) -> Iterator[np.ndarray]:
    """Probabilities of `score_inputs` for each strength; what does not depend on it is fitted once."""
    if name == "structure_boosting":
        trees = fit_trees(inputs.structure, labels, max(choices), tie_weights(labels, inputs.sources))
        for count in choices:
            yield _predict_base(name, first_trees(trees, count), score_inputs)
        return
    state = fit_columns(name, inputs)
    columns, score_columns = build_columns(name, state, inputs), build_columns(name, state, score_inputs)
    for strength in choices:
        weights = fit_logistic(*columns, labels, strength, inputs.sources)
        yield predict_logistic(weights, *score_columns)


def _fit_base(name: str, inputs: BaselineInputs, labels: np.ndarray, strength: float) -> dict[str, np.ndarray]:
    if name == "structure_boosting":
        return fit_trees(inputs.structure, labels, int(strength), tie_weights(labels, inputs.sources))
    state = fit_columns(name, inputs)
    return {**state, **fit_logistic(*build_columns(name, state, inputs), labels, strength, inputs.sources)}


def _predict_base(name: str, state: dict[str, np.ndarray], inputs: BaselineInputs) -> np.ndarray:
    if name == "length_bins":
        return _predict_length_bins(state["bins"], inputs.structure)
    if name == "structure_boosting":
        swapped = predict_trees(state, inputs.structure * SIGNS)[:, list(SWAP)]
        return (predict_trees(state, inputs.structure) + swapped) / 2
    return predict_logistic(state, *build_columns(name, state, inputs))


def _fit_length_bins(structure: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """(bins, 3) probabilities that the longer answer wins, the shorter, tie; smoothed towards the prior."""
    gap = structure[:, FEATURE_NAMES.index("diff_log_chars")]
    outcome = np.eye(NUM_CLASSES)[labels]
    outcome = np.where((gap < 0)[:, None], outcome[:, list(SWAP)], outcome)
    outcome[gap == 0] = _symmetrise(outcome[gap == 0])
    outcome = outcome if weights is None else outcome * weights[:, None]
    counts = np.zeros((len(LENGTH_EDGES) + 1, NUM_CLASSES))
    np.add.at(counts, np.digitize(np.abs(gap), LENGTH_EDGES), outcome)
    prior = _symmetrise(class_shares(labels, weights))
    return (counts + SHRINKAGE_ROWS * prior) / (counts.sum(axis=1, keepdims=True) + SHRINKAGE_ROWS)


def _predict_length_bins(bins: np.ndarray, structure: np.ndarray) -> np.ndarray:
    gap = structure[:, FEATURE_NAMES.index("diff_log_chars")]
    probs = bins[np.digitize(np.abs(gap), LENGTH_EDGES)]
    probs = np.where((gap < 0)[:, None], probs[:, list(SWAP)], probs)
    return np.where((gap == 0)[:, None], _symmetrise(probs), probs)
