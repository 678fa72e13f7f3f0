"""What rows of another arena add to the competition's: finished runs with and without `extra_train`, row by row.

    prefcls run --train competition.csv --test sample --out runs/plain --set folds=[0,1,2,3,4] ...
    prefcls run --train competition.csv --test sample --out runs/more  --set folds=[0,1,2,3,4] ... \
                --set extra_train=arena.csv
    python -m report.studies.more_rows runs/plain runs/more

Writes more_rows.json beside this file: log losses and differences paired by row, and no rows.
"""

import argparse
from pathlib import Path

from prefcls_lib.data.schema import ID, LABEL_COLUMNS
from prefcls_lib.ensemble.blend import Run, read_run, shared_ids
from prefcls_lib.evaluation import compare, scores
from prefcls_lib.pipeline.folder import read_table
from prefcls_lib.runtime.files import write_json

OUT = Path(__file__).with_suffix(".json")
# name -> two of the models: what the encoder adds without and with more rows, and what more rows add
PAIRS = {
    "encoder_plain": ("network_plain", "baseline_plain"), "encoder_more": ("network_more", "baseline_more"),
    "rows_baseline": ("baseline_more", "baseline_plain"), "rows_network": ("network_more", "network_plain"),
    "both": ("network_more", "baseline_plain"),
}  # fmt: skip


def describe(plain: Run, more: Run) -> dict:
    """Log losses of networks and baselines on the rows that all predicted; what each step adds, p corrected for all."""
    ids, probs = shared_ids((plain, more)), {}
    labels, groups = (more.oof.loc[ids, name].to_numpy() for name in ("label", "group"))
    for name, run in (("plain", plain), ("more", more)):
        baselines = read_table(run.path / "oof_baselines.csv")
        baseline = baselines[baselines["model"] == run.result["baseline"]].set_index(ID)
        probs[f"baseline_{name}"] = baseline.loc[ids, list(LABEL_COLUMNS)].to_numpy()
        probs[f"network_{name}"] = run.probs(ids)
    found = [compare.compare(labels, probs[one], probs[other], groups) for one, other in PAIRS.values()]
    return {
        "rows": len(labels),
        "log_loss": {name: scores.log_loss(labels, values) for name, values in probs.items()},
        "accuracy": {name: scores.accuracy(labels, values) for name, values in probs.items()},
        "comparisons": {name: c.to_dict() for name, c in zip(PAIRS, compare.holm_correction(found), strict=True)},
    }


def main() -> None:
    """Compare the runs that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plain", type=Path, help="a run without extra rows")
    parser.add_argument("more", type=Path, help="one with them, on the same folds")
    arguments = parser.parse_args()
    result = describe(read_run(arguments.plain), read_run(arguments.more))
    write_json(OUT, result)
    print(result["log_loss"], OUT)


if __name__ == "__main__":
    main()
