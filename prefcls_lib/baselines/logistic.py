"""Logistic models of antisymmetric and symmetric columns: order-equivariant without doubled rows.

For a logistic model with an L2 penalty the optimum on rows and their swapped copies is unique and hence symmetric
itself: antisymmetric columns (A minus B) only move A against B, symmetric ones only the tie. `fit_logistic` solves for
these weights alone, on the rows as they are: the same model (a test compares it with scikit-learn's on doubled rows) in
half the memory.
"""

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import softmax

from prefcls_lib.baselines.columns import tie_shifts
from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.evaluation.scores import row_losses


def fit_logistic(anti, sym, labels: np.ndarray, strength: float, sources: np.ndarray) -> dict[str, np.ndarray]:
    """Weights of logits (anti @ w, -anti @ w, sym @ v + b + shift of the row's file) with the lowest penalised loss.

    Equal to scikit-learn's LogisticRegression(C=strength) on [anti, sym] with every row's swapped copy
    [-anti, sym] added. Its weights of A, B, tie are w, -w, 0 for `anti` and -v/3, -v/3, 2v/3 for `sym`, so
    that its penalty |W|^2 / 2 is |w|^2 + |v|^2 / 3. The shifts, one for each extra file, are free as b is.
    """
    width, end, dtype = anti.shape[1], anti.shape[1] + sym.shape[1], anti.dtype
    files = sources.max()
    one_hot = np.eye(NUM_CLASSES)[labels]
    scale = 1 / (2 * strength * len(labels))

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        w, v, b, shifts = parameters[:width], parameters[width:end], parameters[end], parameters[end + 1 :]
        state = {"w": w.astype(dtype), "v": v.astype(dtype), "b": b}
        probs = predict_logistic(state, anti, sym, tie_shifts(sources, shifts))
        error = (probs - one_hot) / len(labels)
        loss = row_losses(labels, probs).mean() + scale * (w @ w + v @ v / 3)
        down_w = anti.T @ (error[:, 0] - error[:, 1]).astype(dtype)
        down_v = sym.T @ error[:, 2].astype(dtype)
        down = [down_w + 2 * scale * w, down_v + 2 / 3 * scale * v, [error[:, 2].sum()]]
        return loss, np.concatenate([*down, np.bincount(sources, error[:, 2], files + 1)[1:]])

    start = np.zeros(end + 1 + files)
    options = {"maxiter": 300, "gtol": 1e-6, "ftol": 1e-9}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
    weights = {"w": found[:width].astype(dtype), "v": found[width:end].astype(dtype), "b": found[end : end + 1]}
    return weights | ({"tie_shifts": found[end + 1 :]} if files else {})


def predict_logistic(state: dict[str, np.ndarray], anti, sym, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """Probabilities (N, 3) of columns; `shift` (N,) is added to the log-odds of a tie."""
    verdict = (anti @ state["w"]).astype(np.float64)
    tie = (sym @ state["v"]).astype(np.float64) + state["b"] + shift
    return softmax(np.column_stack([verdict, -verdict, tie]), axis=1)


def join_columns(dense: tuple, text: tuple) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Dense and sparse columns side by side: antisymmetric ones, and symmetric ones, float32 CSR."""
    dense = [sparse.csr_matrix(block, dtype=np.float32) for block in dense]
    return tuple(sparse.hstack(pair, format="csr") for pair in zip(dense, text, strict=True))
