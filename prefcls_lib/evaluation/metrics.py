"""Numbers about predictions, each with its uncertainty: log loss, comparisons, calibration error, slices.

Rows that share a prompt are not independent, so every interval here resamples prompt groups, never rows.
Shapes: labels (N,) of 0, 1, 2; probs (N, 3) in `schema.LABEL_COLUMNS` order; groups (N,) of str.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from prefcls_lib.data.features import empty_answers, identical_answers
from prefcls_lib.data.schema import (
    ID,
    LABEL_COLUMNS,
    MODEL_COLUMNS,
    NUM_CLASSES,
    PROMPT,
    SWAP,
    TEXT_COLUMNS,
)
from prefcls_lib.runtime.files import UserError

SMALLEST_PROB = float(np.finfo(np.float64).eps)
LENGTH_RATIOS = (1 / 3, 1 / 1.5, 1 / 1.1, 1.1, 1.5, 3.0)  # characters of A over those of B
LENGTH_GAPS = ("B, 3 times or more", "B, 1.5 to 3 times", "B, 1.1 to 1.5 times", "about equal",
               "A, 1.1 to 1.5 times", "A, 1.5 to 3 times", "A, 3 times or more")  # fmt: skip
TOTAL_CHARS = (1_000, 2_300, 4_000)  # of prompt and answers: near the quartiles of the competition's rows
TOTAL_NAMES = ("under 1,000", "1,000 to 2,300", "2,300 to 4,000", "4,000 or more")
NO_YES = ("no", "yes")
MIN_SLICE_GROUPS = 10
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
    """How often the most probable class is right, by how probable it was said to be.

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
        (low, high); (nan, nan) with fewer than two groups, where nothing can be said.
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
    smallest_detectable: float  # difference found with 80 % power at the 5 % level: 2.8 standard errors
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
    """(N,) bool: prompt groups in two halves, by a hash of the group, whatever the order of the rows."""
    names, index = np.unique(groups, return_inverse=True)
    rank = np.argsort(np.argsort([hashlib.blake2b(str(name).encode()).hexdigest() for name in names]))
    return (rank % 2 == 1)[index]


