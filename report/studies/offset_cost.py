"""What a member of the starting baseline costs at the competition's size: CPU seconds, memory; on rows of any files.

    python report/studies/offset_cost.py FILE... [--rows 57477] [--jobs 2] [--name structure_boosting]

The files' rows are joined and repeated until there are so many. CPU seconds are given beside the clock's, as other work
on the machine changes them less.
"""

import argparse
import resource
import time
from pathlib import Path

import joblib
import numpy as np
import pandas as pd

from prefcls_lib.baselines import offset
from prefcls_lib.baselines.columns import read_inputs
from prefcls_lib.baselines.estimators import MEMBERS, choose_strength
from prefcls_lib.data.loading import read_rows
from prefcls_lib.runtime.files import read_json, write_json

OUT = Path(__file__).with_suffix(".json")


def cpu_seconds() -> float:
    """CPU seconds of this process and of the ended ones that it started."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def main() -> None:
    """Time each part of fitting the offset and write the numbers beside this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=57_477)
    parser.add_argument("--jobs", type=int, default=joblib.cpu_count(), help="inner models fitted at a time")
    parser.add_argument("--name", choices=MEMBERS, default=MEMBERS[0], help="member of the ensemble")
    arguments = parser.parse_args()
    rows = pd.concat([read_rows(path, labelled=True) for path in arguments.files], ignore_index=True)
    rows = rows.iloc[np.arange(arguments.rows) % len(rows)].reset_index(drop=True)
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy()
    name, seconds, clock = arguments.name, {}, {}

    def timed(part: str, action):
        before, started = cpu_seconds(), time.perf_counter()
        result = action()
        seconds[part], clock[part] = cpu_seconds() - before, time.perf_counter() - started
        print(f"{part}: {seconds[part]:.0f} CPU seconds, {clock[part]:.0f} seconds", flush=True)
        return result

    inputs = timed("read the answers", lambda: read_inputs(rows, (name,)))
    timed("choose the strength", lambda: choose_strength(name, inputs, labels, groups, 42))
    offset.joblib.cpu_count = lambda: arguments.jobs
    timed("strength and inner models", lambda: offset.fit_offset(name, inputs, labels, groups, 42, "offset"))
    joblib.externals.loky.get_reusable_executor().shutdown()
    peaks = [resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result = {
        "rows": len(rows), "jobs": arguments.jobs, "cpu_seconds": seconds, "clock_seconds": clock,
        "peak_gib_main": peaks[0], "peak_gib_largest_worker": peaks[1],
    }  # fmt: skip
    write_json(OUT, (read_json(OUT) if OUT.exists() else {}) | {name: result})
    print(f"peak memory: {peaks[0]:.1f} GiB, each of {arguments.jobs} workers up to {peaks[1]:.1f} GiB; {OUT}")


if __name__ == "__main__":
    main()
