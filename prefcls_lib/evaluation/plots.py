"""Figures: each function takes data and returns a matplotlib Figure; none saves it."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from prefcls_lib.data.schema import RESPONSES, class_shares

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
    labels = [rows["label"].to_numpy()[bins == b] for b in range(len(edges) + 1)]
    shares = np.array([class_shares(here) if len(here) else np.full(3, np.nan) for here in labels])
    for label, (name, color) in enumerate([("A wins", BLUE), ("B wins", ORANGE), ("tie", GREY)]):
        right.plot(shares[:, label], "o-", color=color, label=name)
    ticks = ["<¼", "¼–½", "½–.7", ".7–.9", "equal", "1.1–1.4", "1.4–2", "2–4", ">4"]
    right.set_xticks(range(len(ticks)), ticks, fontsize=8)
    right.set(title="Longer answers win", xlabel="length of A / length of B", ylabel="share of rows", ylim=(0, None))
    right.legend(frameon=False)
    return finish(figure)


def plot_token_lengths(lengths: np.ndarray, max_length: int) -> Figure:
    """Tokens of each side (N, 2) with the limit marked."""
    figure = Figure(figsize=(6, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths.ravel(), bins=40, color=BLUE)
    axes.axvline(max_length, color=ORANGE, label=f"max_length = {max_length}")
    axes.set(title="Tokens of a side, after the budget", xlabel="tokens", ylabel="sides")
    axes.legend(frameon=False)
    return finish(figure)


def plot_history(history: pd.DataFrame, ladder_log_loss: float) -> Figure:
    """Unsmoothed log loss over the epochs of every fold, with the uniform guess and the best baseline."""
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (_, fold) in enumerate(history.groupby("fold")):
        names = ("training rows", "validation rows") if number == 0 else (None, None)
        axes.plot(fold["epoch"], fold["train_log_loss"], "o--", color=GREY, label=names[0])
        axes.plot(fold["epoch"], fold["valid_log_loss"], "o-", color=BLUE, label=names[1])
    axes.axhline(UNIFORM, color="black", lw=1, ls=":", label="uniform guess, ln 3")
    axes.axhline(ladder_log_loss, color=ORANGE, lw=1.5, label="best baseline, chosen on other rows")
    axes.set(title="Log loss while training", xlabel="epoch", ylabel="log loss (unsmoothed)", xlim=(0, None))
    axes.legend(frameon=False)
    return finish(figure)


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
    return finish(figure)


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
    return finish(figure)


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
    return finish(figure)


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
    return finish(figure)


def finish(figure: Figure) -> Figure:
    """The same spines and title size everywhere."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    return figure
