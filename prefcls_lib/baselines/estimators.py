"""The baselines: one class for each kind of model, every one exactly order-equivariant.

    prior               class shares
    length_bins         a lookup by which answer is longer, and by how much
    structure_logistic  linear in `features.compute_features`
    structure_tfidf     linear in these and in words and characters of (prompt, answer): X_a - X_b and |X_a - X_b|
    structure_boosting  gradient boosted trees on the same features
    structure_ensemble  the geometric mean of structure_tfidf and structure_boosting: the networks start from it

Swapping A and B must swap the probabilities. The trees are trained on every row and its swapped copy, and average the
predictions of both orders; a logistic model is symmetric by the kinds of its columns (`logistic.py`).

Each extra file has a share of ties of its own, and predictions have that of the training file. A logistic model has
one more intercept of the tie for each extra file. Tables and trees give the rows of a file weights, by which its share
of ties is that of the training file.

A fitted baseline is a few arrays, trees included, so it is saved without pickle.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from prefcls_lib.baselines.columns import (
    SHRINKAGE_ROWS,
    BaselineInputs,
    count_kinds,
    dense_columns,
    fit_dense,
    fit_text,
    shrink_kinds,
    text_columns,
    tie_weights,
)
from prefcls_lib.baselines.logistic import fit_logistic, join_columns, predict_logistic
from prefcls_lib.baselines.trees import first_trees, fit_trees, predict_trees
from prefcls_lib.data.features import FEATURE_NAMES, SIGNS
from prefcls_lib.data.schema import NUM_CLASSES, SWAP, class_shares

STRENGTHS = (0.001, 0.003, 0.01)  # C of scikit-learn's LogisticRegression on rows and swapped copies
TREE_COUNTS = (25, 50, 100, 200)  # boosting steps
LENGTH_EDGES = np.log((1.02, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0))  # |log ratio| of the answers' characters


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline: what it learned, as plain arrays.

    A kind of model says how it learns (`learn`) and predicts (`predict_ordinary`) rows that are not odd, and of which
    `strengths` one is chosen.
    """

    state: dict[str, np.ndarray]

    name: ClassVar[str]
    reads_text: ClassVar[bool] = False
    strengths: ClassVar[tuple[float, ...]] = ()

    @classmethod
    def fit(cls, inputs: BaselineInputs, labels: np.ndarray, strength: float = 0.0) -> Self:
        """Fit on training rows with labels (N,), every class among those of the training file."""
        weights = tie_weights(labels, inputs.sources)
        state = cls.learn(inputs, labels, strength, weights)
        return cls(state | {"kind_counts": count_kinds(inputs.kinds, labels, weights)})

    @classmethod
    def fit_shares(cls, labels: np.ndarray, sources: np.ndarray) -> Self:
        """The class shares alone, where nothing else can be learned."""
        return cls({"prior": symmetrise(class_shares(labels, tie_weights(labels, sources)))})

    @classmethod
    def predict_path(
        cls, inputs: BaselineInputs, labels: np.ndarray, score_inputs: BaselineInputs
    ) -> Iterator[np.ndarray]:
        """Probabilities of `score_inputs` for each of `strengths`, those of odd rows not shrunk."""
        raise NotImplementedError

    @classmethod
    def learn(
        cls, inputs: BaselineInputs, labels: np.ndarray, strength: float, weights: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """The state; `weights` (N,) of `columns.tie_weights`."""
        raise NotImplementedError

    def predict_ordinary(self, inputs: BaselineInputs) -> np.ndarray:
        """Probabilities (N, 3) as if no row was odd."""
        raise NotImplementedError

    def predict_proba(self, inputs: BaselineInputs) -> np.ndarray:
        """Probabilities (N, 3); with A and B exchanged in the rows, the same with A and B exchanged."""
        if "prior" in self.state:
            return np.tile(self.state["prior"], (len(inputs.kinds), 1))
        return shrink_kinds(self.state["kind_counts"], inputs.kinds, self.predict_ordinary(inputs))


class Prior(Baseline):
    """The class shares, A and B alike."""

    name = "prior"

    @classmethod
    def fit(cls, inputs: BaselineInputs, labels: np.ndarray, strength: float = 0.0) -> Self:
        """Fit on training rows with labels (N,)."""
        return cls.fit_shares(labels, inputs.sources)


class LengthBins(Baseline):
    """(bins, 3) probabilities that the longer answer wins, the shorter, tie; smoothed towards the prior."""

    name = "length_bins"

    @classmethod
    def learn(cls, inputs, labels, strength, weights):
        gap = _length_gap(inputs)
        outcome = np.eye(NUM_CLASSES)[labels]
        outcome = np.where((gap < 0)[:, None], outcome[:, list(SWAP)], outcome)
        outcome[gap == 0] = symmetrise(outcome[gap == 0])
        outcome = outcome if weights is None else outcome * weights[:, None]
        counts = np.zeros((len(LENGTH_EDGES) + 1, NUM_CLASSES))
        np.add.at(counts, np.digitize(np.abs(gap), LENGTH_EDGES), outcome)
        prior = symmetrise(class_shares(labels, weights))
        return {"bins": (counts + SHRINKAGE_ROWS * prior) / (counts.sum(axis=1, keepdims=True) + SHRINKAGE_ROWS)}

    def predict_ordinary(self, inputs):
        gap = _length_gap(inputs)
        probs = self.state["bins"][np.digitize(np.abs(gap), LENGTH_EDGES)]
        probs = np.where((gap < 0)[:, None], probs[:, list(SWAP)], probs)
        return np.where((gap == 0)[:, None], symmetrise(probs), probs)


class StructureLogistic(Baseline):
    """Linear in the dense columns."""

    name = "structure_logistic"
    strengths = STRENGTHS

    @classmethod
    def fit_columns(cls, inputs: BaselineInputs) -> dict[str, np.ndarray]:
        """What is learned of the rows without their labels."""
        return fit_dense(inputs.structure)

    @classmethod
    def make_columns(cls, state: dict[str, np.ndarray], inputs: BaselineInputs) -> tuple:
        """Antisymmetric and symmetric columns."""
        return dense_columns(state, inputs.structure)

    @classmethod
    def learn(cls, inputs, labels, strength, weights):
        state = cls.fit_columns(inputs)
        return state | fit_logistic(*cls.make_columns(state, inputs), labels, strength, inputs.sources)

    @classmethod
    def predict_path(cls, inputs, labels, score_inputs):
        state = cls.fit_columns(inputs)
        columns, score_columns = cls.make_columns(state, inputs), cls.make_columns(state, score_inputs)
        for strength in cls.strengths:
            yield predict_logistic(fit_logistic(*columns, labels, strength, inputs.sources), *score_columns)

    def predict_ordinary(self, inputs):
        return predict_logistic(self.state, *self.make_columns(self.state, inputs))


class StructureTfidf(StructureLogistic):
    """Linear in the dense columns and in TF-IDF."""

    name = "structure_tfidf"
    reads_text = True

    @classmethod
    def fit_columns(cls, inputs):
        return super().fit_columns(inputs) | fit_text(inputs.counts)

    @classmethod
    def make_columns(cls, state, inputs):
        return join_columns(super().make_columns(state, inputs), text_columns(state, inputs.counts))


class StructureBoosting(Baseline):
    """Gradient boosted trees on the dense columns; `strengths` are numbers of boosting steps."""

    name = "structure_boosting"
    strengths = TREE_COUNTS

    @classmethod
    def learn(cls, inputs, labels, strength, weights):
        return fit_trees(inputs.structure, labels, int(strength), weights)

    @classmethod
    def predict_path(cls, inputs, labels, score_inputs):
        trees = fit_trees(inputs.structure, labels, max(cls.strengths), tie_weights(labels, inputs.sources))
        for steps in cls.strengths:
            yield cls(first_trees(trees, steps)).predict_ordinary(score_inputs)

    def predict_ordinary(self, inputs):
        swapped = predict_trees(self.state, inputs.structure * SIGNS)[:, list(SWAP)]
        return (predict_trees(self.state, inputs.structure) + swapped) / 2


MODELS = {one.name: one for one in (Prior, LengthBins, StructureLogistic, StructureTfidf, StructureBoosting)}
ENSEMBLE = "structure_ensemble"
MEMBERS = (StructureTfidf.name, StructureBoosting.name)  # of the ensemble
BASELINES = (*MODELS, ENSEMBLE)


def symmetrise(table: np.ndarray) -> np.ndarray:
    """Mean of class values (..., 3) and their swap."""
    return (table + table[..., list(SWAP)]) / 2


def _length_gap(inputs: BaselineInputs) -> np.ndarray:
    return inputs.structure[:, FEATURE_NAMES.index("diff_log_chars")]
