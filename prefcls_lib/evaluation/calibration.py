"""Calibration and blending in log space, fitted on out-of-sample predictions only.

Both are one convex problem: softmax(sum_k beta_k log p_k + [0, 0, tie_bias]) with beta >= 0, so the solution is unique
and needs no seed. A and B have the same bias, so swapping the answers still swaps the probabilities.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.evaluation.compare import split_groups
from prefcls_lib.evaluation.scores import SMALLEST_PROB
from prefcls_lib.runtime.files import UserError

MAX_TEMPERATURE, MAX_TIE_BIAS = 20.0, 5.0
# Penalties on the summed loss, each a normal prior: the sum of the weights is 1 with SD 1 / sqrt(50), and the tie bias
# 0 with SD 1 / sqrt(400). Which prediction gets the weight is free. Chosen on few rows (report/log.md).
SUM_PENALTY, TIE_PENALTY = 50.0, 400.0
NUM_PARTS = 20  # of a cross-fit: a blend of 19 parts is nearly the one of all rows, which is applied


@dataclass(frozen=True)
class Calibration:
    """softmax(log p / temperature + [0, 0, tie_bias]); temperature > 1 makes predictions less confident."""

    temperature: float = 1.0
    tie_bias: float = 0.0

    def apply(self, probs: np.ndarray) -> np.ndarray:
        """Calibrated probabilities (N, 3) of probabilities (N, 3)."""
        return softmax(_safe_log(probs) / self.temperature + np.array([0.0, 0.0, self.tie_bias]), axis=1)


@dataclass(frozen=True)
class Blend:
    """Weighted geometric mean of several predictions, then one calibration."""

    weights: tuple[float, ...]  # one for each prediction, none negative, sum 1
    calibration: Calibration

    def apply(self, predictions: Sequence[np.ndarray]) -> np.ndarray:
        """Blended probabilities (N, 3) of as many (N, 3) arrays as there are weights, in the fitted order."""
        mean = sum(weight * _safe_log(probs) for weight, probs in zip(self.weights, predictions, strict=True))
        return self.calibration.apply(softmax(mean, axis=1))

    def to_dict(self) -> dict:
        """Plain values for JSON; floats keep every bit."""
        return {"weights": list(self.weights), **asdict(self.calibration)}

    @classmethod
    def from_dict(cls, state: dict) -> "Blend":
        """Read `to_dict` back; a KeyError, TypeError or ValueError where a value cannot be right."""
        weights = tuple(map(float, state["weights"]))
        temperature, tie_bias = float(state["temperature"]), float(state["tie_bias"])
        if min(weights) < 0 or not abs(sum(weights) - 1) <= 1e-6:
            raise ValueError("the weights must be 0 or more, and their sum 1")
        if not (0 < temperature < np.inf and np.isfinite(tie_bias)):
            raise ValueError("the temperature must be above 0, and it and the tie bias must be finite")
        return cls(weights, Calibration(temperature, tie_bias))


def fit_blend(labels: np.ndarray, predictions: Sequence[np.ndarray]) -> Blend:
    """Weights, temperature and tie bias with the lowest penalised log loss on these rows; of one run, a calibration.

    The powers beta are at least 0, and the summed loss is increased by 50/2 (sum of beta - 1)^2 + 400/2 tie_bias^2.
    `predictions`: (N, 3) out-of-sample probabilities of each run, the same rows in the same order. No run may have been
    trained or selected on these rows; the gain on them is optimistic.
    """
    logs = np.stack([_safe_log(probs) for probs in predictions])  # (K, N, 3)
    one_hot = np.eye(NUM_CLASSES)[labels]
    start = np.append(np.full(len(logs), 1 / len(logs)), 0.0)

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        logits = np.tensordot(parameters[:-1], logs, axes=1) + np.array([0.0, 0.0, parameters[-1]])
        probs = softmax(logits, axis=1)
        error = probs - one_hot
        gradient = np.append((logs * error).sum(axis=(1, 2)), error[:, 2].sum())
        pull = np.append(np.full(len(logs), SUM_PENALTY * (parameters[:-1].sum() - 1)), TIE_PENALTY * parameters[-1])
        loss = -(one_hot * _safe_log(probs)).sum() + (pull[0] ** 2 / SUM_PENALTY + pull[-1] ** 2 / TIE_PENALTY) / 2
        return loss / len(labels), (gradient + pull) / len(labels)

    lowest = 1 / MAX_TEMPERATURE if len(logs) == 1 else 0.0
    bounds = [(lowest, MAX_TEMPERATURE)] * len(logs) + [(-MAX_TIE_BIAS, MAX_TIE_BIAS)]
    options = {"maxiter": 500, "ftol": 1e-13, "gtol": 1e-9}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    powers, tie_bias = found[:-1], float(found[-1])
    total = max(powers.sum(), 1 / MAX_TEMPERATURE)
    weights = powers / powers.sum() if powers.sum() > 0 else start[:-1]
    return Blend(tuple(weights.tolist()), Calibration(float(1 / total), tie_bias))


def fit_calibration_on(offsets: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> Calibration:
    """Temperature and tie bias for logits offsets + scores / temperature + [0, 0, tie_bias], each (N, 3)."""
    one_hot, size = np.eye(NUM_CLASSES)[labels], float(scores.std()) or 1.0  # scores of any size

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        logits = offsets + parameters[0] / size * scores + np.array([0.0, 0.0, parameters[1]])
        error = (softmax(logits, axis=1) - one_hot) / len(labels)
        loss = (logsumexp(logits, axis=1) - (one_hot * logits).sum(axis=1)).mean()
        return loss, np.array([(error * scores).sum() / size, error[:, 2].sum()])

    bounds = [(1 / MAX_TEMPERATURE, MAX_TEMPERATURE), (-MAX_TIE_BIAS, MAX_TIE_BIAS)]
    power, tie_bias = minimize(objective, [1.0, 0.0], jac=True, method="L-BFGS-B", bounds=bounds).x
    return Calibration(float(size / power), float(tie_bias))


def blend_cross_fitted(labels: np.ndarray, predictions: Sequence[np.ndarray], groups: np.ndarray) -> np.ndarray:
    """Cross-fitted blend (N, 3), or calibration of a single prediction: that of each part of the prompt groups is
    fitted on the other parts.

    Its score is the one to report; the blend to keep is `fit_blend` on all rows.
    """
    parts = split_groups(groups, NUM_PARTS, "calibration")
    if len(np.unique(parts)) == 1:
        raise UserError("calibration: too few prompts to fit on some and score on others. Validate on more rows.")
    blended = np.empty((len(labels), NUM_CLASSES))
    for part in np.unique(parts):
        here = parts == part
        blend = fit_blend(labels[~here], [probs[~here] for probs in predictions])
        blended[here] = blend.apply([probs[here] for probs in predictions])
    return blended


def _safe_log(probs: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.asarray(probs, dtype=np.float64), SMALLEST_PROB))
