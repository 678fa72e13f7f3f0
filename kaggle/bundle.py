"""Build what is uploaded to Kaggle: python kaggle/bundle.py OWNER --backbones NAME ... --runs DIR ...

Parts whose inputs did not change since the last build are taken over from it, after their files were compared with
its manifest. Equal inputs give equal bytes. The bundle appears under its name when it is complete and checked.
"""

import argparse
import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import backbone
import check
import kernel_folders
import layout

from prefcls_lib.runtime.files import UserError, read_json, sha256, write_json, write_whole

RUN_FILES = ("config.json", "result.json", "submission.csv", "oof.csv", "valid.csv", "history.csv")
PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]+")  # Kaggle mangles others
EPOCH = "946684800"  # SOURCE_DATE_EPOCH of the wheel: 2000-01-01
LICENCES = {layout.LIBRARY: "apache-2.0", layout.BACKBONES: "other", layout.RUNS: "other",
            layout.EXTRA: "other"}  # fmt: skip
ABOUT = {
    layout.LIBRARY: "The library of the prefcls notebooks, as source and as a wheel",
    layout.BACKBONES: "Encoders and tokenizers that the prefcls notebooks start from",
    layout.RUNS: "Trained prefcls runs and their blend, for the submit notebook",
    layout.EXTRA: "Rows for training beside the competition's, for extra_train",
}


class Bundle:
    """A bundle that is being built in `folder`; parts may be taken over from `old`."""

    def __init__(self, folder: Path, old: Path):
        self.folder = folder
        self.old = old
        self.parts: dict[str, str] = {}
        try:
            self.known = layout.read_manifest(old)
        except UserError:
            self.known = {"parts": {}, "files": {}}

    def add_part(self, name: str, inputs: object, build: Callable[[Path], None]) -> None:
        """Build the part `name` (a folder in the bundle), or take it over where `inputs` are those of the old one."""
        started = time.perf_counter()
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        target, before = self.folder / name, self.old / name
        files = {path: facts for path, facts in self.known["files"].items() if path.startswith(f"{name}/")}
        target.parent.mkdir(parents=True, exist_ok=True)
        same = self.known["parts"].get(name) == digest and before.is_dir()
        if same and layout.describe_files(before) == {path[len(name) + 1 :]: facts for path, facts in files.items()}:
            shutil.copytree(before, target, copy_function=_link)
            verb = "unchanged"
        else:
            build(target)
            verb = "built"
        self.parts[name] = digest
        size = sum(p.stat().st_size for p in target.rglob("*") if p.is_file()) / 1e6
        print(f"{name}: {verb}, {size:.1f} MB, {time.perf_counter() - started:.1f} s", flush=True)


def build_bundle(
    owner: str,
    backbones: list[str],
    runs: list[str],
    wheels: list[str],
    out: Path,
    notebooks: tuple[str, ...] = layout.NOTEBOOKS,
    extra: Sequence[Path] = (),
) -> Path:
    """Build everything into `out`, whole or not at all.

    Args:
        owner: Kaggle user name.
        backbones: names or folders.
        runs: folders of finished runs, and at most one blend.json, whose runs come with it.
        wheels: requirements NAME==VERSION that Kaggle's image lacks.
        out: the bundle's folder; an older bundle there is replaced.
        notebooks: which of the training notebooks get a kernel; with none of them no backbone is needed.
        extra: CSV files of rows for training alone.

    Raises:
        UserError: whatever is wrong with the inputs; what was in `out` stays.
    """
    layout.check_owner(owner)
    if notebooks and not backbones:
        raise UserError('no BACKBONES. Name at least one, for example BACKBONES="deberta-v3-xsmall roberta-base".')
    commit = layout.library_commit()
    run_folders, blend = collect_runs(runs)
    sources = dict(_named(*backbone.source_of(name)) for name in backbones)
    extra = [_named(path.name, path)[1] for path in extra]

    def write(folder: Path) -> None:
        bundle = Bundle(folder, out)
        datasets = folder / "datasets"
        add_library(bundle, commit, wheels)
        for name, source in sources.items():
            inputs = [backbone_inputs(source), version("transformers")]
            bundle.add_part(
                f"datasets/{layout.BACKBONES}/{name}",
                inputs,
                lambda target, name=name, source=source: backbone.prepare_backbone(name, source, target),
            )
        add_runs(bundle, run_folders, blend)
        add_extra(bundle, extra)
        for data_set in sorted(path.name for path in datasets.iterdir()):
            describe_data_set(datasets / data_set, owner)
        write_kernels(folder / "kernels", owner, list(sources), notebooks, bool(run_folders))
        versions = {name: version(name) for name in ("prefcls-lib", "transformers", "tokenizers", "setuptools")}
        facts = {"owner": owner, "commit": commit, "parts": bundle.parts}
        layout.write_manifest(folder, {**facts, "versions": {"python": platform.python_version(), **versions}})
        problems = check.find_problems(folder)
        if problems:
            raise UserError("the bundle breaks rules of Kaggle and was not kept:\n  " + "\n  ".join(problems))

    write_whole(out, write)
    return out


def add_library(bundle: Bundle, commit: str, wheels: list[str]) -> None:
    """The data set of the library: its folder, to read and to import, its wheel, and other wheels that are needed."""
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
        inputs = [layout.describe_files(stage), wheels, version("setuptools")]

        def build(target: Path) -> None:
            _run_pip("wheel", "--no-index", "--no-build-isolation", "--wheel-dir", str(target), str(stage))
            if wheels:
                _run_pip("download", "--only-binary", ":all:", "--dest", str(target), *wheels)
            shutil.copytree(stage / "prefcls_lib", target / "prefcls_lib")

        bundle.add_part(f"datasets/{layout.LIBRARY}", inputs, build)


