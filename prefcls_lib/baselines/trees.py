"""Gradient boosted trees as plain arrays: fitted by scikit-learn, saved without pickle, predicted here."""

import numpy as np
from scipy.special import softmax

from prefcls_lib.data.features import SIGNS
from prefcls_lib.data.schema import NUM_CLASSES, SWAP

LEARNING_RATE = 0.1
MAX_BINS = 255
MAX_LEAVES = 8  # so that those of a tree are the bits of one byte
FIRST_LEAF = np.array([next((leaf for leaf in range(8) if not bits >> leaf & 1), 0) for bits in range(256)])  # not set
DECIMALS = 6  # of a column: the logarithm's last bits depend on the processor, and decide between splits of equal gain


def fit_trees(
    dense: np.ndarray, labels: np.ndarray, num_steps: int, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Boosting on weighted rows and swapped copies; its trees as arrays (T, splits) and (T, leaves).

    The columns are cut into bins here: of weighted rows scikit-learn does so a hundred times slower.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier  # late: a process that trains networks needs no sklearn

    dense = np.round(dense, DECIMALS)
    if weights is not None:
        used = weights > 0
        dense, labels, weights = dense[used], labels[used], np.tile(weights[used], 2)
    dense, labels = np.concatenate([dense, dense * SIGNS]), np.concatenate([labels, np.array(SWAP)[labels]])
    shares = np.linspace(0, 1, MAX_BINS + 1)[1:-1]
    edges = [np.unique(np.quantile(column, shares, method="midpoint")) for column in dense.T]
    bins = np.column_stack([np.searchsorted(*pair) for pair in zip(edges, dense.T, strict=True)]).astype(np.float64)
    model = HistGradientBoostingClassifier(
        learning_rate=LEARNING_RATE, max_iter=num_steps, max_leaf_nodes=MAX_LEAVES, min_samples_leaf=40,
        l2_regularization=10.0, max_features=0.2, max_bins=MAX_BINS, early_stopping=False, random_state=0,
    )  # fmt: skip
    model.fit(bins, labels, weights)
    trees = [tree.nodes for step in model._predictors for tree in step]
    state = {name: np.zeros((len(trees), MAX_LEAVES - 1), dtype=np.int32) for name in ("column", "passed")}
    state |= {"threshold": np.full((len(trees), MAX_LEAVES - 1), np.inf), "value": np.zeros((len(trees), MAX_LEAVES))}
    for tree, nodes in enumerate(trees):
        splits, leaves = _read_tree(nodes, 0, [], [])
        state["value"][tree, : len(leaves)] = leaves
        for number, (column, bin_number, passed) in enumerate(splits):
            state["column"][tree, number], state["passed"][tree, number] = column, passed
            state["threshold"][tree, number] = edges[column][bin_number]
    return {**state, "baseline": np.asarray(model._baseline_prediction, dtype=np.float64).reshape(-1)}


def _read_tree(nodes: np.ndarray, here: int, splits: list, leaves: list) -> tuple[list, list]:
    """Splits (column, bin, leaves on their left side as bits) and leaf values, left to right, of one tree."""
    node = nodes[here]
    if node["is_leaf"]:
        leaves.append(node["value"])
        return splits, leaves
    first = len(leaves)
    _read_tree(nodes, node["left"], splits, leaves)
    splits.append((node["feature_idx"], int(node["num_threshold"]), (1 << len(leaves)) - (1 << first)))
    return _read_tree(nodes, node["right"], splits, leaves)


def first_trees(trees: dict[str, np.ndarray], num_steps: int) -> dict[str, np.ndarray]:
    """The trees of the first `num_steps` boosting steps."""
    return {name: value if name == "baseline" else value[: num_steps * NUM_CLASSES] for name, value in trees.items()}


def predict_trees(state: dict[str, np.ndarray], dense: np.ndarray) -> np.ndarray:
    """Probabilities (N, 3) of structure features (N, F).

    A row beyond the threshold of a split passes all leaves on its left. It is in the first leaf that it has not passed
    (QuickScorer, Lucchese et al. 2015).
    """
    columns = np.ascontiguousarray(np.round(dense, DECIMALS).T)
    logits = np.tile(state["baseline"][:, None], (1, len(dense)))
    passed, threshold = state["passed"].astype(np.uint8)[:, :, None], state["threshold"][:, :, None]
    for tree, (column, value) in enumerate(zip(state["column"], state["value"], strict=True)):
        bits = np.bitwise_or.reduce((columns[column] > threshold[tree]) * passed[tree])
        logits[tree % NUM_CLASSES] += value[FIRST_LEAF][bits]
    return softmax(logits.T, axis=1)
