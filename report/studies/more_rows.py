"""What rows of another arena add to the competition's: finished runs with and without `extra_train`, row by row.

    prefcls run --train competition.csv --test sample --out runs/plain --set folds=[0,1,2,3,4] ...
    prefcls run --train competition.csv --test sample --out runs/more  --set folds=[0,1,2,3,4] ... \
                --set extra_train=arena.csv
    python -m report.studies.more_rows --plain runs/plain --more runs/more

Several runs with --more, each on folds of its own, count as one. Of each fold's network the baseline that it starts
from is predicted again. Writes more_rows.json beside this file: log losses and differences paired by row, and no rows.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import softmax

from prefcls_lib.config import RunConfig
from prefcls_lib.data.schema import ID, LABEL_COLUMNS
from prefcls_lib.evaluation import compare, scores
from prefcls_lib.models.saved import load_fold_model
from prefcls_lib.pipeline.folder import FoldModel, RunFolder, read_table
from prefcls_lib.pipeline.job import read_job
from prefcls_lib.runtime.files import read_json, write_json

OUT = Path(__file__).with_suffix(".json")


def read_predictions(places: list[Path]) -> pd.DataFrame:
    """The validated rows of runs by id: label, group, and the network's and its baseline's probabilities."""
    tables = []
    for place in places:
        folder = RunFolder(place)
        job = read_job(RunConfig.from_mapping(read_json(place / "config.json")["settings"]))
        oof = read_table(place / "oof.csv").set_index(ID)
        for fold in job.config.folds:
            rows = job.rows[job.folds == fold].reset_index(drop=True)
            network = load_fold_model(folder.model_folder(FoldModel(fold)))
            offsets = network.offset.predict(network.read_inputs(rows).baseline)
            table = rows[[ID, "label", "group"]].set_index(ID)
            table[[f"network {name}" for name in LABEL_COLUMNS]] = oof.loc[rows[ID], list(LABEL_COLUMNS)].to_numpy()
            table[[f"baseline {name}" for name in LABEL_COLUMNS]] = softmax(offsets, axis=1)
            tables.append(table)
    return pd.concat(tables)


def probs_of(table: pd.DataFrame, model: str) -> np.ndarray:
    """(N, 3) of "network" or "baseline"."""
    return table[[f"{model} {name}" for name in LABEL_COLUMNS]].to_numpy()


def describe(plain: pd.DataFrame, more: pd.DataFrame) -> dict:
    """Log losses of networks and baselines on the rows that all predicted; what each step adds, p corrected for all."""
    plain = plain.loc[more.index]
    labels, groups = more["label"].to_numpy(), more["group"].to_numpy().astype(str)
    tables, models = {"plain": plain, "more": more}, ("baseline", "network")
    probs = {f"{model}_{name}": probs_of(table, model) for name, table in tables.items() for model in models}
    pairs = {"encoder_plain": ("network_plain", "baseline_plain"), "encoder_more": ("network_more", "baseline_more"),
             "rows_baseline": ("baseline_more", "baseline_plain"), "rows_network": ("network_more", "network_plain"),
             "both": ("network_more", "baseline_plain")}  # fmt: skip
    found = [compare.compare(labels, probs[one], probs[other], groups) for one, other in pairs.values()]
    return {
        "rows": len(labels),
        "log_loss": {name: scores.log_loss(labels, values) for name, values in probs.items()},
        "accuracy": {name: scores.accuracy(labels, values) for name, values in probs.items()},
        "comparisons": {name: c.to_dict() for name, c in zip(pairs, compare.holm_correction(found), strict=True)},
    }


def main() -> None:
    """Compare the runs that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", type=Path, nargs="+", required=True, help="runs without extra rows")
    parser.add_argument("--more", type=Path, nargs="+", required=True, help="runs with them, on the same folds")
    arguments = parser.parse_args()
    result = describe(read_predictions(arguments.plain), read_predictions(arguments.more))
    write_json(OUT, result)
    for name, comparison in result["comparisons"].items():
        print(f"{name:14} {compare.Comparison.from_dict(comparison).describe()}")
    print(result["log_loss"], OUT)


if __name__ == "__main__":
    main()
