"""How well can anybody predict a vote? Three people's votes on each of 2,240 pairs of answers.

    python -m report.studies.ceiling prd_votes.csv        half a minute; writes ceiling.json and ceiling.svg beside this

The file has a line a pair: question, votes_a, votes_b, votes_tie (three votes together). It was made from the votes of
github.com/bcdnlp/PRD (MIT; Li, Patel and Du 2023, https://arxiv.org/abs/2307.02762): all pairs of eight models' answers
to the 80 questions of Vicuna's set.
"""

import argparse
from itertools import permutations, product
from math import factorial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.optimize import linprog

from prefcls_lib.data.schema import NUM_CLASSES
from prefcls_lib.evaluation import plots
from prefcls_lib.evaluation.compare import bootstrap_interval
from prefcls_lib.runtime.files import write_json
from report.page import draw_svg

OUT = Path(__file__).with_suffix("")
PEOPLE, FOLDS, RESAMPLES = 3, 10, 200
GRID = 40  # steps of a probability from 0 to 1


def predict_votes(votes: np.ndarray, folds: np.ndarray, known: int) -> np.ndarray:
    """(N,) mean loss of a pair's votes, each predicted from `known` of its others.

    What is predicted are the shares of the votes beside the same other votes, counted in the other folds (one is added
    to each count); with none known, the class shares. votes (N, 3): 0, 1, 2 for A, B, tie; folds (N,).
    """
    order = np.array(list(permutations(range(PEOPLE), 1 + known)))  # the vote that is predicted, those that are known
    vote, seen = votes[:, order[:, 0]], np.sort(votes[:, order[:, 1:]]) @ NUM_CLASSES ** np.arange(known)  # (N, R)
    losses = np.empty(vote.shape)
    for fold in np.unique(folds):
        here = folds == fold
        counts = np.ones((NUM_CLASSES**known, NUM_CLASSES))
        np.add.at(counts, (seen[~here], vote[~here]), 1)
        probs = counts / counts.sum(axis=1, keepdims=True)
        losses[here] = -np.log(probs[seen[here], vote[here]])
    return losses.mean(axis=1)


def bound_entropy(counts: np.ndarray) -> tuple[float, float]:
    """Least and greatest log loss of somebody who knows how each pair's votes are distributed, from counts (N, 3).

    The votes of a pair are taken for independent draws. A pair's distribution of votes is a point p of the triangle;
    among all mixtures of points that explain how often each outcome of three votes occurs, those with the least and
    the greatest mean entropy (linear programs; a resample that no mixture explains is explained as nearly as possible).
    """
    steps = product(range(GRID + 1), repeat=2)
    p = np.array([(a, b, GRID - a - b) for a, b in steps if a + b <= GRID]) / GRID
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=1)
    outcomes = np.array([kind for kind in product(range(PEOPLE + 1), repeat=NUM_CLASSES) if sum(kind) == PEOPLE])
    ways = np.array([factorial(PEOPLE) / np.prod([factorial(n) for n in kind]) for kind in outcomes])
    explained = ways[:, None] * (p[None] ** outcomes[:, None]).prod(axis=2)  # (outcomes, points)
    found = (counts[None] == outcomes[:, None]).all(axis=2).mean(axis=1)
    unit, one = np.eye(len(outcomes)), np.r_[np.ones(len(p)), np.zeros(2 * len(outcomes))]
    equal, price = np.r_[np.c_[explained, unit, -unit], one[None]], 100 * (1 - one)  # of what is not explained
    least, most = (linprog(np.r_[sign * entropy, price[len(p) :]], A_eq=equal, b_eq=np.append(found, 1)).x
                   for sign in (1, -1))  # fmt: skip
    return float(least[: len(p)] @ entropy), float(most[: len(p)] @ entropy)


def measure(table: pd.DataFrame) -> dict:
    """Agreement, log losses and bounds, with 95 % intervals that resample questions."""
    counts, questions = table[["votes_a", "votes_b", "votes_tie"]].to_numpy(), table["question"].to_numpy()
    votes = np.array([np.repeat(range(NUM_CLASSES), line) for line in counts])

    def interval(values: np.ndarray) -> dict:
        low, high = bootstrap_interval(values, questions)
        return {"value": float(values.mean()), "low": low, "high": high}

    losses = [predict_votes(votes, questions % FOLDS, known) for known in range(PEOPLE)]
    least, most = bound_entropy(counts)
    random, names = np.random.default_rng(0), np.unique(questions)
    rows = {name: np.flatnonzero(questions == name) for name in names}
    resampled = [bound_entropy(counts[np.concatenate([rows[name] for name in random.choice(names, len(names))])])
                 for _ in range(RESAMPLES)]  # fmt: skip
    return {
        "pairs": len(counts), "questions": len(names), "shares": (counts.sum(axis=0) / counts.sum()).tolist(),
        "agreement": interval((counts * (counts - 1)).sum(axis=1) / (PEOPLE * (PEOPLE - 1))),
        "all_agree": interval((counts.max(axis=1) == PEOPLE).astype(float)),
        "log_loss": [interval(values) for values in losses],  # with none, one, two other votes known
        "gain": [interval(losses[0] - values) for values in losses],
        "ceiling": {"least": least, "most": most, "low": float(np.percentile([a for a, _ in resampled], 2.5)),
                    "high": float(np.percentile([b for _, b in resampled], 97.5))},
    }  # fmt: skip


def draw(found: dict) -> Figure:
    """Log loss of a vote, by what is known of the pair."""
    figure = Figure(figsize=(5.2, 1.7), layout="constrained")
    axes, ceiling = figure.subplots(), found["ceiling"]
    for place, line in enumerate(found["log_loss"]):
        error = [[line["value"] - line["low"]], [line["high"] - line["value"]]]
        axes.errorbar(line["value"], -place, xerr=error, fmt="o", color=plots.BLUE, ms=5, lw=1.2)
    axes.plot([ceiling["low"], ceiling["high"]], [-PEOPLE] * 2, color=plots.GREEN, lw=1.2)
    axes.plot([ceiling["least"], ceiling["most"]], [-PEOPLE] * 2, color=plots.GREEN, lw=5, solid_capstyle="butt")
    names = ("class shares", "one other vote", "two other votes", "distribution of the pair's votes")
    axes.set_yticks(range(0, -len(names), -1), names, fontsize=8)
    axes.set(xlabel="log loss of a vote", ylim=(-PEOPLE - 0.6, 0.6))
    axes.tick_params(labelsize=8)
    return plots.finish(figure)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a CSV file with a line a pair")
    found = measure(pd.read_csv(parser.parse_args().file))
    write_json(OUT.with_suffix(".json"), found)
    OUT.with_suffix(".svg").write_bytes(draw_svg(draw(found)))
    print(found)


if __name__ == "__main__":
    main()
