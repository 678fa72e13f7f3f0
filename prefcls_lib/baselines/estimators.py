"""The baselines: one class for each kind of model, every one exactly order-equivariant.

    prior               class shares
    length_bins         a lookup by which answer is longer, and by how much
    structure_logistic  linear in the structure features, `data/features.py`
    structure_tfidf     linear in these and in the answers' words: X_a - X_b and |X_a - X_b|
    structure_boosting  gradient boosted trees on the structure features
    structure_ensemble  the geometric mean of structure_tfidf and structure_boosting: the networks start from it

Swapping A and B must swap the probabilities. The trees are trained on every row and its swapped copy, and average the
predictions of both orders; a logistic model is symmetric by the kinds of its columns (`logistic.py`).

Each extra file has a share of ties of its own, and predictions have that of the training file. A logistic model has
one more intercept of the tie for each extra file. Tables and trees give the rows of a file weights, by which its share
of ties is that of the training file.

A fitted baseline is a few arrays, trees included, so it is saved without pickle.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from prefcls_lib.baselines import columns
from prefcls_lib.baselines.columns import BaselineInputs
from prefcls_lib.baselines.logistic import fit_logistic, predict_logistic
from prefcls_lib.baselines.trees import first_trees, fit_trees, predict_trees
from prefcls_lib.data.features import FEATURE_NAMES, SIGNS
from prefcls_lib.data.schema import NUM_CLASSES, SWAP, class_shares

LENGTH_EDGES = np.log((1.02, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0))  # |log ratio| of the answers' characters


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline: what it learned, as plain arrays.

    A kind of model says how it learns, and how it predicts ordinary rows. `learn_path(inputs, labels, weights,
    strengths)` yields the state for each strength; weights (N,) are those of `columns.tie_weights`.
    `predict_ordinary(inputs)` gives probabilities (N, 3) as if all rows were ordinary.
    """

    state: dict[str, np.ndarray]

    name: ClassVar[str]
    reads_text: ClassVar[bool] = False
    choices: ClassVar[tuple[float, ...]] = (0.0,)  # strengths: how closely a model may fit its training rows
    rows_each: ClassVar[int] = 0  # training rows that are needed for each unit of strength

    @classmethod
    def strengths(cls, rows: int) -> tuple[float, ...]:
        """Those of `choices` for which there are enough training rows, the first at least."""
        return tuple(one for one in cls.choices if one * cls.rows_each <= rows) or cls.choices[:1]

    @classmethod
    def fit_path(cls, inputs: BaselineInputs, labels: np.ndarray, strengths: Sequence[float]) -> Iterator[Self]:
        """A model for each strength, fitted on training rows with labels (N,), all classes in the training file."""
        weights = columns.tie_weights(labels, inputs.sources)
        kinds = {"kind_counts": columns.count_kinds(inputs.kinds, labels, weights)}
        for state in cls.learn_path(inputs, labels, weights, strengths):
            yield cls(state | kinds)

    def predict_proba(self, inputs: BaselineInputs) -> np.ndarray:
        """Probabilities (N, 3); with A and B exchanged in the rows, the same with A and B exchanged."""
        if "prior" in self.state:
            return np.tile(self.state["prior"], (len(inputs.kinds), 1))
        return columns.shrink_kinds(self.state["kind_counts"], inputs.kinds, self.predict_ordinary(inputs))


class Prior(Baseline):
    """The class shares, A and B alike."""

    name = "prior"

    @classmethod
    def learn_path(cls, inputs, labels, weights, strengths):
        """The shares, whatever the strength."""
        yield fit_prior(labels, inputs.sources)


class LengthBins(Baseline):
    """(bins, 3) probabilities that the longer answer wins, the shorter, tie; smoothed towards the prior."""

    name = "length_bins"

    @classmethod
    def learn_path(cls, inputs, labels, weights, strengths):
        """One table."""
        gap = _length_gap(inputs)
        outcome = np.eye(NUM_CLASSES)[labels]
        outcome = np.where((gap < 0)[:, None], outcome[:, list(SWAP)], outcome)
        outcome[gap == 0] = symmetrise(outcome[gap == 0])
        counts = np.zeros((len(LENGTH_EDGES) + 1, NUM_CLASSES))
        np.add.at(counts, np.digitize(np.abs(gap), LENGTH_EDGES), outcome * weights[:, None])
        yield {"bins": columns.shrink(counts, fit_prior(labels, inputs.sources)["prior"])}

    def predict_ordinary(self, inputs):
        """The table at the row's ratio of lengths."""
        gap = _length_gap(inputs)
        probs = self.state["bins"][np.digitize(np.abs(gap), LENGTH_EDGES)]
        probs = np.where((gap < 0)[:, None], probs[:, list(SWAP)], probs)
        return np.where((gap == 0)[:, None], symmetrise(probs), probs)


class StructureLogistic(Baseline):
    """Linear in the structure features."""

    name = "structure_logistic"
    choices = (0.002, 0.005, 0.0125)  # C of scikit-learn's LogisticRegression on rows and swapped copies

    @classmethod
    def learn_path(cls, inputs, labels, weights, strengths):
        """The columns, once; then the coefficients for each strength."""
        state = columns.fit_dense(inputs.dense) | (columns.fit_text(inputs.counts) if cls.reads_text else {})
        blocks, fitted = columns.make_columns(state, inputs), None
        for strength in strengths:
            fitted = fit_logistic(*blocks, labels, strength, inputs.sources, fitted)
            yield state | fitted

    def predict_ordinary(self, inputs):
        """Of the rows' columns."""
        return predict_logistic(self.state, *columns.make_columns(self.state, inputs))


class StructureTfidf(StructureLogistic):
    """Linear in the structure features and in TF-IDF."""

    name = "structure_tfidf"
    reads_text = True


class StructureBoosting(Baseline):
    """Gradient boosted trees on the structure features; the strengths are numbers of boosting steps."""

    name = "structure_boosting"
    choices = (12, 25, 50, 100, 200, 400)
    rows_each = 32  # with more steps for so few rows, trees overfit

    @classmethod
    def learn_path(cls, inputs, labels, weights, strengths):
        """One fit: the first trees of many steps are those of few."""
        trees = fit_trees(inputs.dense, labels, int(max(strengths)), weights if inputs.sources.any() else None)
        for steps in strengths:
            yield first_trees(trees, int(steps))

    def predict_ordinary(self, inputs):
        """The mean of both orders."""
        swapped = predict_trees(self.state, inputs.dense * SIGNS)[:, list(SWAP)]
        return (predict_trees(self.state, inputs.dense) + swapped) / 2


MODELS = {one.name: one for one in (Prior, LengthBins, StructureLogistic, StructureTfidf, StructureBoosting)}
ENSEMBLE = "structure_ensemble"
MEMBERS = (StructureTfidf.name, StructureBoosting.name)  # of the ensemble


def fit_prior(labels: np.ndarray, sources: np.ndarray) -> dict[str, np.ndarray]:
    """The state of a model that knows only the class shares of the training file."""
    return {"prior": symmetrise(class_shares(labels[sources == 0]))}


def symmetrise(table: np.ndarray) -> np.ndarray:
    """Mean of class values (..., 3) and their swap."""
    return (table + table[..., list(SWAP)]) / 2


def _length_gap(inputs: BaselineInputs) -> np.ndarray:
    return inputs.dense[:, FEATURE_NAMES.index("diff_log_chars")]
