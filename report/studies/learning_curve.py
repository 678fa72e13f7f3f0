"""At how many rows does the encoder pay? Network and baselines trained on N rows and scored on the same other rows.

    python -m report.studies.learning_curve FILE.csv --out runs/curve --rows 500 1000 2000 4000 --seeds 42 43 44
    python -m report.studies.learning_curve FILE.csv --out runs/curve --rows 1000 --backbone FOLDER --set num_epochs=2
    python -m report.studies.learning_curve --out runs/curve --collect

A fifth of the prompts (fold 0 of 5, of at most --max-rows rows) is kept for scoring. Of the other rows the N first in
an order that the seed draws are a training file; `prefcls run` trains one model on nine tenths of them and validates it
on the last tenth, as it would for a user with N rows. The baselines are fitted on the same nine tenths. A seed stands
for one draw of rows and one training. A network with other settings (--set) is a curve of its own.
What is done is kept in --out and not done again; what was stopped is resumed.
--collect writes learning_curve.json and learning_curve.svg beside this file, from all points in --out, of one file.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from prefcls_lib.baselines.columns import read_inputs
from prefcls_lib.baselines.out_of_fold import fit_simple
from prefcls_lib.config import RunConfig
from prefcls_lib.data.loading import read_rows
from prefcls_lib.data.schema import ID
from prefcls_lib.data.splits import assign_folds, take_rows
from prefcls_lib.evaluation import compare, plots, scores
from prefcls_lib.evaluation.calibration import blend_cross_fitted
from prefcls_lib.models.saved import load_model
from prefcls_lib.pipeline import steps
from prefcls_lib.pipeline.job import read_job
from prefcls_lib.runtime.files import read_json, write_json, write_whole
from report.page import draw_svg, escape_text, markdown_table, signed
from report.tables import COMPARED, comparison_cells

SETTINGS = {"max_length": 256, "num_folds": 10, "folds": (0,), "test": "sample"}
SPLIT_SEED = 42
FOLDER = Path(__file__).parent
TITLES = read_json(FOLDER.parent / "published.json")["learning_curve"]["sources"]
MODELS = ("network", "baseline")  # that are compared
MARKS = ((plots.BLUE, "s"), (plots.GREEN, "^"), (plots.PINK, "v"), (plots.GREY, "D"))


def split_rows(path: Path, max_rows: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows that may train and those that score, with no prompt in both."""
    rows = take_rows(read_rows(path, labelled=True), max_rows, SPLIT_SEED)
    scored = assign_folds(rows, 5, SPLIT_SEED, path) == 0
    return rows[~scored].reset_index(drop=True), rows[scored].reset_index(drop=True)


