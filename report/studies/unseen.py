"""What is submitted, on rows that nobody saw: ladder, network and their blend, each the mean of its models over folds.

    python report/studies/unseen.py FILE.csv --out runs/unseen --parts 3 --set backbone=minilm --set max_length=256

The prompts of FILE are dealt into --parts parts; one part trains the ladder, the network and the blend in five folds,
as for a submission, and the others are scored. A blend and a calibration are fitted on out-of-fold predictions, each of
one model, and applied to the mean of five: --out also gets a calibration fitted on such means, nested over two halves
of the unseen rows. Finished runs are kept and not made again. unseen.json in --out has all numbers, and no rows.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib import cli
from prefcls_lib.data.loading import read_rows
from prefcls_lib.data.schema import ID, LABEL_COLUMNS
from prefcls_lib.data.splits import assign_folds
from prefcls_lib.ensemble.finished import read_run
from prefcls_lib.evaluation import compare, scores
from prefcls_lib.evaluation.calibration import Blend, blend_out_of_fold, fit_calibration
from prefcls_lib.pipeline.folder import RunFolder
from prefcls_lib.pipeline.predict import predict_run
from prefcls_lib.runtime.files import UserError, read_json, write_json, write_whole

SEED = 42
MEMBERS = {"ladder": "ladder", "network": "run"}  # name and `prefcls` command


def split_file(path: Path, parts: int, out: Path) -> pd.DataFrame:
    """Write the rows of one part of `parts` to `out`/train.csv; return the others, with no prompt in both."""
    rows = read_rows(path, labelled=True)
    is_train = assign_folds(rows, parts, SEED, path) == 0
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table = table[table[ID].isin(set(rows[ID][is_train]))].drop_duplicates(ID)
    write_whole(out / "train.csv", lambda temporary: table.to_csv(temporary, index=False))
    return rows[~is_train].reset_index(drop=True)


def predict_unseen(out: Path, name: str, rows: pd.DataFrame) -> np.ndarray:
    """(N, 3) by the finished run `out`/`name`, made once."""
    path = out / f"{name}.npy"
    if not path.exists():
        probs = predict_run(RunFolder(out / name), rows)[0]

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.save(file, probs)

        write_whole(path, write)
    return np.load(path, allow_pickle=False)


def describe(out: Path, rows: pd.DataFrame, probs: dict[str, np.ndarray]) -> dict:
    """Log losses of the unseen rows, what separates the models, and the calibrations of each member."""
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy().astype(str)
    blend = read_json(out / "blend.json")
    scored = {**probs, "blend": Blend.from_dict(blend).apply(list(probs.values()))}
    losses = {name: scores.log_loss(labels, values) for name, values in scored.items()}
    best = min(MEMBERS, key=losses.get)
    pairs = {"network against ladder": (scored["network"], scored["ladder"]),
             f"blend against its better member, the {best}": (scored["blend"], scored[best])}  # fmt: skip
    calibrations = {}
    for name, values in probs.items():
        oof = read_run(out / name).oof
        fitted = fit_calibration(oof["label"].to_numpy(), oof[list(LABEL_COLUMNS)].to_numpy())
        nested = blend_out_of_fold(labels, [values], np.zeros(len(labels)), groups)
        suited, applied = fit_calibration(labels, values), fitted.apply(values)
        calibrations[name] = {"of_single_models": fitted.to_dict(), "of_means": suited.to_dict(),
                              "log_loss": scores.log_loss(labels, applied),
                              "log_loss_of_means_nested": scores.log_loss(labels, nested)}  # fmt: skip
        pairs[f"{name}, calibrated as single models, against none"] = (applied, values)
        pairs[f"{name}, calibrated as single models, against as means"] = (applied, nested)
    found = [compare.compare(labels, one, other, groups) for one, other in pairs.values()]
    return {
        "train_rows": read_json(out / "ladder" / "result.json")["rows"],
        "unseen_rows": len(rows),
        "prompt_groups": len(np.unique(groups)),
        "log_loss": losses,
        "out_of_fold_log_loss": {n: read_json(out / n / "result.json")["log_loss"] for n in MEMBERS}
        | {"blend": blend["log_loss"]},
        "calibrations": calibrations,
        "comparisons": {name: c.to_dict() for name, c in zip(pairs, compare.holm_correction(found), strict=True)},
    }


def main() -> None:
    """Split, train, blend, predict, score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="labelled rows in the competition's columns")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", type=int, default=3, help="one part trains, the others are scored")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the network")
    arguments = parser.parse_args()
    out = arguments.out
    rows = split_file(arguments.file, arguments.parts, out)
    common = [
        "--train",
        str(out / "train.csv"),
        "--test",
        "sample",
        "--set",
        "num_folds=5",
        "--set",
        "folds=[0,1,2,3,4]",
    ]
    settings = {"ladder": [], "network": [part for text in arguments.set for part in ("--set", text)]}
    commands = [[command, *common, *settings[name], "--out", str(out / name)] for name, command in MEMBERS.items()]
    commands.append(["blend", "--runs", *(str(out / name) for name in MEMBERS), "--out", str(out / "blend.json")])
    for command in commands:
        if cli.main(command):
            raise UserError(f"prefcls {' '.join(command)}: failed, see above.")
    result = describe(out, rows, {name: predict_unseen(out, name, rows) for name in MEMBERS})
    write_json(out / "unseen.json", result)
    print("log loss of the unseen rows:", {name: round(loss, 4) for name, loss in result["log_loss"].items()})
    print("out of fold:", {name: round(loss, 4) for name, loss in result["out_of_fold_log_loss"].items()})
    for name, content in result["calibrations"].items():
        print(name, content)
    for name, comparison in result["comparisons"].items():
        print(f"{name}: {compare.Comparison.from_dict(comparison).describe()}")


if __name__ == "__main__":
    main()
