"""Where a model is wrong: log loss in slices of the rows, the flip rate, the most confident mistakes."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from prefcls_lib.data.features import empty_answers, identical_answers
from prefcls_lib.data.schema import ID, LABEL_COLUMNS, MODEL_COLUMNS, PROMPT, SWAP, TEXT_COLUMNS
from prefcls_lib.evaluation.compare import bootstrap_interval
from prefcls_lib.evaluation.scores import row_losses

LENGTH_RATIOS = (1 / 3, 1 / 1.5, 1 / 1.1, 1.1, 1.5, 3.0)  # characters of A over those of B
LENGTH_GAPS = ("B, 3 times or more", "B, 1.5 to 3 times", "B, 1.1 to 1.5 times", "about equal",
               "A, 1.1 to 1.5 times", "A, 1.5 to 3 times", "A, 3 times or more")  # fmt: skip
TOTAL_CHARS = (1_000, 2_300, 4_000)  # of prompt and answers: near the quartiles of the competition's rows
TOTAL_NAMES = ("under 1,000", "1,000 to 2,300", "2,300 to 4,000", "4,000 or more")
NO_YES = ("no", "yes")
MIN_SLICE_GROUPS = 10


def confusion_matrix(labels: np.ndarray, probs: np.ndarray) -> pd.DataFrame:
    """(3, 3) numbers of rows by label (lines) and by the most probable class of `probs` (N, 3) (columns)."""
    names = ["A wins", "B wins", "tie"]
    counts = np.bincount(3 * labels + probs.argmax(axis=1), minlength=9).reshape(3, 3)
    return pd.DataFrame(counts, pd.Index(names, name="vote"), pd.Index(names, name="most probable"))


def slice_table(
    rows: pd.DataFrame,
    labels: np.ndarray,
    probs: np.ndarray,
    other_probs: np.ndarray | None = None,
    cut: np.ndarray | None = None,
    top: int = 10,
) -> pd.DataFrame:
    """Log loss in slices: by length, turns, code, script, tie, identical or empty answers, model pair.

    `rows`: N of `loading.read_rows`. `other_probs`: (N, 3) of a baseline, to be compared slice by slice. `cut`: (N,)
    bool, the row's text did not fit the token budget. `top`: number of model pairs, the most frequent ones.

    One line for each slice that has rows: name, value, count, log_loss, low, high (95 % interval; NaN for fewer than
    MIN_SLICE_GROUPS prompts), accuracy; with `other_probs` also difference (negative: better), its low, high.
    """
    groups = rows["group"].to_numpy()
    right = probs.argmax(axis=1) == labels
    measured = [("log_loss", "low", "high", row_losses(labels, probs))]
    if other_probs is not None:
        against = measured[0][-1] - row_losses(labels, other_probs)
        measured.append(("difference", "difference_low", "difference_high", against))
    lines = []
    for name, values, index in _slices(rows, labels, cut, top):
        for number in np.unique(index[index >= 0]):
            here = index == number
            enough = len(np.unique(groups[here])) >= MIN_SLICE_GROUPS  # to resample
            line = {"name": name, "value": str(values[number]), "count": int(here.sum())}
            for mean, low, high, losses in measured:
                interval = bootstrap_interval(losses[here], groups[here]) if enough else (np.nan, np.nan)
                line |= {mean: losses[here].mean(), low: interval[0], high: interval[1]}
            lines.append(line | {"accuracy": right[here].mean()})
    return pd.DataFrame(lines)


def flip_rate(probs: np.ndarray, swapped_probs: np.ndarray) -> float:
    """Share of rows whose predicted class changes when A and B change places: position bias, at best 0.

    `swapped_probs` (N, 3): predictions of the same rows with the answers swapped, in that order's columns.
    """
    return float((probs.argmax(axis=1) != swapped_probs[:, list(SWAP)].argmax(axis=1)).mean())


def most_confident_mistakes(rows: pd.DataFrame, probs: np.ndarray, count: int) -> pd.DataFrame:
    """The wrong ones of `probs` (N, 3) with the highest confidence: id, label, predicted, confidence.

    The index is the position in `rows`, so `rows.iloc[table.index]` are the comparisons themselves.
    """
    labels = rows["label"].to_numpy()
    predicted, confidence = probs.argmax(axis=1), probs.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    order = order[predicted[order] != labels[order]][:count]
    table = {"label": labels[order], "predicted": predicted[order], "confidence": confidence[order]}
    return pd.DataFrame({ID: rows[ID].to_numpy()[order], **table}, index=order)


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
    others = np.array([[0 if text.isascii() else sum(c > "\x7f" for c in text) for text in column] for column in texts])
    share = others.sum(axis=0) / np.maximum(total, 1)
    index = (share > 0).astype(int) + (share >= 0.1)
    yield "non-ASCII characters", ("none", "under 10 %", "10 % or more"), index
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
