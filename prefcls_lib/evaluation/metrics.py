"""Scores of predictions with their uncertainty: log loss, comparisons, calibration error.

Rows that share a prompt are not independent, so every interval here resamples prompt groups, never rows.
Shapes: labels (N,) of 0, 1, 2; probs (N, 3) in `schema.LABEL_COLUMNS` order; groups (N,) of str.
"""

import hashlib
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.runtime.files import UserError

SMALLEST_PROB = float(np.finfo(np.float64).eps)
_CHUNK = 2_000_000  # group draws held in memory at a time


def check_probs(probs: np.ndarray, what: str) -> None:
    """Stop where `probs` are not probabilities of three classes.

    Args:
        probs: (N, 3).
        what: where they come from, for the message.

    Raises:
        UserError: not finite, not strictly between 0 and 1, or a sum off 1 by more than 1e-6; names the first
            such row (1 = first).
    """
    if probs.ndim != 2 or probs.shape[1] != NUM_CLASSES:
        raise UserError(f"{what}: expected {NUM_CLASSES} probabilities a row, found an array of shape {probs.shape}.")
    with np.errstate(invalid="ignore"):
        good = (probs > 0) & (probs < 1)  # false for NaN
        sums = np.abs(probs.sum(axis=1) - 1) <= 1e-6
    bad = np.flatnonzero(~(good.all(axis=1) & sums))
    if len(bad):
        values = ", ".join(f"{value:g}" for value in probs[bad[0]])
        raise UserError(
            f"{what}: row {bad[0] + 1}: ({values}) are no probabilities. Each must lie between 0 and 1 and "
            f"the three must sum to 1 ({len(bad)} such rows). Make the predictions again."
        )


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

    Returns:
        One line for each of `num_bins` equal-width bins (low, high] that holds rows: low, high, count,
        confidence (mean), accuracy.
    """
    confidence = probs.max(axis=1)
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    table = pd.DataFrame({"bin": bins, "confidence": confidence, "accuracy": probs.argmax(axis=1) == labels})
    table = table.groupby("bin").agg(
        count=("bin", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean")
    )
    table.insert(0, "low", table.index / num_bins)
    table.insert(1, "high", (table.index + 1) / num_bins)
    return table.reset_index(drop=True)


def expected_calibration_error(labels: np.ndarray, probs: np.ndarray, num_bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over `reliability_table`'s bins, weighted by rows.

    Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3 (top label, equal-width bins).
    """
    table = reliability_table(labels, probs, num_bins)
    gap = (table["confidence"] - table["accuracy"]).abs()
    return float((gap * table["count"]).sum() / table["count"].sum())


def bootstrap_interval(
    values: np.ndarray, groups: np.ndarray, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (N,), resampling whole prompt groups.

    Returns:
        (low, high); (nan, nan) with fewer than two groups.
    """
    means = _bootstrap_means(values, groups, num_resamples, seed)
    return (float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))) if len(means) else (np.nan, np.nan)


@dataclass(frozen=True)
class Comparison:
    """Two predictions of the same rows: `difference` is this one's log loss minus the other's."""

    difference: float
    low: float  # 95 % interval of the difference
    high: float
    verdict: str  # BEATS: high < 0; LOSES: low > 0; TIES: the interval holds 0
    smallest_detectable: float  # minimum detectable effect, 80 % power at the 5 % level: 2.8 standard errors
    rows: int
    groups: int

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)


def compare(
    labels: np.ndarray,
    probs: np.ndarray,
    other_probs: np.ndarray,
    groups: np.ndarray,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Paired bootstrap over prompt groups of the difference in log loss: does `probs` beat `other_probs`?

    Raises:
        UserError: fewer than two prompt groups.
    """
    differences = row_losses(labels, probs) - row_losses(labels, other_probs)
    means = _bootstrap_means(differences, groups, num_resamples, seed)
    if not len(means):
        raise UserError("comparison: all rows share one prompt, so no interval can be given. Validate on more rows.")
    low, high = np.quantile(means, [0.025, 0.975])
    return Comparison(
        difference=float(differences.mean()),
        low=float(low),
        high=float(high),
        verdict="BEATS" if high < 0 else "LOSES" if low > 0 else "TIES",
        smallest_detectable=float(2.8 * means.std(ddof=1)),
        rows=len(labels),
        groups=len(np.unique(groups)),
    )


def split_halves(groups: np.ndarray) -> np.ndarray:
    """(N,) bool: two halves of the prompt groups, by a hash of the group, whatever the order of the rows."""
    names, index = np.unique(groups, return_inverse=True)
    rank = np.argsort(np.argsort([hashlib.blake2b(str(name).encode()).hexdigest() for name in names]))
    return (rank % 2 == 1)[index]


def choose_cross_fitted(valid_probs: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, int]:
    """Cross-fitted predictions of the best validation step, without the bias of choosing it on the rows that score it.

    The step with the lowest log loss on one half of the prompt groups gives the predictions of the other half, and
    vice versa. With a single prompt group, which has no halves, the best step on all rows gives all predictions.

    Args:
        valid_probs: (V, N, 3) probabilities of the validation rows at each of V validations.

    Returns:
        probs: (N, 3), to be reported; index of the best step on all rows, to be kept.
    """
    losses = np.stack([row_losses(labels, probs) for probs in valid_probs])  # (V, N)
    best = int(losses.mean(axis=1).argmin())
    probs = valid_probs[best].copy()
    half = split_halves(groups)
    if half.any():
        for chosen_on in (half, ~half):
            probs[~chosen_on] = valid_probs[losses[:, chosen_on].mean(axis=1).argmin()][~chosen_on]
    return probs, best


def _bootstrap_means(values: np.ndarray, groups: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """(R,) means of resampled groups: sum over rows drawn / rows drawn. Empty with fewer than two groups."""
    _, index = np.unique(groups, return_inverse=True)
    sizes = np.bincount(index).astype(np.float64)
    sums = np.bincount(index, weights=values)
    if len(sizes) < 2:
        return np.empty(0)
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // len(sizes))
    means = []
    for start in range(0, num_resamples, step):
        shape = (min(step, num_resamples - start), len(sizes))
        drawn = generator.integers(len(sizes), size=shape, dtype=np.int32)
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)
