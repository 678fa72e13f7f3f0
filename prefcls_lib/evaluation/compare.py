"""How sure a score or a difference of two scores is: bootstrap intervals, verdicts, a choice without its bias.

Rows that share a prompt are not independent, so every interval here resamples prompt groups, never rows.
Shapes: labels (N,) of 0, 1, 2; probs (N, 3) in `schema.LABEL_COLUMNS` order; groups (N,) of str.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from prefcls_lib.evaluation import scores
from prefcls_lib.runtime.files import UserError

NUM_RESAMPLES = 10_000  # of every bootstrap
LEVEL = 0.05  # of every verdict; an interval has 1 - LEVEL
MOST_DRAWS = 4_000  # groups drawn in a resample: see `_bootstrap_means`
_CHUNK = 200_000  # group draws held in memory at a time


def score_predictions(labels: np.ndarray, probs: np.ndarray, groups: np.ndarray, folds: np.ndarray) -> dict:
    """The scores of out-of-sample predictions, by their names in result.json and blend.json.

    `log_loss_fold_sd` is the standard deviation of the folds' log losses, None for a single fold; folds are (N,).
    """
    losses = scores.row_losses(labels, probs)
    by_fold = pd.Series(losses).groupby(np.asarray(folds)).mean()
    return {
        "log_loss": float(losses.mean()),
        "log_loss_interval": list(bootstrap_interval(losses, groups)),
        "log_loss_fold_sd": float(by_fold.std(ddof=1)) if len(by_fold) > 1 else None,
        "accuracy": scores.accuracy(labels, probs),
        "brier_score": scores.brier_score(labels, probs),
        "expected_calibration_error": scores.expected_calibration_error(labels, probs),
        "expected_calibration_error_if_calibrated": scores.error_if_calibrated(probs),
    }


def bootstrap_interval(values: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (N,), resampling whole prompt groups; NaN with fewer than 2."""
    means = _bootstrap_means(values, groups)
    return _interval_and_p(means)[0] if len(means) else (np.nan, np.nan)


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
        """Read `to_dict` back."""
        return cls(**{name: value for name, value in values.items() if name != "verdict"})


def compare(labels: np.ndarray, probs: np.ndarray, other_probs: np.ndarray, groups: np.ndarray) -> Comparison:
    """The log loss of `probs` minus that of `other_probs`, with a paired bootstrap over prompt groups."""
    differences = scores.row_losses(labels, probs) - scores.row_losses(labels, other_probs)
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
    p = np.array([one.p for one in comparisons])
    order = np.argsort(p, kind="stable")
    p[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [replace(one, p=float(corrected)) for one, corrected in zip(comparisons, p, strict=True)]


def split_groups(groups: np.ndarray, parts: int, salt: str) -> np.ndarray:
    """(N,) the part, 0 ... parts - 1, of each prompt group, by a hash of salt and group, whatever the rows' order.

    `salt`: what they are used for. Two uses with the same parts would see each other's rows.
    """
    names, index = np.unique(groups, return_inverse=True)
    rank = np.argsort(np.argsort([hashlib.blake2b(f"{salt}:{name}".encode()).hexdigest() for name in names]))
    return (rank % parts)[index]


def choose_cross_fitted(valid_probs: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Predictions (N, 3) of the best validation, cross-fitted: without the bias of choosing it on the rows it predicts.

    The validation with the lowest log loss on one half of the prompt groups gives the predictions of the other half,
    and vice versa. With a single prompt group, which has no halves, the best one on all rows gives all predictions.
    `valid_probs`: (V, N, 3) of the validation rows at each of V validations.
    """
    losses = np.stack([scores.row_losses(labels, probs) for probs in valid_probs])  # (V, N)
    probs = valid_probs[losses.mean(axis=1).argmin()].copy()
    half = split_groups(groups, 2, "step") == 1
    if half.any():
        for chosen_on in (half, ~half):
            probs[~chosen_on] = valid_probs[losses[:, chosen_on].mean(axis=1).argmin()][~chosen_on]
    return probs


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
    return mean + (np.concatenate(means) - mean) * np.sqrt(draws / len(sums))
