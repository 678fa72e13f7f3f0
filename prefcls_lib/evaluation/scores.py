"""Scores of predictions: log loss, accuracy, calibration error. `compare` has their intervals.

Shapes: labels (N,) of 0, 1, 2; probs (N, 3) in `schema.LABEL_COLUMNS` order.
"""

import numpy as np
import pandas as pd

from prefcls_lib.data.schema import NUM_CLASSES

SMALLEST_PROB = float(np.finfo(np.float64).eps)


def row_losses(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """(N,) minus the natural log of the true class's probability, clipped only at the float epsilon."""
    true = np.asarray(probs, dtype=np.float64)[np.arange(len(labels)), labels]
    return -np.log(np.clip(true, SMALLEST_PROB, 1 - SMALLEST_PROB))


def log_loss(labels: np.ndarray, probs: np.ndarray) -> float:
    """Mean of `row_losses`: the competition's metric. Guessing the prior gives about 1.097 on its rows."""
    return float(row_losses(labels, probs).mean())


def accuracy(labels: np.ndarray, probs: np.ndarray) -> float:
    """Share of rows whose most probable class is the label."""
    return float((probs.argmax(axis=1) == labels).mean())


def brier_score(labels: np.ndarray, probs: np.ndarray) -> float:
    """Squared distance from the one-hot label, summed over the three classes; 0 is perfect, 2 the worst."""
    return float(((probs - np.eye(NUM_CLASSES)[labels]) ** 2).sum(axis=1).mean())


def reliability_table(labels: np.ndarray, probs: np.ndarray, num_bins: int = 15) -> pd.DataFrame:
    """How often the most probable class is right, by its predicted probability.

    One line for each of `num_bins` equal-width bins (low, high] that holds rows: count, confidence (mean), accuracy.
    """
    rows = pd.DataFrame({"confidence": probs.max(axis=1), "right": probs.argmax(axis=1) == labels})
    return rows.groupby(np.ceil(rows["confidence"].to_numpy() * num_bins)).agg(
        count=("right", "size"), confidence=("confidence", "mean"), accuracy=("right", "mean")
    )


def expected_calibration_error(labels: np.ndarray, probs: np.ndarray, num_bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over `reliability_table`'s bins, weighted by rows.

    Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3 (top label, equal-width bins).
    """
    table = reliability_table(labels, probs, num_bins)
    gap = (table["confidence"] - table["accuracy"]).abs()
    return float((gap * table["count"]).sum() / table["count"].sum())


def error_if_calibrated(probs: np.ndarray) -> float:
    """The expected calibration error that a perfectly calibrated model has on as many rows: it is above zero.

    The mean over 1,000 simulations, with a fixed seed, of whether each row's most probable class is its label
    (consistency resampling, Broecker and Smith 2007; Vaicenavicius et al. 2019, https://arxiv.org/abs/1902.06977).
    """
    table = reliability_table(probs.argmax(axis=1), probs)
    count, confidence = table["count"].to_numpy(), table["confidence"].to_numpy()
    right = np.random.default_rng(0).binomial(count, confidence, size=(1000, len(table)))
    return float((np.abs(right - count * confidence).sum(axis=1) / count.sum()).mean())
