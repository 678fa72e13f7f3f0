"""Train on Kaggle and bring the run back: make kaggle-train OWNER=me NOTEBOOK=02-roberta-base SET="num_epochs=1"

Or with a preset, a file of notebooks/params: make kaggle-train OWNER=me PRESET=strong

Looks at the quota, builds the bundle, uploads what changed, starts the notebook's kernel, follows it, and downloads its
output into runs/. Run again after a session that was cut off, it resumes the run: the kernel gets its own old output
as an input, and `resume_from`. With --watch (make kaggle-watch) it follows and downloads only; with --build
(make kaggle-bundle) it only builds.
"""

import argparse
import sys
from collections.abc import Collection
from pathlib import Path

import bundle
import follow
import kernel_folders
import layout
from client import ENDED, Kaggle, Kernel, run_command

from prefcls_lib.config import RunConfig, read_settings
from prefcls_lib.pipeline.folder import FREE_SETTINGS
from prefcls_lib.runtime.files import UserError

PRESETS = layout.ROOT / "notebooks" / "params"
PRESET_NOTEBOOK = "01-deberta-v3-xsmall"  # runs a preset where no notebook is named
BACKBONE_SETTINGS = ("init_from", "backbone")  # what must be among the uploaded backbones


def find_notebook(name: str) -> str:
    """A training notebook by its name, 02-roberta-base or 02_roberta_base."""
    wanted = name.replace("_", "-").removesuffix(".ipynb")
    if wanted not in layout.OWN_BACKBONE:
        raise UserError(f"NOTEBOOK={name!r}: choose one of {', '.join(layout.OWN_BACKBONE)}.")
    return wanted


def read_given(preset: str, settings: list[str]) -> dict:
    """The settings that a command names: those of the preset, over them SET."""
    given = read_settings(PRESETS / f"{preset.removesuffix('.yaml')}.yaml") if preset else {}
    for text in settings:
        name, separator, value = text.partition("=")
        if not separator:
            raise UserError(f'SET={text!r}: expected NAME=VALUE, for example SET="num_epochs=1 max_length=384".')
        given[name.strip()] = value
    if "out" in given:
        raise UserError("SET: out cannot be set; the run lies at the top of the kernel's output. Leave it out.")
    return {name: value for name, value in given.items() if (name, value) != ("init_from", "none")}  # none: no preset's


def read_parameters(notebook: str, backbone: str, given: dict, extra: Collection[str]) -> dict:
    """The parameters that a kernel gets: its defaults, over them what is `given`; of their right types.

    The backbone that is uploaded takes the place of the one that is given, and files of extra rows have the names that
    they have in their data set.
    """
    slug = layout.backbone_slug(backbone)
    there = {name: slug for name in BACKBONE_SETTINGS if name in given}
    if extra:
        there["extra_train"] = ",".join(extra)
    parameters = {**kernel_folders.default_parameters(notebook, slug), **given, **there}
    values = RunConfig.from_mapping(parameters, source="SET").to_dict()
    return {name: values[name] for name in parameters}


def find_extra(given: dict) -> dict[str, Path]:
    """The files of extra rows that are uploaded, by their names in the data set, where they lie unpacked."""
    names = RunConfig.from_mapping({"extra_train": given.get("extra_train")}, source="SET").extra_train or ""
    files = [Path(name.strip()) for name in names.split(",") if name.strip()]
    for path in files:
        if not path.is_file():
            raise UserError(f"extra_train={path}: no such file. `prefcls convert` makes one of the public arena sets.")
    extra = {path.name.removesuffix(".gz"): path for path in files}
    if len(extra) < len(files):
        raise UserError(f"extra_train={names}: two files have one name. Rename one.")
    return extra


def holds_run(names: Collection[str]) -> bool:
    """Whether an output has a finished run among its files, or one that can be resumed."""
    return "config.json" in names and any(name.startswith(("model/", "checkpoint/")) for name in names)


def was_cut_off(kaggle: Kaggle, kernel: Kernel, parameters: dict, runs: Path) -> bool:
    """Whether the kernel's last version was cut off, so that this command resumes it."""
    status = kaggle.kernel_status(kernel)
    if status is None:
        return False
    if status[0] not in (*ENDED, "new_script"):
        raise UserError(
            f"{kernel} is {status[0]} on Kaggle: {kernel.page}. Nothing was started. Follow it: "
            f"{kernel.make('watch')}; or stop it on its page first."
        )
    files = kaggle.output_files(kernel)
    places = (runs, runs / "first", runs.parent)  # kaggle-first has a folder of its own in runs/
    if "result.json" in files and follow.find_here(kaggle, files, *places) is None:
        raise UserError(
            f"{kernel} has finished a run that is not in {runs} yet. Nothing was started. Bring it here first: "
            f"{kernel.make('watch')}"
        )
    if "result.json" in files or not holds_run(files) or "resume_from" in parameters:
        return False
    earlier = follow.read_remote(kaggle, files["config.json"])["settings"]
    for name, now in RunConfig.from_mapping(parameters).to_dict().items():
        before = earlier.get(name, now)
        known = now is not None or name in ("init_from", "extra_train")  # else it is of the backbone's recipe
        if name not in FREE_SETTINGS and known and before != now:
            raise UserError(
                f"{kernel} was cut off with {name}={before!r}, this command has {name}={now!r}. Resume it with the "
                'same SET and PRESET, or start from the beginning with SET="resume_from=none ...".'
            )
    return True


