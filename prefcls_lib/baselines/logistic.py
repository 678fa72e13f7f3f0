"""Logistic models of antisymmetric and symmetric columns: order-equivariant without doubled rows.

For a logistic model with an L2 penalty the optimum on rows and their swapped copies is unique and hence symmetric
itself: antisymmetric columns (A minus B) only move A against B, symmetric ones only the tie. `fit_logistic` solves for
these weights alone, on the rows as they are: the same model (a test compares it with scikit-learn's on doubled rows) in
half the memory.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import softmax

from prefcls_lib.baselines.columns import tie_shifts
from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.evaluation.scores import row_losses

TOLERANCE = 1e-4  # of the gradient's length: probabilities are within .001 of those at the optimum


def fit_logistic(
    anti: Sequence, sym: Sequence, labels: np.ndarray, strength: float, sources: np.ndarray, start: dict | None = None
) -> dict[str, np.ndarray]:
    """Weights of logits (anti @ w, -anti @ w, sym @ v + b + shift of the row's file) with the lowest penalised loss.

    Equal to scikit-learn's LogisticRegression(C=strength) on [anti, sym] with every row's swapped copy
    [-anti, sym] added. Its weights of A, B, tie are w, -w, 0 for `anti` and -v/3, -v/3, 2v/3 for `sym`, so
    that its penalty |W|^2 / 2 is |w|^2 + |v|^2 / 3. The shifts, one for each extra file, are free as b is.

    Args:
        anti, sym: blocks (N, ...) of columns, dense or CSR.
        start: the weights of another strength, from where it is not far.
    """
    rows, files = len(labels), sources.max()
    width, end = (int(sum(block.shape[1] for block in blocks)) for blocks in (anti, (*anti, *sym)))
    one_hot, penalty = np.eye(NUM_CLASSES)[labels], np.zeros(end + 1 + files)
    penalty[:end] = 1 / (strength * rows)
    penalty[width:end] /= 3

    def forward(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tie = _times(sym, parameters[width:end]) + parameters[end]
        return _times(anti, parameters[:width]), tie + tie_shifts(sources, parameters[end + 1 :])

    def backward(of_verdict: np.ndarray, of_tie: np.ndarray) -> np.ndarray:
        by_file = np.bincount(sources, of_tie, files + 1)
        down = [_transposed_times(anti, of_verdict), _transposed_times(sym, of_tie)]
        return np.concatenate([*down, [by_file.sum()], by_file[1:]]) / rows

    known: dict = {}  # loss, gradient and curvature are asked for at the same place

    def probabilities(parameters: np.ndarray) -> np.ndarray:
        if not np.array_equal(known.get("at"), parameters):
            verdict, tie = forward(parameters)
            known.update(at=parameters.copy(), probs=softmax(np.column_stack([verdict, -verdict, tie]), axis=1))
        return known["probs"]

    def loss(parameters: np.ndarray) -> float:
        return row_losses(labels, probabilities(parameters)).mean() + parameters @ (penalty * parameters) / 2

    def gradient(parameters: np.ndarray) -> np.ndarray:
        error = probabilities(parameters) - one_hot
        return backward(error[:, 0] - error[:, 1], error[:, 2]) + penalty * parameters

    def curvature(parameters: np.ndarray, direction: np.ndarray) -> np.ndarray:
        probs, (verdict, tie) = probabilities(parameters), forward(direction)
        change = probs * np.column_stack([verdict, -verdict, tie])
        change -= probs * change.sum(axis=1, keepdims=True)
        return backward(change[:, 0] - change[:, 1], change[:, 2]) + penalty * direction

    options = {"gtol": TOLERANCE, "initial_trust_radius": 10.0, "max_trust_radius": 100.0}
    begin = np.zeros(len(penalty))
    if start is not None:
        begin = np.concatenate([start[name] for name in ("w", "v", "b", "tie_shifts") if name in start])
    found = minimize(loss, begin, jac=gradient, hessp=curvature, method="trust-ncg", options=options).x
    state = {"w": found[:width].astype(np.float32), "v": found[width:end].astype(np.float32), "b": found[end : end + 1]}
    return state | ({"tie_shifts": found[end + 1 :]} if files else {})


def predict_logistic(state: dict[str, np.ndarray], anti: Sequence, sym: Sequence) -> np.ndarray:
    """Probabilities (N, 3) of columns, ties as in the training file."""
    verdict, tie = _times(anti, state["w"]), _times(sym, state["v"]) + state["b"]
    return softmax(np.column_stack([verdict, -verdict, tie]), axis=1)


def _times(blocks: Sequence, weights: np.ndarray) -> np.ndarray:
    """(N,) the columns of all blocks times their weights."""
    ends = np.cumsum([block.shape[1] for block in blocks])
    parts = np.split(weights.astype(np.float32), ends[:-1])
    return sum((block @ part).astype(np.float64) for block, part in zip(blocks, parts, strict=True))


def _transposed_times(blocks: Sequence, values: np.ndarray) -> np.ndarray:
    return np.concatenate([block.T @ values.astype(np.float32) for block in blocks])
