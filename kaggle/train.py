"""Train on Kaggle and bring the run back: make kaggle-train OWNER=me NOTEBOOK=02-roberta-base SET="num_epochs=1"

Or with a preset, a file of notebooks/params: make kaggle-train OWNER=me PRESET=strong

Looks at the quota, builds the bundle, uploads what changed, starts the notebook's kernel, follows it, and downloads its
output into runs/. Run again after a session that was cut off, it resumes the run: the kernel gets its own old output
as an input, and `resume_from`. With --watch (make kaggle-watch) it follows and downloads only; with --build
(make kaggle-bundle) it only builds.
"""

import argparse
import difflib
import sys
from collections.abc import Collection
from pathlib import Path

import bundle
import fetch
import follow
import kernel_folders
import layout
import push
from client import ENDED, Kaggle, Kernel, run_command

from prefcls_lib.config import RunConfig, read_settings
from prefcls_lib.pipeline.folder import FREE_SETTINGS, describe_progress
from prefcls_lib.runtime.files import UserError

PRESETS = layout.ROOT / "notebooks" / "params"
PRESET_NOTEBOOK = "01-deberta-v3-xsmall"  # runs a preset where no notebook is named
BACKBONE_SETTINGS = ("init_from", "backbone")  # what must be among the uploaded backbones
WHAT_TO_SAY = "make kaggle-{} OWNER={} NOTEBOOK={}"


def find_notebook(name: str) -> str:
    """A training notebook by its name, 02-roberta-base or 02_roberta_base."""
    known = [layout.kernel_name(notebook) for notebook in layout.NOTEBOOKS]
    wanted = name.replace("_", "-").removesuffix(".ipynb")
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.3)
        hint = f"Did you mean {near[0]}?" if near and wanted else f"Choose one of {', '.join(known)}."
        raise UserError(f"NOTEBOOK={name}: no notebook of that name. {hint}" if name else f"no NOTEBOOK. {hint}")
    return wanted.replace("-", "_")


def read_preset(name: str) -> dict:
    """The settings of notebooks/params/NAME.yaml; none for ""."""
    return read_settings(PRESETS / f"{name.removesuffix('.yaml')}.yaml") if name else {}


def read_given(preset: str, settings: list[str]) -> dict:
    """The settings that a command names: those of the preset, over them SET."""
    given = {}
    for text in settings:
        name, separator, value = text.partition("=")
        if not separator:
            raise UserError(f'SET={text!r}: expected NAME=VALUE, for example SET="num_epochs=1 max_length=384".')
        given[name.strip()] = value
    if "out" in given:
        raise UserError("SET: out cannot be set; the run lies at the top of the kernel's output. Leave it out.")
    return {**read_preset(preset), **given}


def read_parameters(notebook: str, backbone: str, given: dict, extra: list[Path]) -> dict:
    """The parameters that a kernel gets: its defaults, over them what is `given`; of their right types.

    The backbone that is uploaded takes the place of the one that is given, and files of extra rows have the names that
    they have in their data set.
    """
    slug = layout.backbone_slug(backbone)
    there = {name: slug for name in BACKBONE_SETTINGS if name in given}
    if extra:
        there["extra_train"] = ",".join(map(layout.extra_name, extra))
    parameters = {**kernel_folders.default_parameters(notebook, slug), **given, **there}
    values = RunConfig.from_mapping(parameters, source="SET").to_dict()
    return {name: values[name] for name in parameters}


