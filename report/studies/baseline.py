"""What families of structure features bring to the baseline, and what the baseline costs with more rows.

    python -m report.studies.baseline FILE... --seeds 42 43 44    log loss out of fold with and without each family
    python -m report.studies.baseline FILE... --rows 57477        CPU seconds, seconds by the clock, memory

The first file is the training file, each other one an extra file with its own share of ties. All rows are scored, each
by the models that were fitted without its prompt, with the tie shift of its file. Differences are to the ensemble as
built, paired, with 95 % intervals over prompts; each is the mean over the seeds of the folds.

For the cost, the rows are repeated until there are so many; in each repetition every third long word is another one, so
that the vocabulary grows as that of real rows does. Memory is the most that a process has held.
"""

import argparse
import re
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from scipy.special import softmax

from prefcls_lib.baselines.columns import BaselineInputs, read_inputs, tie_shifts
from prefcls_lib.baselines.estimators import ENSEMBLE, MEMBERS
from prefcls_lib.baselines.out_of_fold import fit_out_of_fold
from prefcls_lib.data.features import FEATURE_NAMES
from prefcls_lib.data.loading import read_rows
from prefcls_lib.data.schema import SOURCE, TEXT_COLUMNS
from prefcls_lib.evaluation.compare import bootstrap_interval
from prefcls_lib.evaluation.scores import row_losses

LINEAR = "structure_logistic"
FAMILIES = ("repeated_pairs", "log_different_words", "function_words", "log_paragraphs", "times_length")
LONG_WORD = re.compile(r"\w{7,}")
PROCESSES = {"main": resource.RUSAGE_SELF, "largest_worker": resource.RUSAGE_CHILDREN}


def score(name: str, inputs: BaselineInputs, rows: pd.DataFrame, seed: int) -> np.ndarray:
    """Offsets (N, 3) of the rows out of fold, with the tie shift of each row's file."""
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy()
    baseline, offsets = fit_out_of_fold(name, inputs, labels, groups, seed)
    offsets[:, 2] += tie_shifts(inputs.sources, baseline.file_shifts(labels, inputs.sources))
    return offsets


def compare_families(rows: pd.DataFrame, seeds: list[int]) -> pd.DataFrame:
    """One line a variant: log loss, and its difference to the ensemble as built."""
    inputs, labels, groups = read_inputs(rows), rows["label"].to_numpy(), rows["group"].to_numpy()
    losses: dict[str, list] = {}
    for seed in seeds:
        offsets = {name: score(name, inputs, rows, seed) for name in (LINEAR, *MEMBERS)}
        offsets["as built"] = np.mean([offsets[name] for name in MEMBERS], axis=0)
        offsets["three members, with structure_logistic"] = (len(MEMBERS) * offsets["as built"] + offsets[LINEAR]) / 3
        offsets["without words"] = (offsets[LINEAR] + offsets["structure_boosting"]) / 2
        for family in FAMILIES:  # its columns at zero, where no model can use them
            dense = inputs.dense * np.array([family not in name for name in FEATURE_NAMES])
            offsets[f"without {family}"] = score(ENSEMBLE, replace(inputs, dense=dense), rows, seed)
        for name, values in offsets.items():
            losses.setdefault(name, []).append(row_losses(labels, softmax(values, axis=1)))
        print(f"seed {seed} done", flush=True)
    means, lines = {name: np.mean(values, axis=0) for name, values in losses.items()}, []
    for name, values in means.items():
        low, high = bootstrap_interval(values - means["as built"], groups)
        line = {"ensemble or member": name, "log_loss": values.mean()}
        lines.append(line | {"difference": (values - means["as built"]).mean(), "low": low, "high": high})
    return pd.DataFrame(lines).set_index("ensemble or member")


def repeat_rows(rows: pd.DataFrame, count: int) -> pd.DataFrame:
    """`count` rows: the rows, then copies with prompts and words of their own."""

    def change(turns: list[str], copy: int) -> list[str]:
        rename = lambda found: f"{found[0]}{copy}" if len(found[0]) % 3 == 0 else found[0]  # noqa: E731
        return [LONG_WORD.sub(rename, turn) for turn in turns]

    copies = [rows]
    for copy in range(1, -(-count // len(rows))):
        texts = {name: [change(turns, copy) for turns in rows[name]] for name in TEXT_COLUMNS}
        copies.append(rows.assign(**texts, group=rows["group"] + f"-{copy}"))
    return pd.concat(copies, ignore_index=True).head(count)


def measure_cost(rows: pd.DataFrame) -> pd.Series:
    """What reading, fitting once and predicting take: seconds by the clock and of all CPUs, GiB."""
    cost = {"rows": len(rows), "GiB of rows": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}

    def timed(part: str, action: Callable):
        cpu_seconds = lambda: sum(sum(resource.getrusage(who)[:2]) for who in PROCESSES.values())  # noqa: E731
        before, started = cpu_seconds(), time.perf_counter()
        result = action()
        joblib.externals.loky.get_reusable_executor().shutdown()  # the seconds of a process count once it has ended
        cost[f"{part}, CPU"], cost[part] = cpu_seconds() - before, time.perf_counter() - started
        return result

    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy()
    inputs = timed("inputs", lambda: read_inputs(rows))
    baseline, _ = timed("fit", lambda: fit_out_of_fold(ENSEMBLE, inputs, labels, groups, 42, "cost"))
    timed("predict 10,000", lambda: baseline.predict(inputs.take(np.arange(min(len(rows), 10_000)))))
    peaks = {f"GiB {name}": resource.getrusage(who).ru_maxrss / 2**20 for name, who in PROCESSES.items()}
    return pd.Series(cost | peaks)


def main() -> None:
    """Read the files and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--rows", type=int, help="measure the cost with so many rows")
    arguments = parser.parse_args()
    tables = [read_rows(path, labelled=True).assign(**{SOURCE: number}) for number, path in enumerate(arguments.files)]
    rows = pd.concat(tables, ignore_index=True)
    if arguments.rows:
        print(measure_cost(repeat_rows(rows, arguments.rows)).to_string(float_format="{:.2f}".format))
    else:
        print(compare_families(rows, arguments.seeds).to_string(float_format="{:+.4f}".format))


if __name__ == "__main__":
    main()
