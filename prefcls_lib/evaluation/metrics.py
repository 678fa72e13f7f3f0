"""Scores of predictions with their uncertainty: log loss, comparisons, calibration error.

Rows that share a prompt are not independent, so every interval here resamples prompt groups, never rows.
Shapes: labels (N,) of 0, 1, 2; probs (N, 3) in `schema.LABEL_COLUMNS` order; groups (N,) of str.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.runtime.files import UserError

SMALLEST_PROB = float(np.finfo(np.float64).eps)
NUM_RESAMPLES = 10_000  # of every bootstrap
LEVEL = 0.05  # of every verdict; an interval has 1 - LEVEL
MOST_DRAWS = 4_000  # groups drawn in a resample: see `_bootstrap_means`
_CHUNK = 200_000  # group draws held in memory at a time


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


def error_if_calibrated(probs: np.ndarray) -> float:
    """The expected calibration error that a perfectly calibrated model has on as many rows: it is above zero.

    The mean over 1,000 simulations, with a fixed seed, of whether each row's most probable class is its label
    (consistency resampling, Broecker and Smith 2007; Vaicenavicius et al. 2019, https://arxiv.org/abs/1902.06977).
    """
    table = reliability_table(probs.argmax(axis=1), probs)
    count, confidence = table["count"].to_numpy(), table["confidence"].to_numpy()
    right = np.random.default_rng(0).binomial(count, confidence, size=(1000, len(table)))
    return float((np.abs(right - count * confidence).sum(axis=1) / count.sum()).mean())


def score_predictions(labels: np.ndarray, probs: np.ndarray, groups: np.ndarray, folds: np.ndarray) -> dict:
    """The scores of out-of-sample predictions, by their names in result.json and blend.json.

    Args:
        folds: (N,); `log_loss_fold_sd` is the standard deviation of the folds' log losses, None for a single fold.
    """
    losses = row_losses(labels, probs)
    by_fold = pd.Series(losses).groupby(np.asarray(folds)).mean()
    return {
        "log_loss": float(losses.mean()),
        "log_loss_interval": list(bootstrap_interval(losses, groups)),
        "log_loss_fold_sd": float(by_fold.std(ddof=1)) if len(by_fold) > 1 else None,
        "accuracy": accuracy(labels, probs),
        "brier_score": brier_score(labels, probs),
        "expected_calibration_error": expected_calibration_error(labels, probs),
        "expected_calibration_error_if_calibrated": error_if_calibrated(probs),
    }


def bootstrap_interval(values: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (N,), resampling whole prompt groups.

    Returns:
        (low, high); (nan, nan) with fewer than two groups.
    """
    means = _bootstrap_means(values, groups)
    return _interval_and_p(means)[0] if len(means) else (np.nan, np.nan)


def standard_error(values: np.ndarray, groups: np.ndarray) -> float:
    """Cluster-robust standard error of the mean of `values` (N,): rows of one prompt group may depend on each other."""
    _, index = np.unique(groups, return_inverse=True)
    return float(np.linalg.norm(np.bincount(index, weights=values - values.mean())) / len(values))


@dataclass(frozen=True)
class Comparison:
    """Two predictions of the same rows: `difference` is this one's log loss minus the other's."""

    difference: float
    low: float  # 95 % interval of the difference
    high: float
    smallest_detectable: float  # minimum detectable effect (MDE), 80 % power at the 5 % level: 2.8 standard errors
    rows: int
    groups: int
    p: float  # two-sided; of this comparison by itself, until `holm_correction` counts the others of its table

    @property
    def verdict(self) -> str:
        """BEATS or LOSES where p is at most LEVEL (of a single comparison: the interval excludes 0)."""
        return "INCONCLUSIVE" if self.p > LEVEL else "BEATS" if self.difference < 0 else "LOSES"

    def against(self, other: str) -> str:
        """The verdict with the name of the other: BEATS x, LOSES to x, or INCONCLUSIVE against x."""
        return {"BEATS": "BEATS ", "LOSES": "LOSES to "}.get(self.verdict, "INCONCLUSIVE against ") + other

    def describe(self) -> str:
        """The difference in words: 0.0123 lower (95 % CI -0.0200 to -0.0046, p=0.012)."""
        p = "p<0.001" if self.p < 0.001 else f"p={self.p:.3f}"
        side = "lower" if self.difference < 0 else "higher"
        return f"{abs(self.difference):.4f} {side} (95 % CI {self.low:+.4f} to {self.high:+.4f}, {p})"

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self) | {"verdict": self.verdict}

    @classmethod
    def from_dict(cls, values: dict) -> "Comparison":
        """Read `to_dict` back. An earlier version has no p: it is that of a normal distribution with its interval."""
        difference = values["difference"]
        half_width = abs(difference - values["low" if difference > 0 else "high"])  # on the side of zero
        p = math.erfc(1.96 / math.sqrt(2) * abs(difference) / max(half_width, SMALLEST_PROB))
        return cls(**{"p": p} | {name: value for name, value in values.items() if name != "verdict"})


