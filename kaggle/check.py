"""Check a bundle: every file against its manifest, and against what an upload spoils: python kaggle/check.py DIR

A rule that only the live site can confirm is marked "assumed" below. The metadata files hold constants that bundle.py
and kernel_folders.py write; the manifest tells when one was changed.
"""

import ast
import json
import re
import sys
import zipfile
from pathlib import Path

import layout

from prefcls_lib.runtime.files import UserError

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")  # unpacked on upload
PICKLES = (".pt", ".pth")  # arrive as folders
PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]+")  # "+", "=" and blanks are mangled
LARGEST_NOTEBOOK = 1_000_000  # bytes, assumed
LARGEST_DATA_SET = 200_000_000_000  # bytes, assumed: the quota of all private data sets together
MOST_TOP_FILES = 50  # files and folders at the top of a data set, assumed
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ABSOLUTE = re.compile(r"(/(?!/)|[A-Za-z]:[\\/]|~/)\S")


def find_problems(folder: Path) -> list[str]:
    """Everything that is wrong with the bundle in `folder`, one line each; none is good."""
    try:
        facts = layout.read_manifest(folder)
    except UserError as error:
        return [str(error)]
    problems = compare_files(folder, facts["files"])
    for path in sorted((folder / "datasets").iterdir() if (folder / "datasets").is_dir() else []):
        problems += [f"datasets/{path.name}: {text}" for text in check_data_set(path)]
    for path in sorted((folder / "kernels").glob("*/*.ipynb")):
        problems += [f"kernels/{path.parent.name}/{path.name}: {text}" for text in check_notebook(path)]
    return problems + check_commit(folder / "datasets" / layout.LIBRARY, facts["commit"])


def compare_files(folder: Path, files: dict[str, dict]) -> list[str]:
    """Files that were changed, are missing or are extra, against the manifest."""
    there = set(layout.list_files(folder)) - {"manifest.json"}
    problems = [f"{name}: is missing" for name in sorted(set(files) - there)]
    problems += [f"{name}: is extra, the manifest does not have it" for name in sorted(there - set(files))]
    for name in sorted(there & set(files)):
        path = folder / name
        if path.is_symlink():
            problems.append(f"{name}: is a symbolic link, which an upload loses")
        elif path.stat().st_size != files[name]["size"] or layout.sha256(path) != files[name]["sha256"]:
            problems.append(f"{name}: was changed after the bundle was built")
    return problems


def check_data_set(folder: Path) -> list[str]:
    """What an upload would refuse or spoil of a data set's files."""
    problems = []
    files = [name for name in layout.list_files(folder) if name != "dataset-metadata.json"]
    for name in files:
        problems += [f"{name}: {text}" for text in check_file(folder / name)]
        bad = [part for part in Path(name).parts if not PLAIN_NAME.fullmatch(part)]
        problems += [f"{name}: the upload mangles {part!r}; use letters, digits and . _ -" for part in bad]
        if "__pycache__" in Path(name).parts:
            problems.append(f"{name}: compiled Python files do not belong in an upload")
    size = sum((folder / name).stat().st_size for name in files if not (folder / name).is_symlink())
    if size > LARGEST_DATA_SET:
        problems.append(f"holds {size / 1e9:.0f} GB; Kaggle takes {LARGEST_DATA_SET / 1e9:.0f}")
    top = {Path(name).parts[0] for name in files}
    if len(top) > MOST_TOP_FILES:
        problems.append(f"has {len(top)} files and folders at its top; Kaggle takes {MOST_TOP_FILES}")
    return problems


def check_file(path: Path) -> list[str]:
    """What an upload would do to one file of a data set."""
    if path.is_symlink():
        return ["is a symbolic link, which an upload loses"]
    suffix = path.suffix.lower()
    if suffix in ARCHIVES or (suffix != ".whl" and zipfile.is_zipfile(path)):
        return ["is an archive; Kaggle unpacks it"]
    if suffix in PICKLES:
        return ["is a torch pickle, which arrives as a folder; use safetensors"]
    with path.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            return ["is a Git-LFS pointer, not the file itself"]
    return []


def check_notebook(path: Path) -> list[str]:
    """What a notebook holds that Kaggle does not take or does not have: size, outputs, absolute paths."""
    problems = []
    if path.stat().st_size > LARGEST_NOTEBOOK:
        problems.append(f"has {path.stat().st_size:,} bytes; Kaggle takes {LARGEST_NOTEBOOK:,}")
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, TypeError):
        return [*problems, "is no notebook"]
    for number, cell in enumerate(cells):
        if cell.get("cell_type") != "code":
            continue
        if cell.get("outputs"):
            problems.append(f"cell {number}: holds outputs")
        source = "".join(cell["source"])
        source = "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            problems.append(f"cell {number}: is no Python")
            continue
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if ABSOLUTE.match(text) and not text.startswith("/kaggle/"):
                problems.append(f"cell {number}: {text!r} is a path of one machine")
    return problems


def check_commit(folder: Path, commit: str) -> list[str]:
    """Whether the library's folder and its wheel both say that they are of the manifest's commit."""
    found = {"prefcls_lib/commit.txt": _read_text(folder / "prefcls_lib" / "commit.txt")}
    for wheel in sorted(folder.glob("prefcls_lib-*.whl")):
        try:
            with zipfile.ZipFile(wheel) as archive:
                found[wheel.name] = archive.read("prefcls_lib/commit.txt").decode()
        except (zipfile.BadZipFile, KeyError):
            found[wheel.name] = ""
    if len(found) != 2:
        return [f"datasets/{folder.name}: must hold one wheel of the library"]
    return [f"datasets/{folder.name}/{name}: is of commit {text.strip() or '?'}, the manifest says {commit}"
            for name, text in found.items() if text.strip() != commit]  # fmt: skip


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def main(arguments: list[str]) -> int:
    """Print every problem; 0 when there is none, 1 otherwise."""
    folder = Path(arguments[0]) if arguments else layout.DIST
    problems = find_problems(folder)
    print("\n".join(problems) or f"{folder}: follows every rule, and every file is as it was built")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
