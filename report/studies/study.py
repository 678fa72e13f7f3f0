"""The study on the shipped rows, on a CPU: baselines, five networks, blends.

    python -m report.studies.study          or: make study

Runs are made in runs/study/ and resumed if it is called again; what the report needs of them (no weights) is
copied to report/runs/, after a comparison with what was there. Then `make report`.
"""

import json
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
# MiniLM's recipe when these were compared first: without a baseline another was not tried
PLAIN = ["--set", "start_from=none", "--set", "learning_rate=3e-5", "--set", "label_smoothing=0.05"]
# folder: settings. Below the first, each network differs from the one above it in one thing.
NETWORKS = {
    "minilm": ["--set", "num_seeds=3"],
    "minilm-no-baseline": PLAIN,
    "minilm-plain-head": [*PLAIN, "--set", "head=concat"],
    "minilm-plain-head-no-structure": [*PLAIN, "--set", "head=concat", "--set", "structure_features=false"],
    # compare with minilm-no-baseline: both answers in one sequence, twice the length, as many computed tokens an epoch
    "minilm-cross": [*PLAIN, "--set", "architecture=cross", "--set", "max_length=384"],
}
BLENDS = {
    "blend.json": ("ladder", "minilm"),
    "blend-cross.json": ("ladder", "minilm-no-baseline", "minilm-cross"),
}


# On another processor with the same packages the baselines come out the same to the fourth digit, and a network, whose
# bf16 matrix products add in another order, to the third.
TOLERANCES = {"baseline": 1e-4, "run": 2e-3}


def main() -> None:
    """Make every run that is not complete, the blend, the comparison with what is committed, and the copies."""
    call_prefcls("ladder", *ROWS, "--out", str(RUNS / "ladder"))
    for name, settings in NETWORKS.items():
        call_prefcls("run", *ROWS, *NETWORK, *settings, "--out", str(RUNS / name))
    for blend, names in BLENDS.items():
        call_prefcls("blend", "--runs", *(str(RUNS / name) for name in names), "--out", str(RUNS / blend))
    print(compare_with_committed(read_log_losses(KEPT), read_log_losses(RUNS)))
    for name in ("ladder", *NETWORKS):
        copy_file(*(f"{name}/{file}" for file in KEPT_FILES))
    copy_file(*BLENDS)
    print(f"run folders without weights: {KEPT}")


def read_log_losses(place: Path) -> dict[tuple[str, str], float]:
    """(kind, name) to log loss: each baseline of the ladder, each run and each blend that is in `place`."""
    files = {name: place / name / "result.json" for name in ("ladder", *NETWORKS)} | {n: place / n for n in BLENDS}
    results = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.is_file()}
    baselines = {("baseline", line["rung"]): line["log_loss"] for line in results.get("ladder", {}).get("ladder", ())}
    return baselines | {("run", name): result["log_loss"] for name, result in results.items()}


def compare_with_committed(before: dict[tuple[str, str], float], now: dict[tuple[str, str], float]) -> str:
    """What moved by more than its tolerance, a line each, and how much stayed."""
    moved = [
        f"  {name}: {before[kind, name]:.4f} committed, {loss:.4f} here, {loss - before[kind, name]:+.4f}"
        for (kind, name), loss in now.items()
        if (kind, name) in before and abs(loss - before[kind, name]) > TOLERANCES[kind]
    ]
    new = [f"  {key[1]}: not committed, {loss:.4f} here" for key, loss in now.items() if key not in before]
    same = len(now) - len(moved) - len(new)
    return "\n".join([f"{same} of {len(now)} log losses are those that are committed, the others are:", *moved, *new])


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