def choose_honestly(valid_probs: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, int]:
    """Predictions of the best validation step, free of the bias of having picked it on the same rows.

    The step with the lowest log loss on one half of the prompt groups supplies the other half's predictions,
    and the other way round. A single prompt group has no halves: there the best step's predictions come back.

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


def slice_table(
    rows: pd.DataFrame,
    labels: np.ndarray,
    probs: np.ndarray,
    other_probs: np.ndarray | None = None,
    cut: np.ndarray | None = None,
    top: int = 10,
) -> pd.DataFrame:
    """Log loss where it may differ: by length, turns, code, script, tie, odd answers, model pair.

    Args:
        rows: from `data.read_rows`, N rows.
        other_probs: (N, 3) of a baseline, to be compared slice by slice.
        cut: (N,) bool, the row's text did not fit the token budget.
        top: number of model pairs, the most frequent ones.

    Returns:
        One line for each slice that has rows (no interval for fewer than MIN_SLICE_GROUPS prompts): name,
            value, count, log_loss, low, high (95 % interval),
        accuracy; with `other_probs` also difference, difference_low, difference_high (negative: better).
    """
    groups = rows["group"].to_numpy()
    losses = row_losses(labels, probs)
    right = probs.argmax(axis=1) == labels
    against = None if other_probs is None else losses - row_losses(labels, other_probs)
    lines = []
    for name, values, index in _slices(rows, labels, cut, top):
        for number in np.unique(index[index >= 0]):
            here = index == number
            low, high = _slice_interval(losses[here], groups[here])
            line = {"name": name, "value": str(values[number]), "count": int(here.sum())}
            line |= {
                "log_loss": losses[here].mean(),
                "low": low,
                "high": high,
                "accuracy": right[here].mean(),
            }
            if against is not None:
                low, high = _slice_interval(against[here], groups[here])
                line |= {"difference": against[here].mean(), "difference_low": low, "difference_high": high}
            lines.append(line)
    return pd.DataFrame(lines)


def _slice_interval(values: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """`bootstrap_interval`, or NaN for fewer than MIN_SLICE_GROUPS prompts, whose resamples say nothing."""
    if len(np.unique(groups)) < MIN_SLICE_GROUPS:
        return float("nan"), float("nan")
    return bootstrap_interval(values, groups)


def flip_rate(probs: np.ndarray, swapped_probs: np.ndarray) -> float:
    """Share of rows whose verdict changes when A and B change places: position bias; 0 is right.

    Args:
        probs: (N, 3).
        swapped_probs: (N, 3) predictions of the same rows with the answers swapped, in that order's columns.
    """
    return float((probs.argmax(axis=1) != swapped_probs[:, list(SWAP)].argmax(axis=1)).mean())


def most_confident_mistakes(rows: pd.DataFrame, probs: np.ndarray, count: int) -> pd.DataFrame:
    """The wrong verdicts held with most confidence, for reading: id, label, predicted, confidence.

    The index is the position in `rows`, so `rows.iloc[table.index]` are the comparisons themselves.
    """
    labels = rows["label"].to_numpy()
    predicted, confidence = probs.argmax(axis=1), probs.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    order = order[predicted[order] != labels[order]][:count]
    return pd.DataFrame(
        {
            ID: rows[ID].to_numpy()[order],
            "label": labels[order],
            "predicted": predicted[order],
            "confidence": confidence[order],
        },
        index=order,
    )


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


def _slices(
    rows: pd.DataFrame, labels: np.ndarray, cut: np.ndarray | None, top: int
) -> Iterator[tuple[str, Sequence[str], np.ndarray]]:
    """(name, values, (N,) index of each row's value; -1: none of them)."""
    texts = [["\n".join(turns) for turns in rows[name]] for name in TEXT_COLUMNS]
    chars = np.array([list(map(len, column)) for column in texts])  # (3, N)
    total = chars.sum(axis=0)
    yield "who is longer", LENGTH_GAPS, np.digitize((1 + chars[1]) / (1 + chars[2]), LENGTH_RATIOS)
    yield "characters", TOTAL_NAMES, np.digitize(total, TOTAL_CHARS)
    yield "turns", ("1", "2", "3 or more"), np.minimum(rows[PROMPT].map(len).to_numpy(), 3) - 1
    code = ["```" in a or "```" in b for a, b in zip(*texts[1:], strict=True)]
    yield "code fence in an answer", NO_YES, np.array(code, dtype=int)
    others = np.array([[0 if text.isascii() else _count_others(text) for text in column] for column in texts])
    share = others.sum(axis=0) / np.maximum(total, 1)
    yield (
        "non-ASCII characters",
        ("none", "under 10 %", "10 % or more"),
        (share > 0).astype(int) + (share >= 0.1),
    )
    yield "tie", NO_YES, (labels == LABEL_COLUMNS.index("winner_tie")).astype(int)
    yield "identical answers", NO_YES, identical_answers(rows).astype(int)
    yield "empty or null answer", NO_YES, empty_answers(rows).any(axis=1).astype(int)
    if cut is not None:
        yield "cut", NO_YES, np.asarray(cut, dtype=int)
    if set(MODEL_COLUMNS) <= set(rows.columns):
        pairs = [" / ".join(sorted(pair)) for pair in zip(*(rows[name] for name in MODEL_COLUMNS), strict=True)]
        names, index, counts = np.unique(pairs, return_inverse=True, return_counts=True)
        most = np.argsort(-counts, kind="stable")[:top]
        yield "model pair", names[most], (index[:, None] == most) @ np.arange(1, len(most) + 1) - 1


def _count_others(text: str) -> int:
    return sum(c > "\x7f" for c in text)
