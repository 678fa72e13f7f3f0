"""At how many rows does the encoder pay? Network and baselines trained on N rows and scored on the same other rows.

    python -m report.studies.learning_curve FILE.csv --out runs/curve --rows 500 1000 2000 4000 --seeds 42 43 44
    python -m report.studies.learning_curve FILE.csv --out runs/curve --rows 1000 --backbone FOLDER --set num_epochs=2
    python -m report.studies.learning_curve --out runs/curve --collect

A fifth of the prompts (fold 0 of 5, of at most --max-rows rows) is kept for scoring. Of the other rows the N first in
an order that the seed draws are a training file; `prefcls run` trains one model on nine tenths of them and validates it
on the last tenth, as it would for a user with N rows. The baselines are fitted on the same nine tenths. A seed stands
for one draw of rows and one training. A network with other settings (--set) is compared with the one without the last.
What is done is kept in --out and not done again; what was stopped is resumed.
--collect writes learning_curve.json beside this file, from everything in --out, and what the report shows of it:
learning_curve.svg and curve.json.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from prefcls_lib.baselines.columns import read_inputs
from prefcls_lib.baselines.estimators import ENSEMBLE
from prefcls_lib.baselines.out_of_fold import fit_out_of_fold, fit_simple
from prefcls_lib.config import RunConfig
from prefcls_lib.data.loading import read_rows
from prefcls_lib.data.schema import ID
from prefcls_lib.data.splits import assign_folds, take_rows
from prefcls_lib.evaluation import compare, plots, scores
from prefcls_lib.models.saved import load_model
from prefcls_lib.pipeline import steps
from prefcls_lib.pipeline.job import read_job
from prefcls_lib.runtime.files import read_json, write_json, write_whole
from report.page import draw_svg, escape_text, markdown_table, signed

SETTINGS = {"max_length": 256, "num_folds": 10, "folds": (0,), "test": "sample"}
SPLIT_SEED = 42
FOLDER = Path(__file__).parent
BAND = ("structure_logistic", "structure_tfidf", "baseline")  # from the best to the worst of these


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
    write_whole(folder / "rows.csv", lambda temporary: table.to_csv(temporary, index=False))
    places = {"train": str(folder / "rows.csv"), "out": str(folder / "run")}
    config = RunConfig.from_mapping({**settings, **places}, "--set")
    steps.run(config)
    job, network = read_job(config), load_model(folder / "run" / "model" / "fold0")
    train = job.rows[job.folds != 0].reset_index(drop=True)
    labels, groups = train["label"].to_numpy(), train["group"].to_numpy().astype(str)
    given, inputs = read_inputs(train), read_inputs(scored)
    fitted = fit_simple(given, labels)
    fitted["structure_logistic"], _ = fit_out_of_fold("structure_logistic", given, labels, groups, config.seed)
    baseline = network.baseline or fit_out_of_fold(ENSEMBLE, given, labels, groups, config.seed)[0]
    if len(baseline.names) > 1:
        fitted |= {name: baseline.member(name) for name in sorted(baseline.names)}
    probs = {name: model.predict_proba(inputs) for name, model in {**fitted, "baseline": baseline}.items()}
    probs["network"] = network.predict_proba(network.read_inputs(scored), label="score")
    rows = {"label": scored["label"].to_numpy(), "group": scored["group"].to_numpy().astype(str)}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **rows, **probs)

    write_whole(folder / "point.npz", write)


def read_point(folder: Path) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Labels (N,), prompt groups (N,) and each model's probabilities (N, 3) of the scored rows."""
    with np.load(folder / "point.npz", allow_pickle=False) as arrays:
        probs = {name: arrays[name] for name in arrays.files if name not in ("label", "group")}
        return arrays["label"], arrays["group"], probs


def describe_point(folder: Path, default: Path) -> dict:
    """Log losses on the scored rows, and the network against its baseline.

    `default`: the same point without the last of its other settings, with which it is compared, too.
    """
    labels, groups, probs = read_point(folder)
    against = None
    if default != folder and (default / "point.npz").exists():
        against = compare.compare(labels, probs["network"], read_point(default)[2]["network"], groups).to_dict()
    result = read_json(folder / "run" / "result.json")
    return {
        "rows": result["rows"],
        "seed": result["seed"],
        "log_loss": {name: scores.log_loss(labels, values) for name, values in probs.items()},
        "accuracy": scores.accuracy(labels, probs["network"]),
        "comparison": compare.compare(labels, probs["network"], probs["baseline"], groups).to_dict(),
        "comparison_default": against,
        "seconds": result["seconds"],
        "eval_rows": len(labels),
    }


