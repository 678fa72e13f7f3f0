"""Figures: each function takes data and returns a matplotlib Figure; none saves it."""

import unicodedata
from collections import Counter

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefcls_lib.data.schema import RESPONSES, TEXT_COLUMNS, class_shares

UNIFORM = np.log(3)
BLUE, ORANGE, GREY, GREEN = "#2f6db3", "#d9742b", "#8a8a8a", "#1f8a63"


def plot_rows(rows: pd.DataFrame) -> Figure:
    """Left: characters of an answer. Right: who wins, by how much longer answer A is than B."""
    lengths = np.array([[sum(map(len, turns)) for turns in rows[name]] for name in RESPONSES]).T  # (N, 2)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(np.log10(lengths.ravel() + 1), bins=40, color=BLUE)
    left.set_xticks(range(5), ["1", "10", "100", "1,000", "10,000"])
    left.set(title="Answers by length", xlabel="characters of an answer", ylabel="answers")
    ratio = np.log2((lengths[:, 0] + 1) / (lengths[:, 1] + 1))
    edges = np.array([-2, -1, -0.5, -0.2, 0.2, 0.5, 1, 2])
    bins = np.digitize(ratio, edges)
    shares = np.array([_class_shares(rows["label"].to_numpy()[bins == b]) for b in range(len(edges) + 1)])
    for label, (name, color) in enumerate([("A wins", BLUE), ("B wins", ORANGE), ("tie", GREY)]):
        right.plot(shares[:, label], "o-", color=color, label=name)
    ticks = ["<¼", "¼–½", "½–.7", ".7–.9", "equal", "1.1–1.4", "1.4–2", "2–4", ">4"]
    right.set_xticks(range(len(ticks)), ticks, fontsize=8)
    right.set(title="Longer answers win", xlabel="length of A / length of B", ylabel="share of rows", ylim=(0, None))
    right.legend(frameon=False)
    return _finish(figure)


