"""At how many rows does the encoder pay? Network and baselines trained on N rows and scored on the same other rows.

    python -m report.studies.learning_curve FILE.csv --out runs/curve --rows 500 1000 2000 4000 --seeds 42 43 44
    python -m report.studies.learning_curve FILE.csv --out runs/curve --rows 1000 --backbone FOLDER
    python -m report.studies.learning_curve FILE.csv --out runs/curve --rows 1000 --seeds 42 43 --set num_epochs=2
    python -m report.studies.learning_curve --out runs/curve --collect

A fifth of the prompts (fold 0 of 5, of at most --max-rows rows) is kept for scoring. Of the other rows the N first in
an order that the seed draws are a training file; `prefcls run` trains one model on nine tenths of them and validates it
on the last tenth, as it would for a user with N rows. The baselines are fitted on the same nine tenths. A seed stands
for one draw of rows and one training. A network with other settings (--set) is compared with the one without the last.
What is done is kept in --out and not done again; what was stopped is resumed.
--collect writes learning_curve.json beside this file, from everything in --out.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import softmax

from prefcls_lib.baselines.columns import read_inputs
from prefcls_lib.baselines.estimators import BASELINES, ENSEMBLE, MEMBERS
from prefcls_lib.baselines.out_of_fold import fit_out_of_fold, fit_simple
from prefcls_lib.config import RunConfig
from prefcls_lib.data.loading import read_rows
from prefcls_lib.data.schema import ID
from prefcls_lib.data.splits import assign_folds, take_rows
from prefcls_lib.evaluation import compare, scores
from prefcls_lib.models.saved import load_fold_model
from prefcls_lib.pipeline import steps
from prefcls_lib.pipeline.job import read_job
from prefcls_lib.runtime.files import read_json, write_json, write_whole

SETTINGS = {"max_length": 256, "num_folds": 10, "folds": (0,)}
SPLIT_SEED = 42
OUT = Path(__file__).with_suffix(".json")


def split_rows(path: Path, max_rows: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows that may train and those that score, with no prompt in both."""
    rows = take_rows(read_rows(path, labelled=True), max_rows, SPLIT_SEED)
    scored = assign_folds(rows, 5, SPLIT_SEED, path) == 0
    return rows[~scored].reset_index(drop=True), rows[scored].reset_index(drop=True)


