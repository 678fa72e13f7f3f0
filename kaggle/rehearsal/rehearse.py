"""Run a bundle's notebooks here as Kaggle would: python kaggle/rehearsal/rehearse.py --rows 25000

1. the first training notebook, on 160 shipped rows as the competition
2. `prefcls ladder` and `prefcls blend`, then `submit` on the three test rows
3. `submit` again as a competition rerun on synthetic rows, with a network that reads short sides (a CPU would take
   hours at full length), the ladder and their blend

Every step runs without a network and without this repository; see machine_copy.py. The time that a T4 would take is a
projection from counted tokens, and the rehearsal fails if it is more than the time budget.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the modules that build and check a bundle

import check
import kernel_folders
import layout
import numpy as np
import rows as synthetic
from bundle import Bundle, add_runs, collect_runs
from machine_copy import MachineCopy, Measured, competition_folder, peak_text
from transformers import AutoConfig

from prefcls_lib.data.loading import read_rows, sample_path
from prefcls_lib.data.schema import ID
from prefcls_lib.data.submission import check_submission
from prefcls_lib.doctor import capacity
from prefcls_lib.models.saved import load_fold_model
from prefcls_lib.runtime.files import UserError, read_json

TRAIN_ROWS = 160  # of the shipped ones; enough for ten folds, few enough for a CPU at full length
STUDY = ("deberta-v3-xsmall", "roberta-base", "electra-large-discriminator")
SHORT = ("max_length=32", "num_epochs=1")  # of the network in step 3
INPUT = "/kaggle/input"


class Rehearsal:
    """The steps on one bundle; what they leave goes from one to the next as on Kaggle."""

    def __init__(self, bundle: Path, scratch: Path, num_rows: int):
        self.bundle, self.scratch, self.num_rows = bundle, scratch, num_rows
        self.facts = layout.read_manifest(bundle)
        self.owner, self.kernel = self.facts["owner"], layout.kernel_name(layout.NOTEBOOKS[0])
        self.machine = MachineCopy(scratch)
        self.competition = competition_folder(scratch / "competition", TRAIN_ROWS, sample_path("test"))
        self.data_sets = {("dataset", p.name): p for p in sorted((bundle / "datasets").iterdir())}
        self.inputs = self.machine.make_inputs("inputs", self.owner, {**self._base(), **self.data_sets})
        self.library = f"{INPUT}/datasets/{self.owner}/{layout.LIBRARY}"

    def train(self) -> Path:
        """Step 1; returns the kernel's output folder, which is a run folder."""
        working = self._working("train")
        measured = self._run_notebook(self.kernel, self.inputs, working, "train")
        self._check(working / "submission.csv", sample_path("test"))
        result = read_json(working / "result.json")
        say(f"train: {peak_text(measured)}; {result['backbone']}, log loss {result['log_loss']:.4f}")
        say(f"train: the notebook ran the library of commit {result['versions']['commit']}")
        if result["versions"]["commit"] != self.facts["commit"]:
            raise UserError("that is not the bundle's commit")
        return working

    def train_short(self) -> Path:
        """The network of step 3: the same rows and folds, short sides."""
        working = self._working("short")
        backbone = read_json(self.scratch / "train" / "config.json")["settings"]["backbone"]
        arguments = [part for text in (f"backbone={backbone}", *SHORT) for part in ("--set", text)]
        measured = self._run_library(["run", "--out", "/kaggle/working", *arguments], self.inputs, working)
        say(f"train a network that reads 32 tokens a side: {peak_text(measured)}")
        return working

    def blend(self, run: Path, name: str) -> Path:
        """A data set of `run`, the ladder and their blend, as `make kaggle-bundle RUNS=` makes it."""
        if not (self.scratch / "ladder").is_dir():
            working = self._working("ladder")
            measured = self._run_library(["ladder", "--out", "/kaggle/working"], self.inputs, working)
            say(f"ladder: {peak_text(measured)}")
        folders = {("notebook", folder.name): folder for folder in (run, self.scratch / "ladder")}
        inputs = self.machine.make_inputs(f"{name}-runs", self.owner, {**self._library(), **folders})
        paths = [f"{INPUT}/notebooks/{self.owner}/{slug}" for _, slug in folders]
        working = self._working(name)
        self._run_library(["blend", "--runs", *paths, "--out", "/kaggle/working/blend.json"], inputs, working)
        blend = {**read_json(working / "blend.json"), "runs": [str(folder) for folder in folders.values()]}
        (self.scratch / f"{name}.json").write_text(json.dumps(blend), encoding="utf-8")
        bundle = Bundle(self.scratch / f"{name}-bundle", self.scratch / "none")
        add_runs(bundle, *collect_runs([str(self.scratch / f"{name}.json")]))
        if problems := check.check_data_set(bundle.folder / "datasets" / layout.RUNS):
            raise UserError("an upload would spoil the runs:\n  " + "\n  ".join(problems))
        say(f"blend: weights {[round(weight, 3) for weight in blend['weights']]}")
        return bundle.folder / "datasets" / layout.RUNS

    def submit_sample(self, runs: Path) -> None:
        """Step 2: the three test rows."""
        sources = {**self._library(), ("dataset", layout.RUNS): runs}
        inputs = self.machine.make_inputs("sample-inputs", self.owner, sources)
        working = self._working("submit-sample")
        measured = self._run_notebook(layout.SUBMIT, inputs, working, "submit, three rows")
        self._check(working / "submission.csv", sample_path("test"))
        say(f"submit, three rows: {peak_text(measured)}")

    def submit_rerun(self, runs: Path) -> tuple[Measured, dict, Path]:
        """Step 3: the hidden test set's part is played by synthetic rows."""
        test = self.scratch / "hidden.csv"
        synthetic.write_rows(test, synthetic.make_rows(self.num_rows))
        hidden = competition_folder(self.scratch / "rerun", TRAIN_ROWS, test)
        sources = {**self._library(), ("dataset", layout.RUNS): runs, **dict([hidden])}
        inputs = self.machine.make_inputs("rerun-inputs", self.owner, sources)
        working = self._working("submit-rerun")
        what = f"submit as a competition rerun, {self.num_rows:,} rows"
        measured = self._run_notebook(layout.SUBMIT, inputs, working, what, KAGGLE_IS_COMPETITION_RERUN="1")
        self._check(working / "submission.csv", test)
        record = read_json(working / "submit.json")
        say(f"{what}: {peak_text(measured)}")
        for run in record["runs"]:
            say(f"  {run['run']}: {run['folds_used']} of {run['folds']} models in {run['seconds']:.0f} s")
        for line in record["left_out"]:
            say(f"  {line}")
        return measured, record, test

    def _base(self) -> dict:
        return dict([self.competition])

    def _library(self) -> dict:
        return {**self._base(), ("dataset", layout.LIBRARY): self.bundle / "datasets" / layout.LIBRARY}

    def _working(self, name: str) -> Path:
        folder = self.scratch / name
        folder.mkdir()
        return folder

    def _run_notebook(self, kernel: str, inputs: Path, working: Path, what: str, **variables: str) -> Measured:
        """As Kaggle does: papermill with no parameters of its own."""
        notebook = self.bundle / "kernels" / kernel / f"{layout.kernel_slug(kernel)}.ipynb"
        papermill = [
            "-m",
            "papermill",
            notebook,
            "__notebook__.ipynb",
            "-y",
            "{}",
            "--no-progress-bar",
            "-k",
            "python3",
        ]
        return self.machine.run([self.machine.python, *papermill], inputs, working, what, **variables)

    def _run_library(self, arguments: list, inputs: Path, working: Path) -> Measured:
        command = [self.machine.python, "-m", "prefcls_lib", *arguments]
        return self.machine.run(command, inputs, working, f"prefcls {arguments[0]}", PYTHONPATH=self.library)

    def _check(self, submission: Path, test: Path) -> None:
        check_submission(submission, list(read_rows(test, labelled=False)[ID]))


