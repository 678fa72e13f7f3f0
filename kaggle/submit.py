"""Submit runs to the competition and bring the score back: make kaggle-submit OWNER=me

Without RUNS the submit kernel reads the outputs of the training kernels whose runs are here; with RUNS these are
uploaded. The public score goes into result.json of each run that took part. What was begun is noted in
dist/kaggle-submitted.json: where it is there, the command finishes that submission.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import bundle
import follow
import layout
from client import UNKNOWN, Kaggle, Kernel, run_command

from prefcls_lib.runtime.files import UserError, read_json, write_json


def find_trained(kaggle: Kaggle, owner: str, runs: Path) -> dict[str, Path]:
    """The training kernels, owner/slug, whose last finished run is here too, and these run folders."""
    found = {}
    for kernel in (Kernel(owner, name) for name in layout.OWN_BACKBONE):
        status, _ = kaggle.kernel_status(kernel) or ("", "")
        folder = follow.find_here(kaggle, kaggle.output_files(kernel), runs) if status == "complete" else None
        if folder is not None:
            found[str(kernel)] = folder
            print(f"{kernel}: its run is {folder}", flush=True)
    if not found:
        raise UserError(
            f"no training kernel of {owner} has a finished run that is also in {runs}. Train one, make kaggle-train; "
            'or name run folders: RUNS="DIR ...".'
        )
    return found


def start(kaggle: Kaggle, kernel: Kernel, items: list[str], runs: Path, record: Path) -> None:
    """Upload what is needed, push the submit kernel, and note in `record` what was begun."""
    trained = {} if items else find_trained(kaggle, kernel.owner, runs)
    folders = trained or bundle.collect_runs(items)[0]
    bundle.build_bundle(kernel.owner, runs=items, sources=list(trained))
    bundle.push_data_sets(kaggle, kernel.owner)
    version = kaggle.push_kernel(kernel).version
    write_json(record, {"version": version, "runs": list(map(str, folders.values())), "submission": None})


def finish(kaggle: Kaggle, kernel: Kernel, record: Path) -> int:
    """Follow the kernel, submit it, wait for the score, write it; 0 when there is one, 1 when the kernel failed."""
    begun = read_json(record)
    kernel = replace(kernel, version=begun["version"])
    names = [Path(run).name for run in begun["runs"]]
    if begun["submission"] is None:
        if follow.follow_kernel(kaggle, kernel) != "complete":
            record.unlink()
            return 1
        kaggle.patience = 0.0  # a repeated request could submit twice
        begun["submission"] = kaggle.submit(kernel, f"prefcls: {', '.join(names)}")
        write_json(record, begun)
    number = begun["submission"]
    kaggle.patience = follow.PATIENCE
    kaggle.left_there = f"submission {number} is being scored on Kaggle: {kernel.page}"
    found = None

    def look() -> str:
        nonlocal found
        found = kaggle.find_submission(number)
        return UNKNOWN if found is None else found.status.name.lower()

    state = follow.wait_for(f"submission {number}", look, ("complete", "error"), ("pending",))
    kaggle.left_there = None
    if state == "error":
        record.unlink()
        why = f"there is no score, {found.error_description!r}"
        raise UserError(f"submission {number}: {why}. Look at the submit kernel's page on Kaggle.")
    score = float(found.public_score)
    print(f"submission {number}: public score {score}", flush=True)
    for path in (Path(run) / "result.json" for run in begun["runs"]):
        value = {"score": score, "submission": number, "runs": names}
        write_json(path, {**read_json(path), follow.PUBLIC_SCORE: value})
        print(f"{path}: {follow.PUBLIC_SCORE} is written", flush=True)
    record.unlink()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Submit, or finish what was begun; 0: the score is written, 1: the kernel failed, 2: something to put right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("owner", nargs="?", default="")
    parser.add_argument("--runs", nargs="*", default=[], metavar="DIR", help="run folders, or a blend.json")
    parser.add_argument("--folder", type=Path, default=follow.RUNS, metavar="DIR", help="where run folders lie")
    arguments = parser.parse_args(argv)

    def command(kaggle: Kaggle) -> int:
        kernel = Kernel(layout.check_owner(arguments.owner), layout.SUBMIT)
        record = layout.DIST.with_name("kaggle-submitted.json")
        bundle.collect_runs(arguments.runs)
        kaggle.sign_in(kernel.owner)
        if record.is_file():
            print(f"what was begun is finished first; to give it up, interrupt and delete {record}", flush=True)
        else:
            start(kaggle, kernel, arguments.runs, arguments.folder, record)
        return finish(kaggle, kernel, record)

    return run_command(command, f"make kaggle-submit OWNER={arguments.owner}")


if __name__ == "__main__":
    sys.exit(main())