def compare(labels: np.ndarray, probs: np.ndarray, other_probs: np.ndarray, groups: np.ndarray) -> Comparison:
    """Paired bootstrap over prompt groups of the difference in log loss: does `probs` beat `other_probs`?

    Raises:
        UserError: fewer than two prompt groups.
    """
    differences = row_losses(labels, probs) - row_losses(labels, other_probs)
    means = _bootstrap_means(differences, groups)
    if not len(means):
        raise UserError("comparison: all rows share one prompt, so no interval can be given. Validate on more rows.")
    (low, high), p = _interval_and_p(means)
    detectable = 2.8 * float(means.std(ddof=1))
    return Comparison(float(differences.mean()), low, high, detectable, len(labels), len(np.unique(groups)), p)


def holm_correction(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """All comparisons of a table, p corrected for their number: of such tables, at most 5 % hold a wrong verdict.

    Holm 1979, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 65-70:
    the smallest of m values times m, the next times m - 1, ...; none below one that was smaller, none above 1.
    """
    corrected, highest = list(comparisons), 0.0
    for rank, place in enumerate(np.argsort([one.p for one in comparisons], kind="stable")):
        highest = max(highest, min(1.0, (len(corrected) - rank) * comparisons[place].p))
        corrected[place] = replace(comparisons[place], p=highest)
    return corrected


def split_halves(groups: np.ndarray, salt: str) -> np.ndarray:
    """(N,) bool: two halves of the prompt groups, by a hash of salt and group, whatever the order of the rows.

    `salt`: what they are used for. Two uses with the same halves would see each other's rows.
    """
    names, index = np.unique(groups, return_inverse=True)
    rank = np.argsort(np.argsort([hashlib.blake2b(f"{salt}:{name}".encode()).hexdigest() for name in names]))
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
    half = split_halves(groups, "step")
    if half.any():
        for chosen_on in (half, ~half):
            probs[~chosen_on] = valid_probs[losses[:, chosen_on].mean(axis=1).argmin()][~chosen_on]
    return probs, best


def _interval_and_p(means: np.ndarray) -> tuple[tuple[float, float], float]:
    """95 % percentile interval of R bootstrap means, and the two-sided p of a mean of zero, which inverts it.

    The interval's ends are the LEVEL / 2 (R + 1)th smallest and largest. p is twice (1 + count) / (R + 1) with the
    count of the means on the rarer side of zero, so it is at most LEVEL where the interval excludes zero, and never 0.
    Davison and Hinkley 1997, Bootstrap Methods and their Application, sections 5.3 and 4.2.
    """
    ordered, place = np.sort(means), max(1, int(LEVEL / 2 * (len(means) + 1)))
    count = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (1 + count) / (1 + len(means)))
    return (float(ordered[place - 1]), float(ordered[-place])), float(p)


def _bootstrap_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(R,) means of resampled groups: sum over rows drawn / rows drawn. Empty with fewer than two groups.

    A resample draws as many groups as there are. Of more than MOST_DRAWS it draws only MOST_DRAWS, and the deviation
    from the mean is scaled to that of all (m out of n bootstrap, Bickel, Goetze and van Zwet 1997).
    """
    _, index = np.unique(groups, return_inverse=True)
    sums = np.bincount(index, weights=values) + 1j * np.bincount(index)  # one number a group: its sum and its size
    if len(sums) < 2:
        return np.empty(0)
    generator, draws = np.random.default_rng(0), min(len(sums), MOST_DRAWS)
    step, means = max(1, _CHUNK // draws), []
    for start in range(0, NUM_RESAMPLES, step):
        shape = (min(step, NUM_RESAMPLES - start), draws)
        total = sums[generator.integers(len(sums), size=shape, dtype=np.int32)].sum(axis=1)
        means.append(total.real / total.imag)
    mean = values.mean()
    return mean + (np.concatenate(means) - mean) * math.sqrt(draws / len(sums))
