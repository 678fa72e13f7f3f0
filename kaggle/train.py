"""Train on Kaggle and bring the run back: make kaggle-train OWNER=me NOTEBOOK=02-roberta-base SET="num_epochs=1"

Or with a preset, a file of notebooks/params: make kaggle-train OWNER=me PRESET=strong

Builds the bundle, looks at the quota, uploads what changed, starts the notebook's kernel, follows it, and downloads its
output into runs/. Run again after a session that was cut off, it resumes the run: the kernel gets its own old output
as an input, and `resume_from`. With --watch (make kaggle-watch) it starts nothing: it follows and downloads.
"""

import argparse
import difflib
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

import bundle
import fetch
import follow
import kernel_folders
import layout
import push
from client import ENDED, Kaggle, page_of, run_command

from prefcls_lib.config import RunConfig, read_settings
from prefcls_lib.pipeline.folder import FREE_SETTINGS, describe_progress
from prefcls_lib.runtime.files import UserError, read_json

PRESETS = layout.ROOT / "notebooks" / "params"
PRESET_NOTEBOOK = "01-deberta-v3-xsmall"  # runs a preset where no notebook is named
BACKBONE_SETTINGS = ("init_from", "backbone")  # what must be among the uploaded backbones
WHAT_TO_SAY = "make kaggle-{} OWNER={} NOTEBOOK={}"


def find_notebook(name: str) -> str:
    """A training notebook by its name, 02-roberta-base or 02_roberta_base.

    Raises:
        UserError: none was given, or there is none of that name; with the nearest that there is.
    """
    known = [layout.kernel_name(notebook) for notebook in layout.NOTEBOOKS]
    wanted = name.replace("_", "-").removesuffix(".ipynb")
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.3)
        hint = f"Did you mean {near[0]}?" if near and wanted else f"Choose one of {', '.join(known)}."
        raise UserError(f"NOTEBOOK={name}: no notebook of that name. {hint}" if name else f"no NOTEBOOK. {hint}")
    return wanted.replace("-", "_")


def read_preset(name: str) -> dict:
    """The settings of notebooks/params/NAME.yaml; none for "".

    Raises:
        UserError: there is no such preset; with the nearest that there is.
    """
    return read_settings(PRESETS / f"{name.removesuffix('.yaml')}.yaml") if name else {}


def read_given(preset: str, settings: list[str]) -> dict:
    """The settings that a command names: those of the preset, over them SET.

    Raises:
        UserError: no such preset, or a text of SET that is no setting.
    """
    given = {}
    for text in settings:
        name, separator, value = text.partition("=")
        if not separator:
            raise UserError(f'SET={text!r}: expected NAME=VALUE, for example SET="num_epochs=1 max_length=384".')
        given[name.strip()] = value
    if "out" in given:
        raise UserError("SET: out cannot be set; the run lies at the top of the kernel's output. Leave it out.")
    return {**read_preset(preset), **given}


def read_parameters(notebook: str, backbones: list[str], given: dict, extra: list[Path]) -> dict:
    """The parameters that a kernel gets: the bundle's, over them what is `given`; of their right types.

    Args:
        notebook: of layout.NOTEBOOKS.
        backbones: folder names in the data set of backbones; the first takes the place of the one that is given.
        given: of `read_given`.
        extra: files of extra rows; on Kaggle they have the names that they have in their data set.

    Raises:
        UserError: a name is no setting (with the nearest right one), or a value out of range.
    """
    there = {name: backbones[0] for name in BACKBONE_SETTINGS if name in given}
    if extra:
        there["extra_train"] = ",".join(map(layout.extra_name, extra))
    parameters = {**kernel_folders.default_parameters(notebook, backbones)[0], **given, **there}
    values = RunConfig.from_mapping(parameters, source="SET").to_dict()
    return {name: values[name] for name in parameters}


