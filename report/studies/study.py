"""The study on the shipped rows, on a CPU: baselines, three networks, a blend.

    make study          or: python -m report.studies.study

Runs are made in runs/study/ and resumed if it is called again; what the report needs of them (no weights) is copied to
report/runs/. Then `make report`. On another processor a baseline comes out the same to the fourth digit, and a network,
whose bf16 matrix products add in another order, to the third; `git diff` shows what moved.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from prefcls_lib.runtime.files import write_whole

RUNS = Path("runs/study")
KEPT = Path("report/runs")
KEPT_FILES = ("config.json", "result.json", "history.csv", "oof.csv", "submission.csv")
ROWS = ["train=sample", "test=sample", "num_folds=5", "folds=[0,1,2,3,4]"]
# MiniLM's recipe when these were compared first: without a baseline another was not tried
PLAIN = ["start_from=none", "learning_rate=3e-5", "label_smoothing=0.05"]
# folder: settings. Below the first, each network differs from the one above it in one thing.
NETWORKS = {
    "minilm": ["num_seeds=2"],
    "minilm-no-baseline": PLAIN,
    "minilm-plain-head": [*PLAIN, "head=concat"],
}


def main() -> None:
    """Make every run that is not complete, the blend, and the copies."""
    call_prefcls("ladder", "--out", str(RUNS / "ladder"), settings=ROWS)
    for name, settings in NETWORKS.items():
        settings = [*ROWS, "backbone=minilm", "max_length=192", "num_processes=2", *settings]
        call_prefcls("run", "--out", str(RUNS / name), settings=settings)
    call_prefcls("blend", "--runs", str(RUNS / "ladder"), str(RUNS / "minilm"), "--out", str(RUNS / "blend.json"))
    for name in ["blend.json", *(f"{run}/{file}" for run in ("ladder", *NETWORKS) for file in KEPT_FILES)]:
        with write_whole(KEPT / name) as temporary:
            shutil.copyfile(RUNS / name, temporary)
    print(f"run folders without weights: {KEPT}")


def call_prefcls(*arguments: str, settings: list[str] | tuple = ()) -> None:
    """One command of the public command line, shown; stop where it fails."""
    arguments = [*arguments, *(word for setting in settings for word in ("--set", setting))]
    print("prefcls", *arguments, flush=True)
    if code := subprocess.run([sys.executable, "-m", "prefcls_lib", *arguments], check=False).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()