def backbone_inputs(source: Path) -> dict:
    """SHA-256 of every file directly in a backbone's folder."""
    return {file.name: sha256(file) for file in sorted(source.iterdir()) if file.is_file()}


def collect_runs(items: list[str]) -> tuple[dict[str, Path], dict | None]:
    """Run folders by name, and the blend with those names for its runs.

    Raises:
        UserError: an item is no finished run and no blend.json, or two runs have one name.
    """
    folders, blend = [], None
    for item in map(Path, items):
        if item.suffix == ".json":
            if blend is not None:
                raise UserError(f"RUNS: {item} is a second blend. Name one blend.json at most.")
            blend = read_json(item)
            if not isinstance(blend.get("runs"), list):
                raise UserError(f"RUNS: {item} is no blend. Make one: prefcls blend --runs DIR DIR --out blend.json")
            folders += [(item.parent / run).resolve() for run in blend["runs"]]
            blended = folders[-len(blend["runs"]) :]
        else:
            folders.append(item.resolve())
    folders = list(dict.fromkeys(folders))
    for folder in folders:
        if not (folder / "result.json").is_file() or not (folder / "model").is_dir():
            raise UserError(f"RUNS: {folder} holds no finished run (result.json, model/). Name finished run folders.")
    named = dict(_named(folder.name, folder) for folder in folders)
    if len(named) != len(folders):
        raise UserError(f"RUNS: two folders have one name: {', '.join(map(str, folders))}. Rename one.")
    return named, None if blend is None else {**blend, "runs": [folder.name for folder in blended]}


def add_runs(bundle: Bundle, run_folders: dict[str, Path], blend: dict | None) -> None:
    """The data set of runs: what predicting and blending need of each, and blend.json."""
    for name, folder in run_folders.items():
        files = [f for f in RUN_FILES if (folder / f).is_file()]
        files += [f"model/{f}" for f in layout.list_files(folder / "model")]

        def build(target: Path, folder=folder, files=files) -> None:
            for file in files:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / file, target / file)

        bundle.add_part(f"datasets/{layout.RUNS}/{name}", {f: sha256(folder / f) for f in files}, build)
    if blend is not None:
        write_json(bundle.folder / "datasets" / layout.RUNS / "blend.json", blend)


def add_extra(bundle: Bundle, files: Sequence[Path]) -> None:
    """The data set of extra rows: each file under its name, unpacked, since Kaggle would unpack it."""

    def build(target: Path) -> None:
        target.mkdir(parents=True)
        for path in files:
            content = path.read_bytes()
            packed = path.suffix == ".gz"
            (target / layout.extra_name(path)).write_bytes(gzip.decompress(content) if packed else content)

    if files:
        bundle.add_part(f"datasets/{layout.EXTRA}", {path.name: sha256(path) for path in files}, build)


def write_kernels(folder: Path, owner: str, backbones: list[str], notebooks: tuple[str, ...], has_runs: bool) -> None:
    """The kernels of the notebooks, and `submit`, which reads the runs or, without any, the notebooks' outputs."""
    kernels = []
    for notebook in notebooks:
        parameters, note = kernel_folders.default_parameters(notebook, backbones)
        if note:
            print(note, flush=True)
        name = layout.kernel_name(notebook)
        kernel_folders.write_training(folder / name, owner, notebook, parameters)
        kernels.append(f"{owner}/{layout.kernel_slug(name)}")
    kernel_folders.write_submit(folder / layout.SUBMIT, owner, [] if has_runs else kernels)


def describe_data_set(folder: Path, owner: str) -> None:
    """dataset-metadata.json for Kaggle's client, and a README that is uploaded with the data."""
    about = ABOUT[folder.name]
    metadata = {
        "id": f"{owner}/{folder.name}",
        "title": folder.name.replace("-", " "),
        "subtitle": about,
        "licenses": [{"name": LICENCES[folder.name]}],
    }
    write_json(folder / "dataset-metadata.json", metadata)
    text = f"# {metadata['title']}\n\n{about}.\n"
    if folder.name == layout.BACKBONES:
        text += "\nThe weights are their authors', under the licence on each model's page.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _named(name: str, path: Path) -> tuple[str, Path]:
    if not PLAIN_NAME.fullmatch(name):
        raise UserError(f"{path}: Kaggle would mangle the name {name!r}. Rename it to letters, digits and . _ -")
    return name, path


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _run_pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments[:1], "--quiet", "--no-deps", *arguments[1:]]
    variables = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH}
    done = subprocess.run(command, env=variables, umask=0o022, capture_output=True, text=True)  # bytes of the wheel
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")


def main(argv: list[str] | None = None) -> int:
    """Build a bundle; 0 when it worked, 2 when the user must put something right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("owner", nargs="?", default="")
    parser.add_argument("--backbones", nargs="*", default=list(layout.OWN_BACKBONE.values()), metavar="NAME")
    parser.add_argument("--runs", nargs="*", default=[], metavar="DIR")
    parser.add_argument("--wheels", nargs="*", default=[], metavar="NAME==VERSION")
    parser.add_argument("--out", type=Path, default=layout.DIST)
    arguments = parser.parse_args(argv)
    try:
        out = build_bundle(arguments.owner, arguments.backbones, arguments.runs, arguments.wheels, arguments.out)
    except UserError as error:
        print(f"kaggle-bundle: {error}", file=sys.stderr)
        return 2
    print(f"bundle: {out}; next: make kaggle-rehearsal, then kaggle/README.md", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
