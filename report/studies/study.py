"""The study on the shipped rows, on a CPU: baselines, six networks that differ in one thing each, blends.

    python report/studies/study.py          or: make study

Runs are made in runs/study/ and resumed if it is called again; what the report needs of them (no weights) is
copied to report/runs/. Then `make report`.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from prefcls_lib.runtime.files import write_whole

RUNS = Path("runs/study")
KEPT = Path("report/runs")
KEPT_FILES = ("config.json", "result.json", "history.csv", "oof.csv", "valid.csv", "submission.csv")
ROWS = ["--train", "sample", "--test", "sample", "--set", "num_folds=5", "--set", "folds=[0,1,2,3,4]"]
NETWORK = ["--set", "backbone=minilm", "--set", "max_length=192"]
PLAIN = ["--set", "start_from=none"]
# folder: settings that differ from the first network's
NETWORKS = {
    "minilm": [],
    "minilm-no-baseline": PLAIN,
    "minilm-plain-head": [*PLAIN, "--set", "head=concat"],
    "minilm-no-structure": [*PLAIN, "--set", "structure_features=false"],
    "minilm-plain-head-no-structure": [*PLAIN, "--set", "head=concat", "--set", "structure_features=false"],
    # both answers in one sequence: twice the length is the same number of computed tokens in an epoch
    "minilm-cross": [*PLAIN, "--set", "architecture=cross", "--set", "max_length=384"],
}
BLENDS = {
    "blend.json": ("ladder", "minilm"),
    "blend-cross.json": ("ladder", "minilm-no-baseline", "minilm-cross"),
}


def main() -> None:
    """Make every run that is not complete, the blend, and the copies."""
    call_prefcls("ladder", *ROWS, "--out", str(RUNS / "ladder"))
    for name, settings in NETWORKS.items():
        call_prefcls("run", *ROWS, *NETWORK, *settings, "--out", str(RUNS / name))
    for blend, names in BLENDS.items():
        call_prefcls("blend", "--runs", *(str(RUNS / name) for name in names), "--out", str(RUNS / blend))
    for name in ("ladder", *NETWORKS):
        copy_file(*(f"{name}/{file}" for file in KEPT_FILES))
    copy_file(*BLENDS)
    print(f"run folders without weights: {KEPT}")


def call_prefcls(*arguments: str) -> None:
    """One command of the public command line, shown; stop where it fails."""
    print("prefcls", *arguments, flush=True)
    if code := subprocess.run([sys.executable, "-m", "prefcls_lib", *arguments], check=False).returncode:
        sys.exit(code)


def copy_file(*names: str) -> None:
    """Copy files of RUNS to the same places in KEPT."""
    for name in names:
        write_whole(KEPT / name, lambda temporary, name=name: shutil.copyfile(RUNS / name, temporary))


if __name__ == "__main__":
    main()