def check_quota(kaggle: Kaggle, hours: float) -> None:
    """Make sure that this week's quota has as many GPU hours."""
    quota = kaggle.gpu_hours()
    if quota is None:
        print(f"quota: Kaggle does not tell it; {hours:g} GPU hours asked for", flush=True)
        return
    left, reserved = quota
    running = f", beside {reserved:.1f} that running kernels reserve" if reserved else ""
    if hours > left:
        raise UserError(
            f"the run may take {hours:g} GPU hours, and this week's quota has {left:.1f} left{running}. Nothing was "
            f'uploaded. Give it fewer hours, SET="time_budget_hours={max(left - 0.1, 0.1):.1f}", or wait for '
            f"{'their end or ' if reserved else ''}the new quota."
        )
    print(f"quota: {left:.1f} GPU hours left{running}, {hours:g} asked for", flush=True)


def start(kaggle: Kaggle, kernel: Kernel, runs: Path, parameters: dict, backbone: str, extra: dict) -> Kernel:
    """Quota, bundle, data sets, kernel; returns the kernel with the version that was started."""
    resumed = was_cut_off(kaggle, kernel, parameters, runs)
    check_quota(kaggle, parameters["time_budget_hours"] or kernel_folders.TRAIN_HOURS)
    if resumed:
        print(f"{kernel} was cut off; its output is attached, and the run is resumed", flush=True)
        parameters = {**parameters, "resume_from": kernel.slug}
    bundle.build_bundle(kernel.owner, kernel.name, parameters, backbone, extra)
    bundle.push_data_sets(kaggle, kernel.owner)
    return kaggle.push_kernel(kernel)


def bring_back(kaggle: Kaggle, kernel: Kernel, runs: Path) -> int:
    """Follow a kernel, download its output, say what came of it; 0 when the run is finished, else 1."""
    follow.follow_kernel(kaggle, kernel)
    files = kaggle.output_files(kernel)
    if not holds_run(files):
        print(f"{kernel}: its output holds no trained model, so nothing was downloaded", flush=True)
        return 1
    folder = follow.find_here(kaggle, files, runs)
    if folder is None:
        folder = follow.fetch_output(kaggle, files, runs, kernel.name)
    elif kernel.version is None:
        print(f"{kernel}: its run is here already", flush=True)
    else:
        raise UserError(f"{kernel}: Kaggle still shows the output of the run in {folder}.")
    kaggle.left_there = None
    if "result.json" in files:
        follow.report_run(folder, runs)
        return 0
    done = ", ".join(sorted(path.name for path in folder.glob("model/*"))) or "none"
    print(f"cut off; models done: {done}. Resume it: {kernel.make('train')}, with the same SET and PRESET", flush=True)
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
    parser.add_argument("--runs", type=Path, default=follow.RUNS, metavar="DIR", help="where run folders go")
    arguments = parser.parse_args(argv)
    arguments.notebook = arguments.notebook or (PRESET_NOTEBOOK if arguments.preset else "")

    def command(kaggle: Kaggle) -> int:
        owner, given = layout.check_owner(arguments.owner), read_given(arguments.preset, arguments.set)
        notebook = find_notebook(arguments.notebook)
        named = [given[name] for name in BACKBONE_SETTINGS if name in given]
        backbone = arguments.backbone or [*named, layout.OWN_BACKBONE[notebook]][0]
        extra = find_extra(given)
        parameters = read_parameters(notebook, backbone, given, extra)
        if arguments.build:
            bundle.build_bundle(owner, notebook, parameters, backbone, extra)
            print(f"bundle: {layout.DIST}; next: make kaggle-rehearsal, or kaggle/README.md", flush=True)
            return 0
        kaggle.sign_in(owner)
        kernel = Kernel(owner, notebook)
        if not arguments.watch:
            kernel = start(kaggle, kernel, arguments.runs, parameters, backbone, extra)
        elif kaggle.kernel_status(kernel) is None:
            raise UserError(f"{kernel}: nothing was started yet. Start it: {kernel.make('train')}")
        return bring_back(kaggle, kernel, arguments.runs)

    return run_command(command, Kernel(arguments.owner, arguments.notebook).make("watch"))


if __name__ == "__main__":
    sys.exit(main())
