"""Build what is sent to Kaggle: data sets and kernels, in a folder that appears when it is complete.

Equal inputs give equal bytes, so that a data set is uploaded again only where something changed.
"""

import gzip
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import backbone
import kernel_folders
import layout

from prefcls_lib.runtime.files import UserError, read_json, write_json, write_whole

RUN_FILES = ("config.json", "result.json", "submission.csv", "oof.csv", "history.csv")
EPOCH = "946684800"  # SOURCE_DATE_EPOCH of the wheel: 2000-01-01
ABOUT = {
    layout.LIBRARY: ("apache-2.0", "The library of the prefcls notebooks, as source and as a wheel"),
    layout.RUNS: ("other", "Trained prefcls runs and their blend, for the submit notebook"),
    layout.EXTRA: ("other", "Rows for training beside the competition's, for extra_train"),
}
ABOUT_BACKBONE = ("other", "Encoder and tokenizer for a prefcls notebook, under their authors' licence")


def build_bundle(
    out: Path,
    owner: str,
    training: Mapping[str, Mapping[str, object]],
    submit_sources: Sequence[str] = (),
    backbones: Sequence[str] = (),
    runs: Sequence[str] = (),
    extra: Sequence[Path] = (),
    training_sources: Sequence[str] = (),
) -> None:
    """Build everything into `out`, whole or not at all.

    Args:
        out: the bundle's folder; an older bundle there is replaced.
        owner: Kaggle user name.
        training: the parameters of each training notebook that gets a kernel.
        submit_sources: kernels whose outputs `submit` reads; the data set of runs if there are none.
        backbones: names or folders.
        runs: folders of finished runs, and at most one blend.json, whose runs come with it.
        extra: CSV files of rows for training alone.
        training_sources: kernels whose outputs the training kernels get.
    """
    commit = layout.library_commit()
    run_folders, blend = collect_runs(runs)
    sources = {f"prefcls-{layout.backbone_slug(name)}": (name, backbone.find_source(name)) for name in backbones}

    def write(folder: Path) -> None:
        data_sets = folder / "datasets"
        write_library(data_sets / layout.LIBRARY, commit)
        for data_set, (name, source) in sources.items():
            backbone.prepare_backbone(name, source, data_sets / data_set)
        if run_folders:
            write_runs(data_sets / layout.RUNS, run_folders, blend)
        if extra:
            write_extra(data_sets / layout.EXTRA, extra)
        for path in sorted(data_sets.iterdir()):
            describe_data_set(path, owner)
            layout.mark_data_set(path, commit if path.name == layout.LIBRARY else "")
            size = sum((path / name).stat().st_size for name in layout.list_files(path)) / 1e6
            print(f"{path.name}: {size:.1f} MB", flush=True)
        for notebook, parameters in training.items():
            names = [layout.LIBRARY, f"prefcls-{parameters['backbone']}", *([layout.EXTRA] if extra else [])]
            kernel_folders.write_kernel(
                folder / "kernels" / layout.kernel_name(notebook), owner, notebook, parameters,
                [data_sets / name for name in names], training_sources,
            )  # fmt: skip
        kernel_folders.write_kernel(
            folder / "kernels" / layout.SUBMIT, owner, layout.SUBMIT,
            {"time_budget_hours": kernel_folders.SUBMIT_HOURS},
            [data_sets / name for name in (layout.LIBRARY, *([layout.RUNS] if run_folders else []))], submit_sources,
        )  # fmt: skip

    write_whole(out, write)


def write_library(folder: Path, commit: str) -> None:
    """The data set of the library: its folder, to read and to import, and its wheel."""
    with tempfile.TemporaryDirectory() as scratch:
        stage = Path(scratch) / "stage"
        for name in [*layout.source_files(layout.ROOT, "prefcls_lib"), "pyproject.toml", "README.md", "LICENSE"]:
            content, target = (layout.ROOT / name).read_bytes(), stage / name
            if target.suffix == ".gz":  # Kaggle would unpack it
                content, target = gzip.decompress(content), target.with_suffix("")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        (stage / "prefcls_lib" / "commit.txt").write_text(commit + "\n", encoding="utf-8")
        for path in stage.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # whatever this user's umask is
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
        command += ["--wheel-dir", str(folder), str(stage)]
        variables = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH}
        done = subprocess.run(command, env=variables, umask=0o022, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
        shutil.copytree(stage / "prefcls_lib", folder / "prefcls_lib", ignore=shutil.ignore_patterns("__pycache__"))


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
