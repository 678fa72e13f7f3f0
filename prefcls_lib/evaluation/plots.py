"""Figures: each function takes data and returns a matplotlib Figure; none saves it."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from prefcls_lib.data.schema import RESPONSES, class_shares

UNIFORM = np.log(3)
# As in figs/: after Okabe and Ito, which the colour-blind can distinguish; in grey by lightness or by their marks.
BLUE, ORANGE, GREY, GREEN, PINK = "#0a5d94", "#e08a1e", "#808080", "#00694d", "#97406f"
MARKS = {"baseline": (ORANGE, "o"), "network": (BLUE, "s"), "blend": (GREEN, "D")}


def plot_rows(rows: pd.DataFrame) -> Figure:
    """Left: characters of an answer. Right: who wins, by how much longer answer A is than B."""
    lengths = np.array([[sum(map(len, turns)) for turns in rows[name]] for name in RESPONSES]).T  # (N, 2)
    figure = Figure(figsize=(7.5, 2.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(np.log10(lengths.ravel() + 1), bins=40, color=BLUE)
    left.set_xticks(range(5), ["1", "10", "100", "1,000", "10,000"])
    left.set(title="Answers by length", xlabel="characters of an answer", ylabel="answers")
    ratio = np.log2((lengths[:, 0] + 1) / (lengths[:, 1] + 1))
    edges = np.array([-2, -1, -0.5, -0.2, 0.2, 0.5, 1, 2])
    bins = np.digitize(ratio, edges)
    labels = [rows["label"].to_numpy()[bins == b] for b in range(len(edges) + 1)]
    shares = np.array([class_shares(here) if len(here) else np.full(3, np.nan) for here in labels])
    lines = [("A wins", BLUE, "o-"), ("B wins", ORANGE, "s-"), ("tie", GREY, "^--")]
    for label, (name, color, mark) in enumerate(lines):
        right.plot(shares[:, label], mark, color=color, ms=5, label=name)
    ticks = ["<¼", "¼–½", "½–.7", ".7–.9", "equal", "1.1–1.4", "1.4–2", "2–4", ">4"]
    right.set_xticks(range(len(ticks)), ticks, fontsize=6.5)
    right.set(title="Longer answers win", xlabel="length of A / length of B", ylabel="share of rows", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
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


def plot_history(history: pd.DataFrame, baseline_log_loss: float) -> Figure:
    """Unsmoothed log loss over the epochs of every model, beside that of the baseline and of a uniform guess."""
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (_, model) in enumerate(history.groupby(["fold", "seed"])):
        names = ("training rows", "validation rows") if number == 0 else (None, None)
        axes.plot(model["epoch"], model["train_log_loss"], "o--", color=GREY, label=names[0])
        axes.plot(model["epoch"], model["valid_log_loss"], "o-", color=BLUE, label=names[1])
    axes.axhline(UNIFORM, color="black", lw=1, ls=":", label="uniform guess, ln 3")
    axes.axhline(baseline_log_loss, color=GREEN, lw=1.5, ls="--", label="the baseline")
    axes.set(title="Log loss while training", xlabel="epoch", ylabel="log loss (unsmoothed)", xlim=(0, None))
    axes.legend(frameon=False)
    return finish(figure)


def plot_reliability(table: pd.DataFrame, ece: float) -> Figure:
    """`scores.reliability_table`: accuracy against confidence, with 95 % intervals (Wilson) and the number of rows."""
    figure = Figure(figsize=(4.2, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.plot([1 / 3, 1], [1 / 3, 1], color="black", lw=1, ls=":", label="perfectly calibrated")
    p, n, z = table["accuracy"], table["count"], 1.96
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    errors = np.maximum(0, [p - centre + half, centre + half - p])
    label = "validation rows, 95 % interval"
    axes.errorbar(table["confidence"], p, errors, fmt="o", color=BLUE, capsize=3, label=label)
    for x, y, count in zip(table["confidence"], centre + half, n, strict=True):
        axes.annotate(f"{count}", (x, y), (0, 4), textcoords="offset points", ha="center", fontsize=7, color=GREY)
    axes.set(title=f"expected calibration error {ece:.3f}", xlabel="confidence in the verdict",
             ylabel="share that was right", xlim=(0.3, 1.03), ylim=(-0.04, 1.09))  # fmt: skip
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return finish(figure)


def plot_results(lines: pd.DataFrame) -> Figure:
    """Log loss of models on the same rows as dots with 95 % intervals, grouped by kind; the uniform guess marked.

    `lines`, by name: log_loss, low, high, and kind ("baseline", "network", "blend"); without it, `result_table`'s.
    """
    if "kind" not in lines:
        lines = lines.assign(kind=["network" if name.startswith("network") else "baseline" for name in lines.index])
    kinds = [kind for kind in MARKS if (lines["kind"] == kind).any()]
    figure = Figure(figsize=(7.5, 0.7 + 0.19 * (len(lines) + len(kinds))), layout="constrained")
    axes = figure.subplots()
    names, places, place = [], [], 0.0
    for kind in kinds:
        part, (color, mark) = lines[lines["kind"] == kind], MARKS[kind]
        here = place - np.arange(len(part))
        axes.hlines(here, part["low"], part["high"], color=color, lw=1.8)
        axes.plot(part["log_loss"], here, mark, color=color, ms=6, label=kind)
        names, places, place = [*names, *part.index], [*places, *here], here[-1] - 1.6
    axes.axvline(UNIFORM, color="black", lw=1, ls=":", label="uniform guess, ln 3")
    axes.set_yticks(places, names, fontsize=8.5, parse_math=False)
    axes.set(xlabel="log loss, unsmoothed, with 95 % interval (left is better)", ylim=(place + 0.9, 0.7))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return finish(figure)


def plot_slices(table: pd.DataFrame) -> Figure:
    """`slices.slice_table` against a baseline: the difference in log loss of each slice with its interval."""
    figure = Figure(figsize=(7.5, 0.7 + 0.19 * len(table)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(table))[::-1]
    axes.hlines(places, table["difference_low"], table["difference_high"], color=BLUE, lw=2)
    axes.plot(table["difference"], places, "o", color=BLUE)
    axes.axvline(0, color="black", lw=1, ls=":")
    names = table["name"] + ": " + table["value"] + " (" + table["count"].astype(str) + ")"
    axes.set_yticks(places, names, fontsize=8, parse_math=False)
    axes.set(ylim=(-0.7, len(table) - 0.3), xlabel="network minus baseline, log loss (left: the network is better)")
    return finish(figure)


def finish(figure: Figure) -> Figure:
    """The same spines and title size everywhere."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(9.5)
    return figure
