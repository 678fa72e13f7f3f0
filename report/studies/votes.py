"""Votes by place of the answer, ties by turns and length, and scripts, on the shipped rows: a picture for the report.

python -m report.studies.votes          writes report/studies/votes.svg
"""

import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefcls_lib.data.loading import read_rows, sample_path
from prefcls_lib.data.schema import RESPONSES, TEXT_COLUMNS, class_shares
from prefcls_lib.evaluation.plots import BLUE, GREY, ORANGE, finish
from report.page import draw_svg


def plot_votes(rows: pd.DataFrame) -> Figure:
    """Left: votes by place of the answer, with 95 % intervals. Middle: ties, by turns and length. Right: scripts."""
    labels = rows["label"].to_numpy()
    figure = Figure(figsize=(7.5, 2.7), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.15, 1.15))
    shares = class_shares(labels)
    spread = 1.96 * np.sqrt(shares * (1 - shares) / len(labels))
    left.bar(["A", "B", "tie"], shares, yerr=spread, color=[BLUE, ORANGE, GREY], ecolor="black", capsize=2)
    left.set(title="Votes by place", ylabel="share of rows")

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
    right.set_xlim(0.7, 8 * counts.max())
    for axes in (left, middle, right):
        axes.tick_params(labelsize=8)
    return finish(figure)


def _plot_shares(axes: Axes, slices: dict[str, np.ndarray], hit: np.ndarray, color: str) -> None:
    """One level bar a slice: the share of its rows that are hit, with a 95 % interval."""
    slices = {name: here for name, here in slices.items() if here.any()}
    shares = np.array([hit[here].mean() for here in slices.values()])
    spread = [1.96 * np.sqrt(p * (1 - p) / here.sum()) for p, here in zip(shares, slices.values(), strict=True)]
    names = [f"{name} ({here.sum()})" for name, here in slices.items()]
    axes.barh(names[::-1], shares[::-1], xerr=spread[::-1], color=color, ecolor="black", capsize=2)


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


def main() -> None:
    """Draw, write."""
    rows = read_rows(sample_path("train"), labelled=True)
    Path(__file__).with_name("votes.svg").write_bytes(draw_svg(plot_votes(rows)))


if __name__ == "__main__":
    main()
