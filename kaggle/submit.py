"""Submit runs to the competition and bring the score back: make kaggle-submit OWNER=me

Without RUNS the submit kernel reads the outputs of the training kernels whose runs are here; with RUNS these are
uploaded. The public score goes into result.json of each run that took part. What was begun is noted in
dist/kaggle-submitted.json; with --watch (make kaggle-watch NOTEBOOK=submit) it is finished.
"""

import argparse
import sys
import time
from pathlib import Path

import bundle
import fetch
import follow
import layout
import push
from client import Kaggle, Kernel, run_command
from train import Training

from prefcls_lib.runtime.files import UserError, read_json, write_json

SECONDS_BETWEEN_LOOKS = 60
LOOKS_WITHOUT_ANSWER = 20


def find_trained(kaggle: Kaggle, owner: str, runs: Path) -> tuple[list[str], list[Path]]:
    """The training kernels whose last finished run is here too, and these run folders."""
    kernels, folders = [], []
    for notebook in layout.NOTEBOOKS:
        training = Training(kaggle, owner, notebook, runs)
        folder = training.find_finished()
        if folder is not None:
            kernels.append(training.kernel.name)
            folders.append(folder)
            print(f"{kernels[-1]}: its run is {folder}", flush=True)
    if not kernels:
        raise UserError(
            f"no training kernel of {owner} has a finished run that is also in {runs}. Train one, make kaggle-train; "
            'or name run folders: RUNS="DIR ...".'
        )
    return kernels, folders


def start(kaggle: Kaggle, owner: str, items: list[str], runs: Path, out: Path, record: Path) -> None:
    """Upload what is needed, push the submit kernel, and note in `record` what was begun."""
    found, _ = bundle.collect_runs(items)
    kernels, folders = ([], list(found.values())) if found else find_trained(kaggle, owner, runs)
    bundle.build_bundle(out, owner, runs=items, sources=kernels)
    push.push_data_sets(kaggle, out, owner, layout.library_commit())
    kernel = Kernel(owner, layout.kernel_slug(layout.SUBMIT))
    version = kaggle.push_kernel(out / "kernels" / layout.SUBMIT, kernel).version
    begun = {"owner": owner, "slug": kernel.slug, "version": version, "runs": list(map(str, folders))}
    write_json(record, begun | {"submission": None})


def finish(kaggle: Kaggle, record: Path) -> int:
    """Follow the kernel, submit it, wait for the score, write it; 0 when there is one, 1 when the kernel failed."""
    begun = read_json(record)
    kernel = Kernel(begun["owner"], begun["slug"], begun["version"])
    names = [Path(run).name for run in begun["runs"]]
    if begun["submission"] is None:
        status, failure = follow.follow_kernel(kaggle, kernel)
        if status != "complete":
            record.unlink()
            print(follow.explain_failure(kaggle, kernel, failure), flush=True)
            return 1
        kaggle.patience = 0.0  # a repeated request could submit twice
        begun["submission"] = kaggle.submit(kernel, f"prefcls: {', '.join(names)}")
        write_json(record, begun)
    kaggle.patience = follow.PATIENCE
    kaggle.left_there = f"submission {begun['submission']} is being scored on Kaggle: {kernel.page}"
    score = wait_for_score(kaggle, begun["submission"], record)
    for run in begun["runs"]:
        path = Path(run) / "result.json"
        value = {"score": score, "submission": begun["submission"], "runs": names}
        write_json(path, {**read_json(path), fetch.PUBLIC_SCORE: value})
        print(f"{path}: {fetch.PUBLIC_SCORE} is written", flush=True)
    kaggle.left_there = None
    record.unlink()
    return 0


def wait_for_score(kaggle: Kaggle, number: int, record: Path) -> float:
    """The public score of a submission."""
    line, started, unknown = follow.StatusLine(), time.monotonic(), 0
    while unknown < LOOKS_WITHOUT_ANSWER:
        found = kaggle.find_submission(number)
        status = "unknown" if found is None else found.status.name.lower()
        line.show(f"submission {number}: {status}", time.monotonic() - started)
        if status == "complete":
            line.show(f"submission {number}: public score {found.public_score}")
            line.end()
            return float(found.public_score)
        if status == "error":
            break
        unknown = unknown + 1 if found is None else 0
        time.sleep(SECONDS_BETWEEN_LOOKS)
    line.end()
    record.unlink()
    kaggle.left_there = None
    why = found.error_description if found else "it is not in the list of your submissions"
    raise UserError(f"submission {number}: there is no score, {why!r}. Look at the submit kernel's page on Kaggle.")


def main(argv: list[str] | None = None) -> int:
    """Submit, or finish what was begun; 0: the score is written, 1: the kernel failed, 2: something to put right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("owner", nargs="?", default="")
    parser.add_argument("--runs", nargs="*", default=[], metavar="DIR", help="run folders, or a blend.json")
    parser.add_argument("--watch", action="store_true", help="finish what was begun")
    parser.add_argument("--bundle", type=Path, default=layout.DIST)
    parser.add_argument("--folder", type=Path, default=fetch.RUNS, metavar="DIR", help="where run folders lie")
    arguments = parser.parse_args(argv)
    come_back = f"make kaggle-watch OWNER={arguments.owner} NOTEBOOK=submit"
    record = arguments.bundle.with_name("kaggle-submitted.json")

    def command(kaggle: Kaggle) -> int:
        owner = layout.check_owner(arguments.owner)
        if arguments.watch and not record.is_file():
            raise UserError(f"no submission was begun here. Begin one: make kaggle-submit OWNER={owner}")
        if record.is_file() and not arguments.watch:
            raise UserError(
                f"a submission is under way, version {read_json(record)['version']} of the kernel submit. Finish it: "
                f"{come_back}; to give it up delete {record}."
            )
        bundle.collect_runs(arguments.runs)
        kaggle.sign_in(owner)
        if not arguments.watch:
            start(kaggle, owner, arguments.runs, arguments.folder, arguments.bundle, record)
        return finish(kaggle, record)

    return run_command(f"kaggle-{'watch' if arguments.watch else 'submit'}", command, come_back)


if __name__ == "__main__":
    sys.exit(main())
