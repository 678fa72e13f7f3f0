"""People's votes: what the encoder adds to the baseline, and what rows of another arena add to the competition's.

    prefcls run --train competition.csv --out runs/plain --set folds=[0,1,2] ...
    prefcls run --train competition.csv --out runs/more  --set folds=[0,1,2] --set extra_train=arena.csv ...
    prefcls run --train both.csv        --out runs/both  --set folds=[0,1,2] --set num_seeds=2 ...
    python -m report.studies.more_rows runs/plain runs/more runs/both

both.csv has the rows of the two files, which are all scored. Writes more_rows.json beside this file, without any row.
"""

import argparse
from pathlib import Path

from prefcls_lib.data.schema import ID
from prefcls_lib.ensemble.blend import COLUMNS, Run, read_run, shared_ids
from prefcls_lib.evaluation import compare, scores
from prefcls_lib.evaluation.calibration import blend_cross_fitted
from prefcls_lib.pipeline.folder import read_table
from prefcls_lib.runtime.files import write_json

OUT = Path(__file__).with_suffix(".json")
# name -> scored rows, and two of the models: what the encoder adds in each run, and what more rows add
PAIRS = {
    "encoder_plain": ("competition", "baseline_plain", "network_plain"),
    "encoder_more": ("competition", "baseline_more", "network_more"),
    "rows_baseline": ("competition", "baseline_plain", "baseline_more"),
    "rows_network": ("competition", "network_plain", "network_more"),
    "rows_and_encoder": ("competition", "baseline_plain", "network_more"),
    **{f"encoder_{rows}": (rows, "baseline_both", "network_both") for rows in ("both", "competition", "arena")},
}


def describe(plain: Run, more: Run, both: Run) -> dict:
    """What each step adds: log losses, their difference (p corrected for all), and that with both calibrated."""
    probs, shared = {}, shared_ids((plain, more, both))
    rows = {"competition": shared, "both": list(both.oof.index), "arena": list(both.oof.index.difference(shared))}
    for name, run in (("plain", plain), ("more", more), ("both", both)):
        baselines = read_table(run.path / "oof_baselines.csv")
        probs[f"baseline_{name}"] = baselines[baselines["model"] == run.result["baseline"]].set_index(ID)[COLUMNS]
        probs[f"network_{name}"] = run.oof[COLUMNS]
    lines, found = {}, []
    for name, (scored, before, after) in PAIRS.items():
        labels, groups = (both.oof.loc[rows[scored], column].to_numpy() for column in ("label", "group"))
        one, other = (probs[model].loc[rows[scored]].to_numpy() for model in (before, after))
        lines[name] = {"before": scores.log_loss(labels, one), "after": scores.log_loss(labels, other)}
        calibrated = (blend_cross_fitted(labels, [model], groups) for model in (other, one))
        lines[name]["calibrated"] = compare.compare(labels, *calibrated, groups).to_dict()
        found.append(compare.compare(labels, other, one, groups))
    corrected = zip(lines, compare.holm_correction(found), strict=True)
    return {name: lines[name] | {"comparison": comparison.to_dict()} for name, comparison in corrected}


def main() -> None:
    """Compare the runs that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs=3, type=Path, metavar="DIR", help="run folders: plain, more and both")
    result = describe(*map(read_run, parser.parse_args().runs))
    write_json(OUT, result)
    print({name: round(line["comparison"]["difference"], 4) for name, line in result.items()}, OUT)


if __name__ == "__main__":
    main()