def collect(out: Path) -> dict:
    """All points in `out`: a curve for each source and encoder, and in `recipes` those of other settings."""
    curves, recipes = [], []
    for place in sorted({path.parents[1] for path in out.glob("*/*/point.npz")}):
        source, _, name = place.name.partition("--")
        default = place.with_name(place.name.rpartition("+")[0] or place.name)
        points = [describe_point(path.parent, default / path.parent.name) for path in place.glob("*/point.npz")]
        points.sort(key=lambda point: (point["rows"], point["seed"]))
        curve = {"source": source, "backbone": name, "eval_rows": points[0]["eval_rows"], "points": points}
        (recipes if "+" in name else curves).append(curve)
    return {"split_seed": SPLIT_SEED, "curves": curves, "recipes": recipes}


def summarise(curves: Sequence[dict], against: str = "comparison") -> list[dict]:
    """For each curve and number of rows, means and ranges over the seeds; verdicts corrected for all points.

    `against`: the comparison of a point that counts, "comparison" (the network with its baseline) or
    "comparison_default" (with the network without the last changed setting); points without it are left out.
    """
    points = [(curve, point) for curve in curves for point in curve["points"] if point[against]]
    corrected = compare.holm_correction([compare.Comparison.from_dict(point[against]) for _, point in points])
    lines: dict[tuple, dict] = {}
    for (curve, point), c in zip(points, corrected, strict=True):
        key = curve["source"], curve["backbone"], point["rows"]
        line = lines.setdefault(key, {**curve, "rows": point["rows"], "losses": [], "found": []})
        line["losses"].append(point["log_loss"])
        line["found"].append(c)
    for line in lines.values():
        found, line["log_loss"] = line["found"], pd.DataFrame(line["losses"]).mean()
        differences = [c.difference for c in found]
        one = len(found) == 1
        line["low"], line["high"] = (found[0].low, found[0].high) if one else (min(differences), max(differences))
        line["difference"] = sum(differences) / len(differences)
    return list(lines.values())


def _verdict_cells(line: dict) -> list[str]:
    verdicts = [c.verdict for c in line["found"]]
    return [signed(f"{line['difference']:+.4f}"), signed(f"{line['low']:+.4f} to {line['high']:+.4f}"),
            f"{verdicts.count('BEATS')} / {verdicts.count('LOSES')}"]  # fmt: skip


def make_table(lines: Sequence[dict]) -> str:
    """`summarise` as a Markdown table."""
    cells = []
    for line in lines:
        who = f"{line['title']}, {escape_text(line['backbone'])}".replace(" ", "\u00a0").replace("-", "\u2011")
        losses = [f"{line['log_loss'][name]:.4f}" for name in ("prior", "structure_logistic", "baseline", "network")]
        cells.append([who, f"{line['rows']:,}", str(len(line["found"])), *losses, *_verdict_cells(line)])
    header = ("votes, network", "rows", "seeds", "class shares", "structure logistic", "its baseline", "network",
              "difference", "range", "BEATS / LOSES")  # fmt: skip
    return markdown_table(header, cells)


def make_recipe_table(lines: Sequence[dict]) -> str:
    """`summarise(recipes, "comparison_default")` as a Markdown table, the best settings first.

    It has the number of rows with which most settings were compared.
    """
    cells, rows = [], pd.Series([line["rows"] for line in lines]).mode()[0]
    for line in sorted((line for line in lines if line["rows"] == rows), key=lambda line: line["difference"]):
        network, _, changed = line["backbone"].rpartition("+")
        name, *others = escape_text(network).split("+")
        beside = f"with {', '.join(others)}".replace(" ", "\u00a0")
        note = f"<br><small>{beside}</small>" if others else ""
        cells.append([escape_text(changed) + note, name, f"{rows:,}", str(len(line["found"])),
                      f"{line['log_loss']['network']:.4f}", *_verdict_cells(line)])  # fmt: skip
    header = ("changed", "network", "rows", "seeds", "log loss", "difference", "range", "BEATS / LOSES")
    return markdown_table(header, cells)


