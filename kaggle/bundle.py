"""Build what is sent to Kaggle: data sets and kernels, in a folder that appears when it is complete.

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

from prefcls_lib.runtime.files import UserError, read_json, write_json, write_whole

RUN_FILES = ("config.json", "result.json", "submission.csv", "oof.csv", "history.csv")
EPOCH = "946684800"  # SOURCE_DATE_EPOCH of the wheel: 2000-01-01, so that equal sources give equal bytes
ABOUT = {
    layout.LIBRARY: ("apache-2.0", "The library of the prefcls notebooks, to read and to import"),
    layout.RUNS: ("other", "Trained prefcls runs and their blend, for the submit notebook"),
    layout.EXTRA: ("other", "Rows for training beside the competition's, for extra_train"),
}
ABOUT_BACKBONE = ("other", "Encoder and tokenizer for a prefcls notebook, under their authors' licence")


def build_bundle(
    out: Path,
    owner: str,
    notebook: str = "",
    parameters: Mapping[str, object] | None = None,
    backbone: str = "",
    extra: Sequence[Path] = (),
    runs: Sequence[str] = (),
    sources: Sequence[str] = (),
    resumed: bool = False,
) -> None:
    """Build everything into `out`, whole or not at all.

    Args:
        out: the bundle's folder; an older bundle there is replaced.
        owner: Kaggle user name.
        notebook, parameters, backbone: a training notebook, its parameters, and a name or folder; "": no training.
        extra: CSV files of rows for training alone.
        runs: folders of finished runs, and at most one blend.json, whose runs come with it.
        sources: kernels whose outputs `submit` gets; the training kernel, too, if it is `resumed`.
    """
    commit = layout.library_commit()
    run_folders, blend = collect_runs(runs)
    weights = f"prefcls-{layout.backbone_slug(backbone)}" if notebook else ""
    found = backbones.find_source(backbone) if notebook else None

    def write(folder: Path) -> None:
        data_sets, kernels = folder / "datasets", folder / "kernels"
        write_library(data_sets / layout.LIBRARY, commit)
        if notebook:
            backbones.prepare_backbone(backbone, found, data_sets / weights)
        if run_folders:
            write_runs(data_sets / layout.RUNS, run_folders, blend)
        if extra:
            write_extra(data_sets / layout.EXTRA, extra)
        for path in sorted(data_sets.iterdir()):
            describe_data_set(path, owner)
            layout.mark_data_set(path, commit if path.name == layout.LIBRARY else "")
        library = data_sets / layout.LIBRARY
        if notebook:
            given = [library, data_sets / weights, *([data_sets / layout.EXTRA] if extra else [])]
            kernel = kernels / layout.kernel_name(notebook)
            kernel_folders.write_kernel(kernel, owner, notebook, parameters, given, sources if resumed else ())
        given = [library, *([data_sets / layout.RUNS] if run_folders else [])]
        hours = {"time_budget_hours": kernel_folders.SUBMIT_HOURS}
        kernel_folders.write_kernel(kernels / layout.SUBMIT, owner, layout.SUBMIT, hours, given, sources)

    write_whole(out, write)


def write_library(folder: Path, commit: str) -> None:
    """The data set of the library: its folder with the commit, to read and to import, and its wheel, to install."""
    _copy_sources(folder, commit)
    with TemporaryDirectory() as scratch:
        stage = Path(scratch)
        _copy_sources(stage, commit)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copyfile(layout.ROOT / name, stage / name)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
        variables = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH}
        command += ["--wheel-dir", str(folder), str(stage)]
        done = subprocess.run(command, env=variables, umask=0o022, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")


def _copy_sources(folder: Path, commit: str) -> None:
    for name in layout.source_files(layout.ROOT, "prefcls_lib"):
        content, target = (layout.ROOT / name).read_bytes(), folder / name
        if target.suffix == ".gz":  # Kaggle would unpack it
            content, target = gzip.decompress(content), target.with_suffix("")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(0o644)  # whatever this user's umask is
    (folder / "prefcls_lib" / "commit.txt").write_text(commit + "\n", encoding="utf-8")


def collect_runs(items: Sequence[str]) -> tuple[dict[str, Path], dict | None]:
    """Run folders by name, and the blend with those names for its runs."""
    folders, blend = [], None
    for item in map(Path, items):
        if item.suffix == ".json":
            if blend is not None:
                raise UserError(f"RUNS: {item} is a second blend. Name one blend.json at most.")
            blend = read_json(item)
            if not isinstance(blend.get("runs"), list):
                raise UserError(f"RUNS: {item} is no blend. Make one: prefcls blend --runs DIR DIR --out blend.json")
            blended = [(item.parent / run).resolve() for run in blend["runs"]]
            folders += blended
        else:
            folders.append(item.resolve())
    folders = list(dict.fromkeys(folders))
    for folder in folders:
        if not (folder / "result.json").is_file() or not (folder / "model").is_dir():
            raise UserError(f"RUNS: {folder} holds no finished run (result.json, model/). Name finished run folders.")
    named = {layout.check_name(folder).name: folder for folder in folders}
    if len(named) != len(folders):
        raise UserError(f"RUNS: two folders have one name: {', '.join(map(str, folders))}. Rename one.")
    return named, None if blend is None else {**blend, "runs": [folder.name for folder in blended]}


def write_runs(folder: Path, run_folders: Mapping[str, Path], blend: dict | None) -> None:
    """The data set of runs: what predicting and blending need of each, and blend.json."""
    for name, run in run_folders.items():
        files = [file for file in RUN_FILES if (run / file).is_file()]
        for file in [*files, *(f"model/{file}" for file in layout.list_files(run / "model"))]:
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / file, folder / name / file)
    if blend is not None:
        write_json(folder / "blend.json", blend)


def write_extra(folder: Path, files: Sequence[Path]) -> None:
    """The data set of extra rows: each file under its name, unpacked, since Kaggle would unpack it."""
    folder.mkdir(parents=True)
    for path in files:
        content = path.read_bytes()
        name = layout.extra_name(layout.check_name(path))
        (folder / name).write_bytes(gzip.decompress(content) if path.suffix == ".gz" else content)


def describe_data_set(folder: Path, owner: str) -> None:
    """dataset-metadata.json for Kaggle's client."""
    licence, about = ABOUT.get(folder.name, ABOUT_BACKBONE)
    metadata = {
        "id": f"{owner}/{folder.name}",
        "title": folder.name.replace("-", " "),
        "subtitle": about,
        "licenses": [{"name": licence}],
    }
    write_json(folder / layout.METADATA, metadata)
