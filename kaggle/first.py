"""Two short trainings and a submission, which show what is true on Kaggle: make kaggle-first OWNER=me

Trains notebook 01 on 2,000 rows and submits it, then trains notebook 03 on 1,000 rows, one model on both GPUs. Prints
each assumption of README.md with what was seen of it, and writes them into runs/first/assumptions.json.
"""

import argparse
import re
import sys
from pathlib import Path

import follow
import layout
import submit
import train
from client import Kaggle, Kernel, run_command

from prefcls_lib.runtime.files import read_json, write_json

SMALL = ("num_epochs=1", "time_budget_hours=0.5")
STEPS = {"01-deberta-v3-xsmall": "max_train_rows=2000", "submit": "", "03-electra-large": "max_train_rows=1000"}
SEEN = (  # of each of the assumptions at the end of README.md, in their order
    "the library of commit {train[versions][commit]} ran",
    "{train[versions][machine]}, transformers {train[versions][transformers]}",
    "training was followed to its end: log loss {train[log_loss]:.4f}",
    "{log} lines, {progress} of them of progress",
    "{train[tokens_per_second]:,.0f} tokens a second in {train[backbone]}",
    "{hours:.2f} GPU hours",
    "public score {train[public_score][score]}",
    "{together[tokens_per_second]:,.0f} tokens a second in {together[backbone]}",
    "{before}",
    "not tried here: it shows when a session is cut off",
    "nothing was refused for {train[backbone]} and {together[backbone]}",
)


def describe(seen: dict) -> dict[str, str]:
    """Each assumption of README.md with what was seen of it."""
    found = {}
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8").partition("## Assumptions")[2]
    for assumption, words in zip(re.findall("^- (.+)$", text, re.MULTILINE), SEEN, strict=True):
        try:
            found[assumption] = words.format(**seen)
        except (KeyError, TypeError):  # its step was not reached, or Kaggle does not tell
            found[assumption] = "not seen"
    return found


def run_step(kaggle: Kaggle, owner: str, step: str, arguments: argparse.Namespace, seen: dict) -> int:
    """One of STEPS, and what was seen of it; returns the exit code of its command."""
    if step == "submit":
        before = kaggle.gpu_hours()
        code = submit.main([owner, "--folder", str(arguments.runs)])
        if before and (after := kaggle.gpu_hours()):
            seen["hours"] = before[0] - after[0]
    else:
        given = ["--backbone", arguments.backbone, "--set", STEPS[step], *SMALL]
        code = train.main([owner, step, "--runs", str(arguments.runs), *given])
        lines = list(kaggle.log_lines(Kernel(owner, step)))
        seen |= {"log": len(lines), "progress": sum(bool(follow.PROGRESS.search(line)) for line in lines)}
    for name, start in (("train", "01"), ("together", "03")):
        for path in sorted(arguments.runs.glob(f"{start}*/result.json"), key=lambda path: path.stat().st_mtime):
            seen[name] = read_json(path)
    return code


def main(argv: list[str] | None = None) -> int:
    """All steps, until one fails; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("owner", nargs="?", default="")
    parser.add_argument("--backbone", default="", metavar="NAME", help="in the place of the notebooks' own")
    parser.add_argument("--runs", type=Path, default=follow.RUNS / "first", metavar="DIR", help="where run folders go")
    arguments = parser.parse_args(argv)

    def command(kaggle: Kaggle) -> int:
        owner = layout.check_owner(arguments.owner)
        kaggle.sign_in(owner)
        status = kaggle.kernel_status(Kernel(owner, next(iter(STEPS))))
        seen: dict = {"before": "none was there" if status is None else f"there was one, {status[0]}"}
        codes = (run_step(kaggle, owner, step, arguments, seen) for step in STEPS)
        code = next((code for code in codes if code), 0)
        found = describe(seen)
        arguments.runs.mkdir(parents=True, exist_ok=True)
        write_json(arguments.runs / "assumptions.json", found)
        print(*(f"- {text}\n  {what}" for text, what in found.items()), sep="\n", flush=True)
        print(f"written into {arguments.runs / 'assumptions.json'}", flush=True)
        return code

    return run_command(command, Kernel(arguments.owner, "...").make("watch"))


if __name__ == "__main__":
    sys.exit(main())