def plot_learning_curve(curves: list[dict], published: dict) -> Figure:
    """Against the number of training rows: log loss, the network minus its baseline, and what others published.

    Args:
        curves: of one source: title, backbone, and points (rows, seed, log_loss by name, comparison). Each has a mark;
            lines are means over seeds.
        published: title, and points (rows, log_loss, sd).
    """
    figure = Figure(figsize=(7.5, 2.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    marks = zip((plots.BLUE, plots.GREEN, plots.PINK, plots.GREY), "s^vD", strict=True)
    for place, (curve, (color, mark)) in enumerate(zip(curves, marks, strict=False)):
        table = pd.DataFrame([{**one["log_loss"], **one["comparison"], "rows": one["rows"]} for one in curve["points"]])
        means = table.select_dtypes("number").groupby("rows").mean()
        if place == 0:
            band = means[[name for name in BAND if name in means]]
            left.plot(means["prior"], color="black", lw=1, ls=":", label="class shares")
            left.fill_between(means.index, band.min(axis=1), band.max(axis=1), color=plots.ORANGE, alpha=0.4, lw=0,
                              label="baselines")  # fmt: skip
            left.plot(band.min(axis=1), color=plots.ORANGE, lw=1, ls="--")
        left.plot(means["network"], mark, ls="-", color=color, ms=4, label=curve["backbone"])
        at = table["rows"] * (1 + 0.04 * (table.groupby("rows").cumcount() + 3.5 * place))  # side by side
        errors = np.maximum(0, [table["difference"] - table["low"], table["high"] - table["difference"]])
        middle.errorbar(at, table["difference"], errors, fmt=mark, color=color, ms=4, lw=1)
    middle.axhline(0, color="black", lw=1, ls=":")
    left.set(title=curves[0]["title"], ylabel="log loss, unsmoothed")
    left.legend(frameon=False, fontsize=7)
    middle.set(title="network minus its baseline")
    table = pd.DataFrame(published["points"])
    columns = (table["rows"], table["log_loss"], table["sd"])
    right.errorbar(*columns, fmt="D--", color=plots.PINK, mfc="white", capsize=3)
    right.set(title=published["title"])
    ours = {point["rows"] for curve in curves for point in curve["points"]}
    for axes, rows in ((left, ours), (middle, ours), (right, set(table["rows"]))):
        axes.set_xscale("log")
        axes.set_xticks(sorted(rows), [f"{tick:,}" for tick in sorted(rows)], fontsize=7.5)
        axes.set_xticks([], minor=True)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_xlabel("training rows", fontsize=8.5)
    return plots.finish(figure)


def write_for_report(content: dict, folder: Path) -> None:
    """learning_curve.svg and curve.json (the tables, and the numbers of the text) of what `collect` returns."""
    published = read_json(FOLDER.parent / "published.json")["learning_curve"]
    for curve in content["curves"] + content["recipes"]:
        curve["title"] = published["sources"].get(curve["source"], curve["source"])
    lines, recipes = summarise(content["curves"]), summarise(content["recipes"], "comparison_default")
    first = [curve for curve in content["curves"] if curve["source"] == content["curves"][0]["source"]]
    (folder / "learning_curve.svg").write_bytes(draw_svg(plot_learning_curve(first, published)))
    names = ("source", "title", "backbone", "rows", "eval_rows", "difference", "low", "high")
    short = [{name: line[name] for name in names} for line in lines]
    tables = {"table": make_table(lines), "recipes": make_recipe_table(recipes) if recipes else None}
    write_json(folder / "curve.json", {"lines": short, **tables})


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
        content = collect(arguments.out)
        write_json(FOLDER / "learning_curve.json", content)
        write_for_report(content, FOLDER)
        return
    if arguments.file is None:
        parser.error("name the file of rows, or --collect")
    pool, scored = split_rows(arguments.file, arguments.max_rows)
    name = "+".join([Path(arguments.backbone).name, *arguments.set])
    place = arguments.out / f"{arguments.file.name.split('.')[0]}--{name}"
    settings = {**SETTINGS, "backbone": arguments.backbone, **dict(text.split("=", 1) for text in arguments.set)}
    for count in sorted(arguments.rows):
        for seed in arguments.seeds:
            if count > len(pool):
                parser.error(f"{arguments.file}: only {len(pool)} rows may train, not {count}")
            folder = place / f"{count}-{seed}"
            run_point(arguments.file, pool, scored, count, {**settings, "seed": seed}, folder)
            point = describe_point(folder, folder)
            print({name: round(point["log_loss"][name], 4) for name in ("prior", *BAND, "network")
                   if name in point["log_loss"]}, folder, flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