def find_extra(given: dict) -> list[Path]:
    """The files of extra rows that are uploaded."""
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
        self.kaggle, self.owner, self.notebook, self.runs = kaggle, owner, notebook, runs
        self.name = layout.kernel_name(notebook)
        self.kernel = Kernel(owner, layout.kernel_slug(self.name))

    def say(self, command: str) -> str:
        """The make command that does something with this notebook."""
        return WHAT_TO_SAY.format(command, self.owner, self.name)

    def look_back(self, parameters: dict) -> bool:
        """Whether the kernel's last version was cut off, so that this command resumes it."""
        status = self.kaggle.kernel_status(self.kernel)
        if status is None:
            return False
        if status[0] not in (*ENDED, "new_script"):
            raise UserError(
                f"{self.kernel} is {status[0]} on Kaggle: {self.kernel.page}. Nothing was started. Follow it: "
                f"{self.say('watch')}; or stop it on its page first."
            )
        files = dict(self.kaggle.output_files(self.kernel))
        if "result.json" in files:
            if self.find_here(files) is None:
                raise UserError(
                    f"{self.kernel} has finished a run that is not in {self.runs} yet. Nothing was started. Bring it "
                    f"here first: {self.say('watch')}"
                )
            return False
        if not holds_run(files) or "resume_from" in parameters:
            return False
        earlier = fetch.read_remote(self.kaggle, files["config.json"])["settings"]
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
        return self.find_here(dict(self.kaggle.output_files(self.kernel)))

    def find_here(self, files: dict[str, str]) -> Path | None:
        """The folder here of the finished run among the files of an output; None where there is none."""
        if "result.json" not in files:
            return None
        return fetch.find_here(fetch.read_remote(self.kaggle, files["result.json"]), self.runs)

    def check_quota(self, hours: float) -> None:
        """Make sure that this week's quota has as many GPU hours."""
        quota = self.kaggle.gpu_hours()
        if quota is None:
            print(f"quota: Kaggle does not tell it; {hours:g} GPU hours asked for", flush=True)
            return
        left, reserved = quota
        running = f", beside {reserved:.1f} that running kernels reserve" if reserved else ""
        if hours > left:
            raise UserError(
                f"the run may take {hours:g} GPU hours, and this week's quota has {left:.1f} left{running}. Nothing "
                f'was uploaded. Give it fewer hours, SET="time_budget_hours={max(left - 0.1, 0.1):.1f}", or wait for '
                f"{'their end or ' if reserved else ''}the new quota."
            )
        print(f"quota: {left:.1f} GPU hours left{running}, {hours:g} asked for", flush=True)

    def build(self, parameters: dict, backbone: str, extra: list[Path], out: Path, resumed: bool) -> None:
        """Build the bundle of this notebook and of `submit`, which reads its output."""
        if resumed:
            parameters = {**parameters, "resume_from": self.kernel.slug}
        sources = [self.kernel.name]
        bundle.build_bundle(
            out, self.owner, self.notebook, parameters, backbone, extra, sources=sources, resumed=resumed
        )

    def start(self, parameters: dict, backbone: str, extra: list[Path], out: Path) -> None:
        """Quota, bundle, data sets, kernel."""
        resumed = self.look_back(parameters)
        self.check_quota(parameters["time_budget_hours"] or kernel_folders.TRAIN_HOURS)
        self.build(parameters, backbone, extra, out, resumed)
        push.push_data_sets(self.kaggle, out, self.owner, layout.library_commit())
        if resumed:
            print(f"{self.kernel} was cut off; its output is attached, and the run is resumed", flush=True)
        self.kernel = self.kaggle.push_kernel(out / "kernels" / self.name, self.kernel)

    def follow(self) -> int:
        """Follow the kernel, download its output, say what came of it; 0 when the run is finished, else 1."""
        status, failure = follow.follow_kernel(self.kaggle, self.kernel)
        if status == "error":
            print(follow.explain_failure(self.kaggle, self.kernel, failure), flush=True)
        files = dict(self.kaggle.output_files(self.kernel))
        if not holds_run(files):
            print(f"{self.kernel}: its output holds no trained model, so nothing was downloaded", flush=True)
            return 1
        if (folder := self.find_here(files)) is not None:
            if self.kernel.version is not None:
                raise UserError(f"{self.kernel}: Kaggle still shows the output of the run in {folder}.")
            print(f"{self.kernel}: its run is here already", flush=True)
        else:
            folder = fetch.fetch_output(self.kaggle, self.kernel, self.runs, self.name)
        self.kaggle.left_there = None
        if "result.json" in files:
            fetch.report_run(folder, self.runs)
            return 0
        print(f"The session was cut off. {describe_progress(folder)}", flush=True)
        print(f"resume it: {self.say('train')}, with the same SET and PRESET", flush=True)
        return 1


def main(argv: list[str] | None = None) -> int:
    """Train, watch or build; 0: the run is finished and here, 1: it is not, 2: something to put right, 130: Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("owner", nargs="?", default="")
    parser.add_argument("notebook", nargs="?", default="")
    parser.add_argument("--preset", default="", metavar="NAME", help="a file of notebooks/params")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of this run")
    parser.add_argument("--backbone", default="", metavar="NAME", help="name or folder; the notebook's own")
    parser.add_argument("--watch", action="store_true", help="start nothing")
    parser.add_argument("--build", action="store_true", help="build the bundle, send nothing")
    parser.add_argument("--bundle", type=Path, default=layout.DIST)
    parser.add_argument("--runs", type=Path, default=fetch.RUNS, metavar="DIR", help="where run folders go")
    arguments = parser.parse_args(argv)
    arguments.notebook = arguments.notebook or (PRESET_NOTEBOOK if arguments.preset else "")

    def command(kaggle: Kaggle) -> int:
        layout.check_owner(arguments.owner)
        given = read_given(arguments.preset, arguments.set)
        notebook = find_notebook(arguments.notebook)
        named = [given[name] for name in BACKBONE_SETTINGS if name in given]
        backbone = arguments.backbone or [*named, layout.OWN_BACKBONE[notebook]][0]
        extra = find_extra(given)
        parameters = read_parameters(notebook, backbone, given, extra)
        training = Training(kaggle, arguments.owner, notebook, arguments.runs)
        if arguments.build:
            training.build(parameters, backbone, extra, arguments.bundle, resumed=False)
            print(f"bundle: {arguments.bundle}; next: make kaggle-rehearsal, or kaggle/README.md", flush=True)
            return 0
        kaggle.sign_in(arguments.owner)
        if not arguments.watch:
            training.start(parameters, backbone, extra, arguments.bundle)
        elif kaggle.kernel_status(training.kernel) is None:
            raise UserError(f"{training.kernel}: nothing was started yet. Start it: {training.say('train')}")
        return training.follow()

    come_back = WHAT_TO_SAY.format("watch", arguments.owner, arguments.notebook)
    name = "bundle" if arguments.build else "watch" if arguments.watch else "train"
    return run_command(f"kaggle-{name}", command, come_back)


if __name__ == "__main__":
    sys.exit(main())