def draw_rows(pool: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """`count` rows of the pool; with the same seed a smaller count gives a part of them."""
    order = np.random.default_rng(seed).permutation(len(pool))
    return pool.iloc[np.sort(order[:count])].reset_index(drop=True)


def run_point(
    path: Path, pool: pd.DataFrame, scored: pd.DataFrame, count: int, config: RunConfig, folder: Path
) -> None:
    """Train one point on rows of the file `path`, and write point.npz.

    It holds the scored rows' labels and groups, and each model's probabilities (N, 3) of them.
    """
    if (folder / "point.npz").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    drawn = set(draw_rows(pool, count, config.seed)[ID])
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table = table[table[ID].isin(drawn)].drop_duplicates(ID)
    write_whole(folder / "rows.csv", lambda temporary: table.to_csv(temporary, index=False))
    settings = {**config.to_dict(), "train": str(folder / "rows.csv"), "test": "sample", "out": str(folder / "run")}
    config = RunConfig.from_mapping(settings)
    steps.run(config)
    job = read_job(config)
    train = job.rows[job.folds != 0].reset_index(drop=True)
    labels, groups = train["label"].to_numpy(), train["group"].to_numpy()
    fit_inputs, inputs = read_inputs(train), read_inputs(scored)
    fitted = fit_simple(fit_inputs, labels)
    for name in ("structure_logistic", ENSEMBLE):
        fitted[name], _ = fit_out_of_fold(name, fit_inputs, labels, groups, config.seed)
    fitted |= {name: fitted[ENSEMBLE].member(name) for name in MEMBERS}
    probs = {name: fitted[name].predict_proba(inputs) for name in BASELINES}
    network = load_fold_model(folder / "run" / "model" / "fold0")
    if network.offset is not None:
        probs["baseline"] = softmax(network.offset.predict(network.read_inputs(scored).baseline), axis=1)
    probs["network"] = network.predict_proba(scored, label="score")
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
    """What the report needs of a point: log losses on the scored rows, and the network against its baseline.

    `default`: the same point without the last of its other settings, with which it is compared.
    """
    labels, groups, probs = read_point(folder)
    losses = {name: scores.log_loss(labels, values) for name, values in probs.items()}
    best = min(BASELINES, key=losses.get)
    against = None
    if default != folder and (default / "point.npz").exists():
        against = compare.compare(labels, probs["network"], read_point(default)[2]["network"], groups)
    result, settings = read_json(folder / "run" / "result.json"), read_json(folder / "run" / "config.json")["settings"]
    return {
        "rows": result["rows"],
        "seed": settings["seed"],
        "log_loss": losses,
        "accuracy": scores.accuracy(labels, probs["network"]),
        "best_baseline": best,
        "comparison": compare.compare(labels, probs["network"], probs.get("baseline", probs[best]), groups).to_dict(),
        "comparison_best": compare.compare(labels, probs["network"], probs[best], groups).to_dict(),
        "seconds": result["seconds"],
        "eval_rows": len(labels),
        "comparison_default": None if against is None else against.to_dict(),
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


def print_points(content: dict) -> None:
    """One line a point; the difference is to the network's baseline, or to the network without the last --set."""
    lines = []
    for curve in content["curves"] + content["recipes"]:
        for point in curve["points"]:
            names = ("prior", "structure_logistic", "structure_tfidf", "baseline", "network")
            share = point["comparison_default"] or point["comparison"]
            lines.append(
                {"curve": f"{curve['source']} {curve['backbone']}", "rows": point["rows"], "seed": point["seed"]}
                | {name: point["log_loss"].get(name) for name in names}
                | {"difference": share["difference"], "low": share["low"], "high": share["high"]}
            )
    print(pd.DataFrame(lines).to_string(index=False, float_format="{:.4f}".format), flush=True)


def main() -> None:
    """Train the points that are not done, smallest first, or collect those that are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="labelled rows in the competition's columns")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[500, 1000, 2000, 4000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--max-rows", type=int, default=7000, help="rows of the file that are used, 0: all")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of the network"
    )
    parser.add_argument("--collect", action="store_true", help="write learning_curve.json and stop")
    arguments = parser.parse_args()
    if arguments.collect:
        content = collect(arguments.out)
        write_json(OUT, content)
        print_points(content)
        return
    if arguments.file is None:
        parser.error("name the file of rows, or --collect")
    pool, scored = split_rows(arguments.file, arguments.max_rows)
    wanted = [(count, seed) for count in sorted(arguments.rows) for seed in arguments.seeds]
    name = "+".join([Path(arguments.backbone).name, *arguments.set])
    place = arguments.out / f"{arguments.file.name.split('.')[0]}--{name}"
    settings = {**SETTINGS, "backbone": arguments.backbone, **dict(text.split("=", 1) for text in arguments.set)}
    cost = [count + len(scored) / 3 for count, _ in wanted]  # scoring a row is a third of training on it
    started, paid = time.perf_counter(), 0.0
    for number, (count, seed) in enumerate(wanted):
        if count > len(pool):
            parser.error(f"{arguments.file}: only {len(pool)} rows may train, not {count}")
        folder = place / f"{count}-{seed}"
        new = not (folder / "point.npz").exists()
        config = RunConfig.from_mapping({**settings, "seed": seed}, "--set")
        run_point(arguments.file, pool, scored, count, config, folder)
        paid += cost[number] * new
        pace = (time.perf_counter() - started) / paid if paid else 0.0
        left = pace * sum(cost[number + 1 :]) / 60
        print(f"{number + 1} of {len(wanted)} points; about {left:.0f} minutes left", flush=True)
    print_points(collect(arguments.out))


if __name__ == "__main__":
    main()