def say(text: str) -> None:
    """A line of the report, at once."""
    print(text, flush=True)


def project(record: dict, wall_seconds: float, fold: Path, test: Path) -> tuple[float, str]:
    """Hours of a rerun with one fold of each of STUDY on a T4 at its slower pace, and a line about it.

    Everything but the encoders (reading, features, tokens, the baselines) is taken as it was measured here.

    Args:
        record: submit.json of the rerun that was measured.
        wall_seconds: of that rerun.
        fold: a saved model whose tokenizer and max_length count the tokens.
        test: its test rows.
    """
    model = load_fold_model(fold)
    rows = read_rows(test, labelled=False)
    lengths = np.array([len(ids) for ids in model.read_inputs(rows).examples.token_ids])
    other = max(0.0, wall_seconds - sum(run["seconds"] for run in record["runs"] if run["run"] != "ladder"))
    hours, parts = np.full(2, other / 3600), []
    for name in STUDY:
        config = read_json(layout.ROOT / "report" / "backbones" / f"{name}.json")["config"]
        seconds = np.array(capacity.t4_seconds(AutoConfig.for_model(**config), lengths))
        hours += seconds / 3600
        parts.append("{} {:.1f} to {:.1f} min".format(name, *seconds / 60))
    paces = " to ".join(f"{pace / 1e12:g}" for pace in sorted(capacity.T4_FLOP_PER_SECOND))
    return float(hours[1]), (
        f"projection, not measured: {lengths.sum() / 1e6:.1f} million tokens at max_length={model.max_length}; at "
        f"{paces} TFLOP/s of a T4 one fold takes {', '.join(parts)}; with {other / 60:.1f} min for all else, as "
        f"measured here, submit takes {hours[0]:.2f} to {hours[1]:.2f} h with all three"
    )


