"""Gradient boosted trees as plain arrays: fitted by scikit-learn, saved without pickle, predicted here."""

import numpy as np
from scipy.special import softmax
from sklearn.ensemble import HistGradientBoostingClassifier

from prefcls_lib.data.features import DENSE_SIGNS
from prefcls_lib.data.schema import NUM_CLASSES, SWAP

LEARNING_RATE = 0.1
MAX_BINS = 255
DECIMALS = 6  # of a column: the logarithm's last bits depend on the processor, and decide between splits of equal gain


def fit_trees(
    dense: np.ndarray, labels: np.ndarray, num_steps: int, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Boosting on weighted rows and swapped copies; its trees as arrays (T, nodes), a leaf being its own child.

    The columns are cut into bins here: of weighted rows scikit-learn does so a hundred times slower.
    """
    dense = np.round(dense, DECIMALS)
    if weights is not None:
        used = weights > 0
        dense, labels, weights = dense[used], labels[used], np.tile(weights[used], 2)
    dense, labels = np.concatenate([dense, dense * DENSE_SIGNS]), np.concatenate([labels, np.array(SWAP)[labels]])
    shares = np.linspace(0, 1, MAX_BINS + 1)[1:-1]
    edges = [np.unique(np.quantile(column, shares, method="midpoint")) for column in dense.T]
    bins = np.column_stack([np.searchsorted(*pair) for pair in zip(edges, dense.T, strict=True)]).astype(np.float64)
    model = HistGradientBoostingClassifier(
        learning_rate=LEARNING_RATE, max_iter=num_steps, max_leaf_nodes=8, min_samples_leaf=40,
        l2_regularization=10.0, max_features=0.3, max_bins=MAX_BINS, early_stopping=False, random_state=0,
    )  # fmt: skip
    model.fit(bins, labels, weights)
    trees = [tree.nodes for step in model._predictors for tree in step]
    shape = (len(trees), max(len(nodes) for nodes in trees))
    state = {name: np.zeros(shape, dtype=np.int32) for name in ("feature", "left", "right")}
    state |= {name: np.zeros(shape) for name in ("threshold", "value")}
    for tree, nodes in enumerate(trees):
        here = np.arange(len(nodes))
        leaf = nodes["is_leaf"].astype(bool)
        split = [(edges[node["feature_idx"]], int(node["num_threshold"])) for node in nodes[~leaf]]
        state["feature"][tree, here] = np.where(leaf, 0, nodes["feature_idx"])
        state["left"][tree, here] = np.where(leaf, here, nodes["left"])
        state["right"][tree, here] = np.where(leaf, here, nodes["right"])
        state["threshold"][tree, here[~leaf]] = [of_column[number] for of_column, number in split]
        state["value"][tree, here] = nodes["value"]
    return {**state, "baseline": np.asarray(model._baseline_prediction, dtype=np.float64).reshape(-1)}


def first_trees(trees: dict[str, np.ndarray], num_steps: int) -> dict[str, np.ndarray]:
    """The trees of the first `num_steps` boosting steps."""
    return {name: value if name == "baseline" else value[: num_steps * NUM_CLASSES] for name, value in trees.items()}


def predict_trees(state: dict[str, np.ndarray], dense: np.ndarray) -> np.ndarray:
    """Probabilities (N, 3) of dense columns (N, D)."""
    dense = np.round(dense, DECIMALS)
    logits = np.tile(state["baseline"], (len(dense), 1))
    rows = np.arange(len(dense))
    for tree, (feature, left, right, threshold, value) in enumerate(
        zip(*(state[name] for name in ("feature", "left", "right", "threshold", "value")), strict=True)
    ):
        node = np.zeros(len(dense), dtype=np.int32)
        while True:
            below = dense[rows, feature[node]] <= threshold[node]
            child = np.where(below, left[node], right[node])
            if (child == node).all():
                break
            node = child
        logits[:, tree % NUM_CLASSES] += value[node]
    return softmax(logits, axis=1)