def find_extra(given: dict) -> list[Path]:
    """The files of extra rows that are uploaded.

    Raises:
        UserError: one is not there, or two have one name.
    """
    names = RunConfig.from_mapping({"extra_train": given.get("extra_train")}, source="SET").extra_train or ""
    files = [Path(name.strip()) for name in names.split(",") if name.strip()]
    for path in files:
        if not path.is_file():
            raise UserError(f"extra_train={path}: no such file. `prefcls convert` makes one of the public arena sets.")
    if len(set(map(layout.extra_name, files))) < len(files):
        raise UserError(f"extra_train={names}: two files have one name. Rename one.")
    return files


def holds_run(names: Collection[str]) -> bool:
    """Whether an output has a finished run among its files, or one that can be resumed."""
    return "config.json" in names and any(name.startswith(("model/", "checkpoint/")) for name in names)


class Training:
    """One notebook of one owner: what is known of it here and on Kaggle."""

    def __init__(self, kaggle: Kaggle, owner: str, notebook: str, runs: Path):
        self.kaggle, self.notebook, self.runs = kaggle, notebook, runs
        self.name = layout.kernel_name(notebook)
        self.owner, self.kernel = owner, f"{owner}/{layout.kernel_slug(self.name)}"

    def say(self, command: str) -> str:
        """The make command that does something with this notebook."""
        return WHAT_TO_SAY.format(command, self.owner, self.name)

    def look_back(self, parameters: dict) -> bool:
        """Whether the kernel's last version was cut off, so that this command resumes it.

        Raises:
            UserError: it runs, it ended and is not here yet, or it was cut off with other settings.
        """
        status = self.kaggle.kernel_status(self.kernel)
        if status is None:
            return False
        if status[0] not in (*ENDED, "new_script"):
            raise UserError(
                f"{self.kernel} is {status[0]} on Kaggle: {page_of(self.kernel)}. Nothing was started. Follow it: "
                f"{self.say('watch')}; or stop it on its page first."
            )
        files = dict(self.kaggle.output_files(self.kernel))
        if "result.json" in files:
            if self._find_here(files) is None:
                raise UserError(
                    f"{self.kernel} has finished a run that is not in {self.runs} yet. Nothing was started. Bring it "
                    f"here first: {self.say('watch')}"
                )
            return False
        if not holds_run(files) or "resume_from" in parameters:
            return False
        earlier = self._read(files, "config.json")["settings"]
        for name, now in parameters.items():
            before = earlier.get(name, now)
            if name not in FREE_SETTINGS and before != now:
                raise UserError(
                    f"{self.kernel} was cut off with {name}={before!r}, this command has {name}={now!r}. Resume it "
                    'with the same SET and PRESET, or start from the beginning with SET="resume_from=none ...".'
                )
        return True

    def find_finished(self) -> Path | None:
        """The folder here of the run that the kernel's last version finished; None where there is none."""
        status = self.kaggle.kernel_status(self.kernel)
        if status is None or status[0] != "complete":
            return None
        files = dict(self.kaggle.output_files(self.kernel))
        return self._find_here(files) if "result.json" in files else None

    def start(self, parameters: dict, backbones: list[str], extra: list[Path], out: Path) -> None:
        """Quota, bundle, data sets, kernel.

        Raises:
            UserError: whatever is missing; the message says if something was started.
        """
        resumed = self.look_back(parameters)
        hours, left = parameters["time_budget_hours"] or kernel_folders.TRAIN_HOURS, self.kaggle.hours_left()
        if left is not None and hours > left:
            raise UserError(
                f"the run may take {hours:g} GPU hours, and this week's quota has {left:.1f} left. Nothing was "
                f'uploaded. Give it fewer hours, SET="time_budget_hours={max(left - 0.1, 0.1):.1f}", or wait for the '
                "new quota."
            )
        print(f"quota: {'unknown' if left is None else f'{left:.1f}'} GPU hours left, {hours:g} asked for", flush=True)
        bundle.build_bundle(self.owner, backbones, [], [], out, notebooks=(self.notebook,), extra=extra)
        push.push_data_sets(self.kaggle, out, push.read_bundle(out, self.owner))
        sources = []
        if resumed:
            parameters = {**parameters, "resume_from": layout.kernel_slug(self.name)}
            sources = [self.kernel]
            print(f"{self.kernel} was cut off; its output is attached, and the run is resumed", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / self.name
            kernel_folders.write_training(folder, self.owner, self.notebook, parameters, sources)
            version = self.kaggle.push_kernel(folder, self.kernel)
        print(f"{self.kernel}: version {version} was started", flush=True)
        time.sleep(follow.SECONDS_BETWEEN_LOOKS)  # until then its status may be that of the version before

    def follow(self) -> int:
        """Follow the kernel, download its output, say what came of it; 0 when the run is finished, else 1.

        Raises:
            UserError: the connection or the disk; what is on Kaggle stays there.
        """
        status, failure = follow.follow_kernel(self.kaggle, self.kernel)
        if status == "error":
            print(follow.explain_failure(self.kaggle, self.kernel, failure), flush=True)
        names = {name for name, _ in self.kaggle.output_files(self.kernel)}
        if not holds_run(names):
            print(f"{self.kernel}: its output holds no trained model, so nothing was downloaded", flush=True)
            return 1
        folder = fetch.fetch_output(self.kaggle, self.kernel, self.runs, self.name)
        self.kaggle.left_there = None
        if "result.json" in names:
            fetch.report_run(folder, self.runs)
            return 0
        print(f"The session was cut off. {describe_progress(folder)}", flush=True)
        print(f"resume it: {self.say('train')}, with the same SET and PRESET", flush=True)
        return 1

    def _find_here(self, files: dict[str, str]) -> Path | None:
        return fetch.find_here(self._read(files, "result.json"), self.runs)

    def _read(self, files: dict[str, str], name: str) -> dict:
        with tempfile.TemporaryDirectory() as scratch:
            fetch.download_files(self.kaggle, [(name, files[name])], Path(scratch) / "files")
            return read_json(Path(scratch) / "files" / name)


def main(argv: list[str] | None = None) -> int:
    """Train or watch; 0: the run is finished and here, 1: it is not, 2: something to put right, 130: Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("owner", nargs="?", default="")
    parser.add_argument("notebook", nargs="?", default="")
    parser.add_argument("--preset", default="", metavar="NAME", help="a file of notebooks/params")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of this run")
    parser.add_argument(
        "--backbones", nargs="*", default=[], metavar="NAME", help="names or folders; the notebook's own"
    )
    parser.add_argument("--watch", action="store_true", help="start nothing")
    parser.add_argument("--bundle", type=Path, default=layout.DIST)
    parser.add_argument("--runs", type=Path, default=fetch.RUNS, metavar="DIR", help="where run folders go")
    arguments = parser.parse_args(argv)
    arguments.notebook = arguments.notebook or (PRESET_NOTEBOOK if arguments.preset else "")

    def command(kaggle: Kaggle) -> int:
        layout.check_owner(arguments.owner)
        given = read_given(arguments.preset, arguments.set)
        notebook = find_notebook(arguments.notebook)
        named = [given[name] for name in BACKBONE_SETTINGS if name in given]
        backbones = arguments.backbones or [*named, layout.OWN_BACKBONE[notebook]][:1]
        extra = find_extra(given)
        parameters = read_parameters(notebook, [Path(name).name for name in backbones], given, extra)
        kaggle.sign_in(arguments.owner)
        training = Training(kaggle, arguments.owner, notebook, arguments.runs)
        if not arguments.watch:
            training.start(parameters, backbones, extra, arguments.bundle)
        elif kaggle.kernel_status(training.kernel) is None:
            raise UserError(f"{training.kernel}: nothing was started yet. Start it: {training.say('train')}")
        return training.follow()

    come_back = WHAT_TO_SAY.format("watch", arguments.owner, arguments.notebook)
    return run_command(f"kaggle-{'watch' if arguments.watch else 'train'}", command, come_back)


if __name__ == "__main__":
    sys.exit(main())
