"""The first half hour on Kaggle, which tells what is true there: make kaggle-first OWNER=me

Trains notebook 01 on 2,000 rows and submits it, then trains notebook 03 on 1,000 rows, one model on both GPUs. Prints
each assumption of README.md with what was seen of it, and writes them into runs/first/assumptions.json.
"""

import argparse
import sys
from pathlib import Path

import fetch
import layout
import submit
import train
from client import Kaggle, Kernel, run_command
from follow import PROGRESS

from prefcls_lib.runtime.files import read_json, write_json

SMALL = ("num_epochs=1", "time_budget_hours=0.5")
STEPS = {"01-deberta-v3-xsmall": "max_train_rows=2000", "submit": "", "03-electra-large": "max_train_rows=1000"}
NOT_TRIED = "not tried here: it shows when a session is cut off"
ASSUMPTIONS = {  # each of README.md, and what is seen of it
    "A folder sent as `prefcls_lib.zip` is unpacked as a folder of that name.":
        "the library of commit {train[versions][commit]} ran",
    "`machine_shape: NvidiaTeslaT4` gives two T4; the image has transformers 5.0 or newer.":
        "{train[versions][machine]}, transformers {train[versions][transformers]}",
    "A version of a kernel is asked for as `v7`; a data set's next version has the next number.":
        "training was followed to its end: log loss {train[log_loss]:.4f}",
    "The log that is followed holds what the cells print, with the training's progress.":
        "{log} lines, {progress} of them of progress",
    "The T4's pace, from which hours are projected.":
        "{train[tokens_per_second]:,.0f} tokens a second in {train[backbone]}",
    "The first run of `submit` uses up little quota, its rerun none.": "{hours:.2f} GPU hours",
    "A rerun has the files of the first run and a longer `test.csv`, and sets `KAGGLE_IS_COMPETITION_RERUN`.":
        "public score {train[public_score][score]}",
    "Both T4 train one model together over NCCL.":
        "{together[tokens_per_second]:,.0f} tokens a second in {together[backbone]}",
    "A kernel whose status cannot be read (403 or 404) does not exist.": "{before}",
    "The output of a session that was killed is kept, and a kernel may have its own output as an input.": NOT_TRIED,
    "A notebook may have 1 MB, a data set 50 files and folders at its top, all private ones together 200 GB.":
        "nothing was refused for {train[backbone]} and {together[backbone]}",
}  # fmt: skip


def describe(seen: dict) -> dict[str, str]:
    """Each assumption with what was seen of it."""
    found = {}
    for text, words in ASSUMPTIONS.items():
        try:
            found[text] = words.format(**seen)
        except (KeyError, TypeError):  # its step was not reached, or Kaggle does not tell
            found[text] = "not seen"
    return found


def run_step(kaggle: Kaggle, owner: str, step: str, arguments: argparse.Namespace, seen: dict) -> int:
    """One of STEPS, and what was seen of it; returns the exit code of its command."""
    places = ["--bundle", str(arguments.bundle)]
    if step == "submit":
        before = kaggle.gpu_hours()
        code = submit.main([owner, *places, "--folder", str(arguments.runs)])
        if before and (after := kaggle.gpu_hours()):
            seen["hours"] = before[0] - after[0]
    else:
        given = ["--backbone", arguments.backbone, "--set", STEPS[step], *SMALL]
        code = train.main([owner, step, *places, "--runs", str(arguments.runs), *given])
        lines = list(kaggle.log_lines(Kernel(owner, layout.kernel_slug(step))))
        seen |= {"log": len(lines), "progress": sum(bool(PROGRESS.search(line)) for line in lines)}
    for name, start in (("train", "01"), ("together", "03")):
        for path in sorted(arguments.runs.glob(f"{start}*/result.json"), key=lambda path: path.stat().st_mtime):
            seen[name] = read_json(path)
    return code


def main(argv: list[str] | None = None) -> int:
    """All steps, until one fails; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("owner", nargs="?", default="")
    parser.add_argument("--backbone", default="", metavar="NAME", help="in the place of the notebooks' own")
    parser.add_argument("--bundle", type=Path, default=layout.DIST)
    parser.add_argument("--runs", type=Path, default=fetch.RUNS / "first", metavar="DIR", help="where run folders go")
    arguments = parser.parse_args(argv)

    def command(kaggle: Kaggle) -> int:
        owner = layout.check_owner(arguments.owner)
        kaggle.sign_in(owner)
        status = kaggle.kernel_status(Kernel(owner, layout.kernel_slug(next(iter(STEPS)))))
        seen: dict = {"before": "none was there" if status is None else f"there was one, {status[0]}"}
        codes = (run_step(kaggle, owner, step, arguments, seen) for step in STEPS)
        code = next((code for code in codes if code), 0)
        found = describe(seen)
        arguments.runs.mkdir(parents=True, exist_ok=True)
        write_json(arguments.runs / "assumptions.json", found)
        print(*(f"- {text}\n  {what}" for text, what in found.items()), sep="\n", flush=True)
        print(f"written into {arguments.runs / 'assumptions.json'}", flush=True)
        return code

    return run_command("kaggle-first", command, f"make kaggle-watch OWNER={arguments.owner} NOTEBOOK=...")


if __name__ == "__main__":
    sys.exit(main())