def draw_rows(pool: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """`count` rows of the pool; with the same seed a smaller count gives a part of them."""
    order = np.random.default_rng(seed).permutation(len(pool))
    return pool.iloc[np.sort(order[:count])].reset_index(drop=True)


def run_point(path: Path, pool: pd.DataFrame, scored: pd.DataFrame, count: int, settings: dict, folder: Path) -> None:
    """Train one point on rows of the file `path`, and write point.npz, unless it is there.

    It holds the scored rows' labels and groups, and each model's probabilities (N, 3) of them.
    """
    if (folder / "point.npz").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table = table[table[ID].isin(set(draw_rows(pool, count, settings["seed"])[ID]))].drop_duplicates(ID)
    with write_whole(folder / "rows.csv") as temporary:
        table.to_csv(temporary, index=False)
    places = {"train": str(folder / "rows.csv"), "out": str(folder / "run")}
    config = RunConfig.from_mapping({**settings, **places}, "--set")
    steps.run(config)
    job, network = read_job(config), load_model(folder / "run" / "model" / "fold0")
    train = job.rows[job.rows["fold"] != 0].reset_index(drop=True)
    fitted = {**fit_simple(read_inputs(train), train["label"].to_numpy()), "baseline": network.baseline}
    inputs = read_inputs(scored)
    probs = {name: model.predict_proba(inputs) for name, model in fitted.items()}
    probs["network"] = network.predict_proba(network.read_inputs(scored), label="score")
    with write_whole(folder / "point.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, label=scored["label"].to_numpy(), group=scored["group"].to_numpy().astype(str), **probs)


def read_point(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Labels (N,), prompt groups (N,) and each model's probabilities (N, 3) of the scored rows, from a point.npz."""
    with np.load(path, allow_pickle=False) as arrays:
        probs = {name: arrays[name] for name in arrays.files if name not in ("label", "group")}
        return arrays["label"], arrays["group"], probs


def average_seeds(points: Sequence[tuple]) -> dict:
    """Points (`read_point`) that differ in the seed: log losses, their means, and the network against its baseline.

    The interval is that of the row losses averaged over the seeds, since the seeds are scored on the same rows.
    """
    labels, groups, _ = points[0]
    if not all(np.array_equal(labels, other) and np.array_equal(groups, same) for other, same, _ in points):
        raise SystemExit("points of one number of rows were scored on different rows: --max-rows must stay the same")
    # The geometric mean is not normalised: so the loss of a row is the mean of the seeds' losses.
    probs = {name: np.exp(np.mean([np.log(one[name]) for *_, one in points], axis=0)) for name in points[0][2]}
    losses = [{name: scores.log_loss(labels, one[name]) for name in MODELS} for *_, one in points]
    return {
        "eval_rows": len(labels),
        "log_loss": {name: scores.log_loss(labels, values) for name, values in probs.items()},
        "seed_differences": [one["network"] - one["baseline"] for one in losses],
        "comparison": compare.compare(labels, *(probs[name] for name in MODELS), groups),
    }


def collect(out: Path) -> list[dict]:
    """A line for each network and number of rows in `out`; p is corrected for all of them.

    "calibrated" compares network and baseline after both were calibrated on other prompts: what is left is more than
    another temperature and tie bias of the baseline.
    """
    points: dict[tuple, dict] = {}
    for path in out.glob("*/*/point.npz"):
        count, seed = map(int, path.parent.name.split("-"))
        points.setdefault((path.parents[1].name, count), {})[seed] = read_point(path)
    lines = []
    for (name, count), found in sorted(points.items()):
        source, _, network = name.partition("--")
        about = {"source": source, "title": TITLES.get(source, source), "network": network, "rows": count}
        seeds, points_of = sorted(found), [found[seed] for seed in sorted(found)]
        calibrated = [(labels, groups, {one: blend_cross_fitted(labels, [probs[one]], groups) for one in MODELS})
                      for labels, groups, probs in points_of]  # fmt: skip
        about |= {"seeds": seeds, "calibrated": average_seeds(calibrated)["comparison"].to_dict()}
        lines.append(about | average_seeds(points_of))
    corrected = compare.holm_correction([line["comparison"] for line in lines])
    return [line | {"comparison": one.to_dict()} for line, one in zip(lines, corrected, strict=True)]


def make_table(lines: Sequence[dict]) -> str:
    """The lines of `collect` as a Markdown table."""
    cells = []
    for line in lines:
        losses = [f"{line['log_loss'][name]:.4f}" for name in ("baseline", "network")]
        *compared, _, verdict = comparison_cells(compare.Comparison.from_dict(line["comparison"]))
        rest = signed("{difference:+.4f} [{low:+.4f}, {high:+.4f}]".format(**line["calibrated"]))
        who, rows, seeds = escape_text(line["network"]), f"{line['rows']:,}", str(len(line["seeds"]))
        cells.append([who, rows, seeds, *losses, *compared, verdict, rest])
    header = ("network", "rows", "seeds", "its baseline", "network", *COMPARED[:3], COMPARED[-1], "both calibrated")
    return markdown_table(header, cells, (0, 8))


def plot_learning_curve(lines: Sequence[dict]) -> Figure:
    """Against the number of rows: log loss, and the network minus its baseline.

    `lines`: those of `collect`; each network has a mark, each seed a small cross.
    """
    figure = Figure(figsize=(7.5, 2.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    curves: dict[str, list[dict]] = {}
    for line in lines:
        curves.setdefault(line["network"], []).append(line)
    for place, (network, found) in enumerate(curves.items()):
        color, mark = MARKS[place % len(MARKS)]
        rows, losses = [line["rows"] for line in found], pd.DataFrame([line["log_loss"] for line in found])
        if place == 0:
            left.plot(rows, losses["prior"], color="black", lw=1, ls=":", label="class shares")
            left.plot(rows, losses["baseline"], "o--", color=plots.ORANGE, ms=4, label="baseline")
        left.plot(rows, losses["network"], f"{mark}-", color=color, ms=4, label=network)
        for line in found:
            c, at = line["comparison"], line["rows"] * 1.1**place  # side by side
            error = np.maximum(0, [[c["difference"] - c["low"]], [c["high"] - c["difference"]]])
            right.errorbar(at, c["difference"], error, fmt=mark, color=color, ms=4, lw=1)
            right.plot([at] * len(line["seeds"]), line["seed_differences"], "x", color=color, ms=4)
    right.axhline(0, color="black", lw=1, ls=":")
    left.set(title=lines[0]["title"], ylabel="log loss, unsmoothed")
    left.legend(frameon=False, fontsize=7)
    right.set(title="network minus its baseline")
    ticks = sorted({line["rows"] for line in lines})
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7.5)
        axes.set_xticks([], minor=True)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_xlabel("rows, of which nine tenths train", fontsize=8.5)
    return plots.finish(figure)


def write(lines: list[dict], folder: Path) -> None:
    """learning_curve.json and learning_curve.svg of what `collect` returns."""
    write_json(folder / "learning_curve.json", {"lines": lines, "table": make_table(lines)})
    (folder / "learning_curve.svg").write_bytes(draw_svg(plot_learning_curve(lines)))


def main() -> None:
    """Train the points that are not done, smallest first, or collect those that are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="labelled rows in the competition's columns")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[500, 1000, 2000, 4000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--max-rows", type=int, default=7000, help="rows of the file that are used, 0: all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the network")
    parser.add_argument("--collect", action="store_true", help="write learning_curve.json and stop")
    arguments = parser.parse_args()
    if arguments.collect:
        write(collect(arguments.out), FOLDER)
        return
    if arguments.file is None:
        parser.error("name the file of rows, or --collect")
    pool, scored = split_rows(arguments.file, arguments.max_rows)
    name = "+".join([Path(arguments.backbone).name, *arguments.set])
    place = arguments.out / f"{arguments.file.name.split('.')[0]}--{name}"
    settings = {**SETTINGS, "backbone": arguments.backbone, **dict(text.split("=", 1) for text in arguments.set)}
    if settings.get("start_from") == "none":
        parser.error("start_from=none: a network is compared with the baseline that it starts from")
    for count in sorted(arguments.rows):
        for seed in arguments.seeds:
            if count > len(pool):
                parser.error(f"{arguments.file}: only {len(pool)} rows may train, not {count}")
            folder = place / f"{count}-{seed}"
            run_point(arguments.file, pool, scored, count, {**settings, "seed": seed}, folder)
            found = average_seeds([read_point(folder / "point.npz")])["log_loss"]
            print({name: round(loss, 4) for name, loss in found.items()}, folder)


if __name__ == "__main__":
    main()
