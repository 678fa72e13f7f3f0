"""What families of structure features bring to the baselines: log loss out of fold with and without each.

    python report/studies/features.py FILE... [--seeds 42 43 44]

The first file is the training file, each other one an extra file with its own share of ties. All rows are scored, each
by the models that were fitted without its prompt, with the tie shift of its file. Differences are to the ensemble as
built, paired, with 95 % intervals over prompts; each is the mean over the seeds of the folds.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import softmax

from prefcls_lib.baselines.columns import BaselineInputs, read_inputs, tie_shifts
from prefcls_lib.baselines.estimators import ENSEMBLE, MEMBERS
from prefcls_lib.baselines.out_of_fold import fit_out_of_fold
from prefcls_lib.data.features import FEATURE_NAMES
from prefcls_lib.data.loading import read_rows
from prefcls_lib.data.schema import SOURCE
from prefcls_lib.evaluation.compare import bootstrap_interval
from prefcls_lib.evaluation.scores import row_losses

LINEAR = "structure_logistic"
FAMILIES = ("repeated_pairs", "log_different_words", "function_words", "log_paragraphs", "times_length")


def score(name: str, inputs: BaselineInputs, rows: pd.DataFrame, seed: int) -> np.ndarray:
    """Offsets (N, 3) of the rows out of fold, with the tie shift of each row's file."""
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy()
    baseline, offsets = fit_out_of_fold(name, inputs, labels, groups, seed)
    offsets[:, 2] += tie_shifts(inputs.sources, baseline.file_shifts(labels, inputs.sources))
    return offsets


def without(inputs: BaselineInputs, left_out: Callable[[str], bool]) -> BaselineInputs:
    """The inputs with some features at zero, where no model can use them."""
    kept = np.array([not left_out(name) for name in FEATURE_NAMES])
    return replace(inputs, dense=inputs.dense * kept)


def make_table(rows: pd.DataFrame, seeds: list[int]) -> pd.DataFrame:
    """One line a variant: log loss, and its difference to the ensemble as built."""
    inputs, labels, groups = read_inputs(rows), rows["label"].to_numpy(), rows["group"].to_numpy()
    families = {f"without {name}": (lambda column, name=name: name in column) for name in FAMILIES}
    losses: dict[str, list] = {}
    for seed in seeds:
        offsets = {name: score(name, inputs, rows, seed) for name in (LINEAR, *MEMBERS)}
        offsets["as built"] = np.mean([offsets[name] for name in MEMBERS], axis=0)
        offsets["three members, with structure_logistic"] = (len(MEMBERS) * offsets["as built"] + offsets[LINEAR]) / 3
        offsets["without words"] = (offsets[LINEAR] + offsets["structure_boosting"]) / 2
        for name, left_out in families.items():
            offsets[name] = score(ENSEMBLE, without(inputs, left_out), rows, seed)
        for name, values in offsets.items():
            losses.setdefault(name, []).append(row_losses(labels, softmax(values, axis=1)))
        print(f"seed {seed} done", flush=True)
    means, lines = {name: np.mean(values, axis=0) for name, values in losses.items()}, []
    for name, values in means.items():
        low, high = bootstrap_interval(values - means["as built"], groups)
        line = {"ensemble or member": name, "log_loss": values.mean()}
        lines.append(line | {"difference": (values - means["as built"]).mean(), "low": low, "high": high})
    return pd.DataFrame(lines).set_index("ensemble or member")


def main() -> None:
    """Read the files and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    arguments = parser.parse_args()
    tables = [read_rows(path, labelled=True).assign(**{SOURCE: number}) for number, path in enumerate(arguments.files)]
    print(make_table(pd.concat(tables, ignore_index=True), arguments.seeds).to_string(float_format="{:+.4f}".format))


if __name__ == "__main__":
    main()
