"""What the starting baseline costs by the number of rows: CPU seconds, seconds, memory; on rows of any files.

    python report/studies/cost.py FILE... [--rows 3000 12000 57477] [--jobs 2]

The files' rows are repeated until there are so many; in each repetition every third long word is another one, so that
the vocabulary grows as that of real rows does. CPU seconds are given beside the clock's, as other work on the machine
changes them less. Memory is the largest that a process has held.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import joblib
import numpy as np
import pandas as pd

from prefcls_lib.baselines.columns import read_inputs
from prefcls_lib.baselines.estimators import ENSEMBLE
from prefcls_lib.baselines.out_of_fold import fit_out_of_fold
from prefcls_lib.data.loading import read_rows
from prefcls_lib.data.schema import TEXT_COLUMNS

LONG_WORD = re.compile(r"\w{7,}")


def cpu_seconds() -> float:
    """CPU seconds of this process and of the ended ones that it started."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def peak_gib(who: int) -> float:
    """The most memory that this process, or the largest that it started, has held."""
    return resource.getrusage(who).ru_maxrss / 2**20


def repeat_rows(rows: pd.DataFrame, count: int) -> pd.DataFrame:
    """`count` rows: the rows, then copies with prompts and words of their own."""

    def change(turns: list[str], copy: int) -> list[str]:
        def rename(found: re.Match) -> str:
            return f"{found[0]}{copy}" if len(found[0]) % 3 == 0 else found[0]

        return [LONG_WORD.sub(rename, turn) for turn in turns]

    copies = [rows]
    for copy in range(1, -(-count // len(rows))):
        texts = {name: [change(turns, copy) for turns in rows[name]] for name in TEXT_COLUMNS}
        copies.append(rows.assign(**texts, group=rows["group"] + f"-{copy}"))
    return pd.concat(copies, ignore_index=True).head(count)


def measure(files: list[Path], count: int, jobs: int) -> dict:
    """Read and fit once, and what it took: seconds of the clock and of all CPUs."""
    rows = repeat_rows(pd.concat([read_rows(path, labelled=True) for path in files], ignore_index=True), count)
    seconds, found = {"rows": len(rows), "jobs": jobs, "gib_of_rows": peak_gib(resource.RUSAGE_SELF)}, {}
    joblib.cpu_count = lambda: jobs

    def fit() -> None:
        labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy()
        found["fitted"] = fit_out_of_fold(ENSEMBLE, found["inputs"], labels, groups, 42, "cost")
        joblib.externals.loky.get_reusable_executor().shutdown()

    def predict() -> None:
        found["fitted"][0].predict(found["inputs"].take(np.arange(min(count, 10_000))))

    parts = {
        "inputs": lambda: found.update(inputs=read_inputs(rows)),
        "fit": fit,
        "predict_10000": predict,
    }
    for part, action in parts.items():
        before, started = cpu_seconds(), time.perf_counter()
        action()
        seconds[f"{part}_cpu"], seconds[part] = cpu_seconds() - before, time.perf_counter() - started
    peaks = {"gib_main": peak_gib(resource.RUSAGE_SELF), "gib_largest_worker": peak_gib(resource.RUSAGE_CHILDREN)}
    return seconds | peaks


def main() -> None:
    """One process for each number of rows, so that each has its own peak of memory; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[3_000, 12_000, 57_477])
    parser.add_argument("--jobs", type=int, default=2, help="models fitted at a time")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(measure(arguments.files, arguments.rows[0], arguments.jobs)))
        return
    lines = []
    for count in arguments.rows:
        command = [sys.executable, __file__, *map(str, arguments.files), "--here"]
        command += ["--rows", str(count), "--jobs", str(arguments.jobs)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        print("\n".join(done[:-1]), flush=True)
        lines.append(json.loads(done[-1]))
    print(pd.DataFrame(lines).set_index("rows").T.to_string(float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