def plot_token_lengths(lengths: np.ndarray, max_length: int) -> Figure:
    """Tokens of each side (N, 2) with the limit marked."""
    figure = Figure(figsize=(6, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths.ravel(), bins=40, color=BLUE)
    axes.axvline(max_length, color=ORANGE, label=f"max_length = {max_length}")
    axes.set(title="Tokens of a side, after the budget", xlabel="tokens", ylabel="sides")
    axes.legend(frameon=False)
    return _finish(figure)


def plot_history(history: pd.DataFrame, ladder_log_loss: float) -> Figure:
    """Unsmoothed log loss over the epochs of every fold, with the uniform guess and the best baseline."""
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (_, fold) in enumerate(history.groupby("fold")):
        names = ("training rows", "validation rows") if number == 0 else (None, None)
        axes.plot(fold["epoch"], fold["train_log_loss"], "o--", color=GREY, label=names[0])
        axes.plot(fold["epoch"], fold["valid_log_loss"], "o-", color=BLUE, label=names[1])
    axes.axhline(UNIFORM, color="black", lw=1, ls=":", label="uniform guess, ln 3")
    axes.axhline(ladder_log_loss, color=ORANGE, lw=1.5, label="best baseline")
    axes.set(title="Log loss while training", xlabel="epoch", ylabel="log loss (unsmoothed)", xlim=(0, None))
    axes.legend(frameon=False)
    return _finish(figure)


def plot_ladder(table: pd.DataFrame) -> Figure:
    """`runs.result_table` as points with their 95 % intervals; the uniform guess marked."""
    figure = Figure(figsize=(6.5, 0.8 + 0.4 * len(table)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(table))[::-1]
    for place, (name, line) in zip(places, table.iterrows(), strict=True):
        color = ORANGE if str(name).startswith("network") else BLUE
        axes.plot([line["low"], line["high"]], [place, place], color=color, lw=2)
        axes.plot(line["log_loss"], place, "o", color=color)
    axes.set_yticks(places, table.index)
    axes.axvline(UNIFORM, color="black", lw=1, ls=":")
    axes.set(title="Log loss on validation rows, 95 % intervals (lower is better)", xlabel="log loss")
    return _finish(figure)


def plot_reliability(table: pd.DataFrame, ece: float) -> Figure:
    """`metrics.reliability_table`: accuracy against confidence; points as large as their rows are many."""
    figure = Figure(figsize=(4.2, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([1 / 3, 1], [1 / 3, 1], color="black", lw=1, ls=":", label="perfectly calibrated")
    sizes = 20 + 300 * table["count"] / table["count"].sum()
    axes.scatter(table["confidence"], table["accuracy"], s=sizes, color=BLUE, alpha=0.8, label="validation rows")
    axes.set(
        title=f"Calibration: expected error {ece:.3f}", xlabel="confidence in the verdict",
        ylabel="share that was right", xlim=(0.3, 1), ylim=(0, 1),
    )  # fmt: skip
    axes.legend(frameon=False, loc="upper left")
    return _finish(figure)


def plot_votes(rows: pd.DataFrame) -> Figure:
    """Left: votes by place of the answer, with 95 % intervals. Middle: ties, by turns and length. Right: scripts."""
    labels = rows["label"].to_numpy()
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.15, 1.15))
    shares = _class_shares(labels)
    spread = 1.96 * np.sqrt(shares * (1 - shares) / len(labels))
    left.bar(["A", "B", "tie"], shares, yerr=spread, color=[BLUE, ORANGE, GREY], ecolor="black", capsize=3)
    left.set(title="Votes by place of the answer", ylabel="share of rows")

    lengths = np.array([[sum(map(len, turns)) for turns in rows[name]] for name in RESPONSES])  # (2, N)
    gap = np.abs(np.log2((lengths[0] + 1) / (lengths[1] + 1)))
    turns = rows[TEXT_COLUMNS[0]].map(len).to_numpy()
    slices = {
        "lengths within 10 %": gap < np.log2(1.1),
        "up to 2 times": (gap >= np.log2(1.1)) & (gap < 1),
        "more than 2 times": gap >= 1,
        "one turn": turns == 1,
        "several turns": turns > 1,
    }
    _plot_shares(middle, slices, labels == 2, GREY)
    middle.set(title="Share of ties", xlabel="share of rows", xlim=(0, None))

    scripts = [_find_script("".join(turn for name in TEXT_COLUMNS for turn in row[name])) for _, row in rows.iterrows()]
    names, counts = np.unique(scripts, return_counts=True)
    order = np.argsort(counts)
    right.barh([names[i] for i in order], counts[order], color=BLUE)
    right.set(title="Characters of a row", xlabel="rows (logarithmic)", xscale="log")
    right.bar_label(right.containers[0], padding=3, fontsize=8)
    right.set_xlim(0.7, 4 * counts.max())
    return _finish(figure)


def plot_results(lines: pd.DataFrame, prior: float | None) -> Figure:
    """Log loss of several models on the same rows (name, kind, log_loss, low, high), with uniform guess and prior."""
    figure = Figure(figsize=(8, 0.9 + 0.32 * len(lines)), layout="constrained")
    axes = figure.subplots()
    colors = {"baseline": BLUE, "network": ORANGE, "blend": GREEN}
    places = np.arange(len(lines))[::-1]
    for kind, color in colors.items():
        here = (lines["kind"] == kind).to_numpy()
        if here.any():
            part = lines[here]
            axes.hlines(places[here], part["low"], part["high"], color=color, lw=2)
            axes.plot(part["log_loss"], places[here], "o", color=color, label=kind)
    axes.axvline(UNIFORM, color="black", lw=1, ls=":", label="uniform guess, ln 3")
    if prior is not None:
        axes.axvline(prior, color=GREY, lw=1, ls="--", label="class shares")
    axes.set_yticks(places, lines["name"])
    axes.set(xlabel="log loss, unsmoothed, with 95 % interval (lower is better)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    return _finish(figure)


def plot_slices(table: pd.DataFrame) -> Figure:
    """`slices.slice_table` against a baseline: the difference in log loss of each slice with its interval."""
    figure = Figure(figsize=(8, 0.8 + 0.24 * len(table)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(table))[::-1]
    axes.hlines(places, table["difference_low"], table["difference_high"], color=BLUE, lw=2)
    axes.plot(table["difference"], places, "o", color=BLUE)
    axes.axvline(0, color="black", lw=1, ls=":")
    columns = zip(table["name"], table["value"], table["count"], strict=True)
    names = [f"{name}: {value} ({count})" for name, value, count in columns]
    axes.set_yticks(places, names, fontsize=8)
    axes.set(xlabel="log loss of the network minus that of the ladder (left: the network is better)")
    return _finish(figure)


def plot_floor(lines: pd.DataFrame) -> Figure:
    """Variants on rows whose best log loss is known: log loss between that floor and the prior."""
    figure = Figure(figsize=(8, 1.1 + 0.3 * len(lines)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(lines))[::-1]
    colors = [GREY if name.startswith("original") else BLUE for name in lines["variant"]]
    axes.scatter(lines["log_loss"], places, color=colors, zorder=3)
    axes.axvline(lines["floor"].mean(), color=GREEN, lw=1.5, label="floor: what could be reached")
    axes.axvline(lines["prior"].mean(), color="black", lw=1, ls=":", label="class shares: nothing learned")
    axes.axvline(lines["structure_logistic"].mean(), color=ORANGE, lw=1, ls="--", label="structure alone")
    axes.set_yticks(places, lines["variant"])
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.set(xlabel="log loss on validation rows")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return _finish(figure)


def _plot_shares(axes: Axes, slices: dict[str, np.ndarray], hit: np.ndarray, color: str) -> None:
    """One level bar a slice: the share of its rows that are hit, with a 95 % interval."""
    slices = {name: here for name, here in slices.items() if here.any()}
    shares = np.array([hit[here].mean() for here in slices.values()])
    spread = [1.96 * np.sqrt(p * (1 - p) / here.sum()) for p, here in zip(shares, slices.values(), strict=True)]
    names = [f"{name} ({here.sum()})" for name, here in slices.items()]
    axes.barh(names[::-1], shares[::-1], xerr=spread[::-1], color=color, ecolor="black", capsize=3)


def _find_script(text: str) -> str:
    """What a text is written in: the most frequent script among its letters beyond ASCII, if they are 10 % of all."""
    others = [c for c in text if c > "\x7f" and c.isalpha()]
    if len(others) < 0.1 * max(1, sum(map(str.isalpha, text))):
        if not others:
            return "ASCII" if text.isascii() else "ASCII and symbols"
        return "ASCII, few others"
    words = Counter(unicodedata.name(c, "other").split()[0] for c in others)
    first = words.most_common(1)[0][0]
    if {"CJK", "HIRAGANA", "KATAKANA", "HANGUL"} & {first}:
        return "Chinese, Japanese, Korean"
    return {"LATIN": "Latin with accents"}.get(first, first.capitalize())


def _class_shares(labels: np.ndarray) -> np.ndarray:
    return class_shares(labels) if len(labels) else np.full(3, np.nan)


def _finish(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    return figure