def rehearse(bundle: Path, num_rows: int, full: bool) -> None:
    """All steps, and the projection.

    Args:
        bundle: from `make kaggle-bundle`.
        num_rows: of the rerun.
        full: the rerun uses the training notebook's own network, at full length: hours on a CPU.

    Raises:
        UserError: a rule is broken, a step fails, or the projected time is over the budget.
    """
    problems = check.find_problems(bundle)
    if problems:
        raise UserError("the bundle is not sound:\n  " + "\n  ".join(problems))
    with tempfile.TemporaryDirectory(prefix="prefcls-rehearsal-") as scratch:
        rehearsal = Rehearsal(bundle, Path(scratch), num_rows)
        say("copy of Kaggle: no network but loopback, /kaggle/input read-only, this repository hidden")
        run = rehearsal.train()
        runs = rehearsal.blend(run, "blend")
        rehearsal.submit_sample(runs)
        if not full:
            runs = rehearsal.blend(rehearsal.train_short(), "short-blend")
        measured, record, test = rehearsal.submit_rerun(runs)
        hours, text = project(record, measured.seconds, run / "model" / "fold0", test)
        say(text)
        if hours > kernel_folders.SUBMIT_HOURS:
            raise UserError(f"projected {hours:.1f} h on a T4 are over the {kernel_folders.SUBMIT_HOURS} h budget")
    say("rehearsal passed")


def main(argv: list[str] | None = None) -> int:
    """Rehearse; 0 when everything passed, 2 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=layout.DIST)
    parser.add_argument("--rows", type=int, default=25_000, help="rows of the rerun")
    parser.add_argument("--full", action="store_true", help="rerun with the network at full length: hours on a CPU")
    arguments = parser.parse_args(argv)
    try:
        rehearse(arguments.bundle, arguments.rows, arguments.full)
    except UserError as error:
        print(f"kaggle-rehearsal: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
