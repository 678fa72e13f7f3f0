"""Build what is sent to Kaggle, data sets and kernels, in a folder that appears when it is complete; and upload it.

Equal inputs give equal bytes, so that a data set is uploaded again only where something changed.
"""

import gzip
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import backbone as backbones
import kernel_folders
import layout
from client import Kaggle
from follow import wait_for

from prefcls_lib.ensemble.blend import read_blend
from prefcls_lib.runtime.files import UserError, read_json, write_json, write_whole

RUN_FILES = ("config.json", "result.json", "submission.csv", "oof.csv", "history.csv")
EPOCH = "946684800"  # SOURCE_DATE_EPOCH of the wheel: 2000-01-01, so that equal sources give equal bytes


def build_bundle(
    owner: str,
    notebook: str = "",
    parameters: Mapping[str, object] | None = None,
    backbone: str = "",
    extra: Mapping[str, Path] | None = None,
    runs: Sequence[str] = (),
    sources: Sequence[str] = (),
) -> None:
    """Build everything into layout.DIST, whole or not at all; an older bundle there is replaced.

    Args:
        owner: Kaggle user name.
        notebook, parameters, backbone: a training kernel, its parameters, and a name or folder; "": no training.
        extra: CSV files of rows for training alone, by their names there.
        runs: folders of finished runs, and at most one blend.json, whose runs come with it.
        sources: kernels whose outputs `submit` gets; beside a training kernel that kernel.
    """
    commit = layout.library_commit()
    run_folders, blend = collect_runs(runs)
    weights = f"prefcls-{layout.backbone_slug(backbone)}" if notebook else ""
    found = backbones.find_source(backbone) if notebook else None
    with write_whole(layout.DIST) as folder:
        data_sets, kernels = folder / "datasets", folder / "kernels"
        library = data_sets / layout.LIBRARY
        write_library(library, commit)
        if notebook:
            backbones.prepare_backbone(backbone, found, data_sets / weights)
        if run_folders:
            write_runs(data_sets / layout.RUNS, run_folders, blend)
        if extra:
            write_extra(data_sets / layout.EXTRA, extra)
        for path in sorted(data_sets.iterdir()):
            describe_data_set(path, owner)
            layout.mark_data_set(path, commit if path == library else "")
        outputs = list(sources)
        if notebook:
            slug = layout.kernel_slug(notebook)
            outputs = [f"{owner}/{slug}"]
            given = [library, data_sets / weights, *([data_sets / layout.EXTRA] if extra else [])]
            resumed = outputs if parameters.get("resume_from") == slug else []
            kernel_folders.write_kernel(kernels / notebook, owner, parameters, given, resumed)
        given = [library, *([data_sets / layout.RUNS] if run_folders else [])]
        hours = {"time_budget_hours": kernel_folders.SUBMIT_HOURS}
        kernel_folders.write_kernel(kernels / layout.SUBMIT, owner, hours, given, outputs)


