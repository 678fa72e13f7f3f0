"""Submit runs to the competition and bring the score back: make kaggle-submit OWNER=me RUNS="runs/02-roberta-base"

With RUNS they are uploaded as a data set; TRAIN and TEST (the competition's files) add the baselines and fit the blend
here. Without RUNS the submit kernel reads the outputs of the training kernels whose runs are here. The kernel is
followed, submitted, and the public score is waited for and written into result.json of each run that took part.
What was begun is noted in dist/kaggle-submitted.json: with --watch (make kaggle-watch NOTEBOOK=submit) it is finished.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import bundle
import fetch
import follow
import kernel_folders
import layout
import push
from client import Kaggle, page_of, run_command
from train import Training

from prefcls_lib.config import RunConfig
from prefcls_lib.ensemble.blend import fit_runs
from prefcls_lib.pipeline.ladder import run_ladder_job
from prefcls_lib.runtime.files import UserError, read_json, write_json

SECONDS_BETWEEN_LOOKS = 60
LOOKS_WITHOUT_ANSWER = 20
FOLD_PLAN = ("max_train_rows", "num_folds", "folds", "seed", "fold_seed")  # what the baselines must share with the runs


def runs_of_kernels(kaggle: Kaggle, owner: str, runs: Path) -> tuple[list[str], list[Path]]:
    """The training kernels whose last finished run is here too, and these run folders.

    Raises:
        UserError: there is none.
    """
    kernels, folders = [], []
    for notebook in layout.NOTEBOOKS:
        folder = Training(kaggle, owner, notebook, runs).find_finished()
        if folder is not None:
            kernels.append(f"{owner}/{layout.kernel_slug(layout.kernel_name(notebook))}")
            folders.append(folder)
            print(f"{kernels[-1]}: its run is {folder}", flush=True)
    if not kernels:
        raise UserError(
            f"no training kernel of {owner} has a finished run that is also in {runs}. Train one, make kaggle-train; "
            'or name run folders: RUNS="DIR ...".'
        )
    return kernels, folders


def add_baselines(runs: list[str], train: str, test: str, folder: Path) -> list[str]:
    """The runs, the baselines on the same folds, and their blend; returns the blend.json, which brings the runs."""
    found, _ = bundle.collect_runs(runs)
    settings = read_json(next(iter(found.values())) / "config.json")["settings"]
    plan = {name: settings.get(name) for name in FOLD_PLAN}
    baselines = run_ladder_job(RunConfig(train=train, test=test or "competition", out=str(folder / "ladder"), **plan))
    blend = folder / "blend.json"
    fit_runs([*found.values(), baselines.path], blend)
    return [str(blend)]


def start(kaggle: Kaggle, owner: str, items: list[str], runs: Path, out: Path, record: Path) -> None:
    """Upload what is needed, push the submit kernel, and note in `record` what was begun."""
    found, _ = bundle.collect_runs(items)
    kernels, folders = ([], list(found.values())) if found else runs_of_kernels(kaggle, owner, runs)
    bundle.build_bundle(owner, [], items, [], out, notebooks=())
    push.push_data_sets(kaggle, out, push.read_bundle(out, owner))
    kernel = f"{owner}/{layout.kernel_slug(layout.SUBMIT)}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / layout.SUBMIT
        kernel_folders.write_submit(folder, owner, kernels)
        version = kaggle.push_kernel(folder, kernel)
    print(f"{kernel}: version {version} was started", flush=True)
    write_json(record, {"kernel": kernel, "version": version, "runs": list(map(str, folders)), "submission": None})
    time.sleep(follow.SECONDS_BETWEEN_LOOKS)  # until then its status may be that of the version before


def finish(kaggle: Kaggle, record: Path) -> int:
    """Follow the kernel, submit it, wait for the score, write it; 0 when there is one, 1 when the kernel failed."""
    begun = read_json(record)
    kernel = begun["kernel"]
    if begun["submission"] is None:
        status, failure = follow.follow_kernel(kaggle, kernel)
        if status != "complete":
            record.unlink()
            print(follow.explain_failure(kaggle, kernel, failure), flush=True)
            return 1
        names = ", ".join(Path(run).name for run in begun["runs"])
        kaggle.patience = 0.0  # a repeated request could submit twice
        begun = {**begun, "submission": kaggle.submit(kernel, begun["version"], f"prefcls: {names}")}
        write_json(record, begun)
    kaggle.patience = follow.PATIENCE
    kaggle.left_there = f"submission {begun['submission']} is being scored on Kaggle: {page_of(kernel)}"
    score = wait_for_score(kaggle, begun["submission"], record)
    for run in begun["runs"]:
        path = Path(run) / "result.json"
        names = [Path(other).name for other in begun["runs"]]
        value = {"score": score, "submission": begun["submission"], "runs": names}
        write_json(path, {**read_json(path), fetch.PUBLIC_SCORE: value})
        print(f"{path}: {fetch.PUBLIC_SCORE} is written", flush=True)
    kaggle.left_there = None
    record.unlink()
    return 0


def wait_for_score(kaggle: Kaggle, number: int, record: Path) -> float:
    """The public score of a submission.

    Raises:
        UserError: Kaggle could not score it, or does not know it.
    """
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
    parser.add_argument("--train", default="", metavar="CSV", help="fit the baselines and the blend here")
    parser.add_argument("--test", default="", metavar="CSV", help="the competition's test rows, for the baselines")
    parser.add_argument("--watch", action="store_true", help="finish what was begun")
    parser.add_argument("--bundle", type=Path, default=layout.DIST.with_name("kaggle-submit"))
    parser.add_argument("--folder", type=Path, default=fetch.RUNS, metavar="DIR", help="where run folders lie")
    arguments = parser.parse_args(argv)
    come_back = f"make kaggle-watch OWNER={arguments.owner} NOTEBOOK=submit"
    record = arguments.bundle.with_name("kaggle-submitted.json")

    def command(kaggle: Kaggle) -> int:
        owner = layout.check_owner(arguments.owner)
        items = arguments.runs
        if arguments.watch and not record.is_file():
            raise UserError(f"no submission was begun here. Begin one: make kaggle-submit OWNER={owner}")
        if record.is_file() and not arguments.watch:
            raise UserError(
                f"a submission is under way, version {read_json(record)['version']} of {read_json(record)['kernel']}. "
                f"Finish it: {come_back}; to give it up delete {record}."
            )
        if arguments.train and not items:
            raise UserError('TRAIN: needs RUNS. Name run folders: RUNS="DIR ...".')
        bundle.collect_runs(items)
        kaggle.sign_in(owner)
        if not arguments.watch and arguments.train:
            items = add_baselines(items, arguments.train, arguments.test, arguments.folder)
        if not arguments.watch:
            start(kaggle, owner, items, arguments.folder, arguments.bundle, record)
        return finish(kaggle, record)

    return run_command(f"kaggle-{'watch' if arguments.watch else 'submit'}", command, come_back)


if __name__ == "__main__":
    sys.exit(main())