def write_library(folder: Path, commit: str) -> None:
    """The data set of the library: its folder with the commit, to read and to import, and its wheel, to install."""
    for name in layout.source_files(layout.ROOT, "prefcls_lib"):
        content, target = (layout.ROOT / name).read_bytes(), folder / name
        if target.suffix == ".gz":  # Kaggle would unpack it
            content, target = gzip.decompress(content), target.with_suffix("")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(0o644)  # whatever this user's umask is
    (folder / "prefcls_lib" / "commit.txt").write_text(commit + "\n", encoding="utf-8")
    with TemporaryDirectory() as scratch:
        shutil.copytree(folder, scratch, dirs_exist_ok=True)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copyfile(layout.ROOT / name, Path(scratch) / name)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
        command += ["--wheel-dir", str(folder), scratch]
        variables = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH}
        done = subprocess.run(command, env=variables, umask=0o022, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")


def collect_runs(items: Sequence[str]) -> tuple[dict[str, Path], dict | None]:
    """Run folders by name, and the blend with those names for its runs."""
    folders, blend = [], None
    for item in map(Path, items):
        if item.suffix != ".json":
            folders.append(item.resolve())
        elif blend is None:
            blended, fitted = read_blend(item)
            blend = {"runs": [folder.resolve().name for folder in blended], **fitted.to_dict()}
            folders += [folder.resolve() for folder in blended]
        else:
            raise UserError(f"RUNS: {item} is a second blend. Name one blend.json at most.")
    folders = list(dict.fromkeys(folders))
    for folder in folders:
        if not (folder / "result.json").is_file() or not (folder / "model").is_dir():
            raise UserError(f"RUNS: {folder} holds no finished run (result.json, model/). Name finished run folders.")
    named = {layout.check_name(folder).name: folder for folder in folders}
    if len(named) != len(folders):
        raise UserError(f"RUNS: two folders have one name: {', '.join(map(str, folders))}. Rename one.")
    return named, blend


def write_runs(folder: Path, run_folders: Mapping[str, Path], blend: dict | None) -> None:
    """The data set of runs: what predicting and blending need of each, and blend.json."""
    for name, run in run_folders.items():
        files = [file for file in RUN_FILES if (run / file).is_file()]
        for file in [*files, *(f"model/{file}" for file in layout.list_files(run / "model"))]:
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / file, folder / name / file)
    if blend is not None:
        write_json(folder / "blend.json", blend)


def write_extra(folder: Path, files: Mapping[str, Path]) -> None:
    """The data set of extra rows: each file under its name, unpacked, since Kaggle would unpack it."""
    folder.mkdir(parents=True)
    for name, path in files.items():
        content = layout.check_name(path).read_bytes()
        (folder / name).write_bytes(gzip.decompress(content) if path.suffix == ".gz" else content)


def describe_data_set(folder: Path, owner: str) -> None:
    """dataset-metadata.json for Kaggle's client."""
    name, licence = folder.name, "apache-2.0" if folder.name == layout.LIBRARY else "other"
    metadata = {"id": f"{owner}/{name}", "title": name.replace("-", " "), "licenses": [{"name": licence}]}
    write_json(folder / layout.METADATA, metadata)


def push_data_sets(kaggle: Kaggle, owner: str) -> None:
    """Create the data sets of the bundle, or add a version where their content is not what was sent from here last.

    Waits until Kaggle has unpacked the versions that were sent. What was sent is noted beside the bundle; a version
    that fails is forgotten, so that the next try sends it again.
    """
    record = layout.DIST.with_name("kaggle-pushed.json")
    pushed = read_json(record) if record.is_file() else {}
    names = []
    for folder in sorted((layout.DIST / "datasets").iterdir()):
        name, mark = f"{owner}/{folder.name}", layout.read_mark(folder)
        state, version = kaggle.data_set_state(name)
        sent = pushed.get(name)
        if state not in (None, "deleted", "failed") and sent and sent["mark"] == mark and version <= sent["version"]:
            print(f"{name}: unchanged since it was sent", flush=True)
        else:
            size = sum((folder / file).stat().st_size for file in layout.list_files(folder))
            print(f"{name}: uploading {size / 1e6:.0f} MB", flush=True)
            kaggle.upload_data_set(folder, name, None if state in (None, "deleted") else mark)
            pushed[name] = {"mark": mark, "version": version + 1}
            write_json(record, pushed)
        names.append(name)
    for name in names:
        try:
            wait_for_version(kaggle, name, pushed[name]["version"])
        except UserError as error:
            del pushed[name]
            write_json(record, pushed)
            raise UserError(f"{error} Run the same command again: it is sent anew.") from None


def wait_for_version(kaggle: Kaggle, name: str, wanted: int) -> None:
    """Wait until Kaggle has unpacked a data set's version."""

    def look() -> str:
        state, version = kaggle.data_set_state(name)
        waits = state == "ready" and version < wanted
        return f"version {version} is ready, {wanted} is not yet" if waits else state or "not there"

    if wait_for(f"data set {name}, version {wanted}", look, ("ready", "failed")) == "failed":
        raise UserError(f"data set {name}: Kaggle could not unpack it.")
