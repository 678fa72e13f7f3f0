"""Check a bundle against Kaggle's rules, and every file against its manifest: python kaggle/check.py DIR

Kaggle's client checks some of these rules when it uploads; licence names, slug characters, machine_shape and internet
against the competition it does not. A rule that only the live site can confirm is marked "assumed" below.
"""

import ast
import json
import re
import sys
import zipfile
from pathlib import Path

import layout

from prefcls_lib.runtime.files import UserError

LICENCES = (
    "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0",
    "CC-BY-ND-4.0", "CC-BY-NC-ND-4.0", "GPL-2.0", "GPL-3.0", "LGPL-3.0", "AGPL-3.0", "FDL-1.3", "apache-2.0",
    "ODbL-1.0", "DbCL-1.0", "PDDL", "ODC-BY-1.0", "CDLA-Permissive-1.0", "CDLA-Sharing-1.0",
    "US-Government-Works", "copyright-authors", "other", "unknown",
)  # fmt: skip
MACHINES = ("NvidiaTeslaT4",)  # the P100 is retired
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
    data_sets = {f"{facts['owner']}/{path.name}" for path in (folder / "datasets").glob("*")}
    for path in sorted((folder / "kernels").glob("*")):
        problems += [f"kernels/{path.name}: {text}" for text in check_kernel(path, facts["owner"], data_sets)]
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
    """What Kaggle would refuse or spoil of a data set's metadata and files."""
    metadata, problems = _read_metadata(folder / "dataset-metadata.json")
    slug = str(metadata.get("id", "")).rpartition("/")[2]
    title, subtitle = str(metadata.get("title", "")), metadata.get("subtitle")
    if not _is_id(metadata.get("id")) or not layout.is_slug(slug, 6, 50):
        problems.append(f"id {metadata.get('id')!r} is not OWNER/SLUG, slug of 6 to 50 small letters, digits, hyphens")
    if not 6 <= len(title) <= 50:
        problems.append(f"title {title!r} has {len(title)} characters; 6 to 50 are allowed")
    if subtitle is not None and not 20 <= len(str(subtitle)) <= 80:
        problems.append(f"subtitle has {len(str(subtitle))} characters; 20 to 80 are allowed")
    licences = metadata.get("licenses")
    names = [entry.get("name") for entry in licences] if isinstance(licences, list) else []
    if len(names) != 1 or names[0] not in LICENCES:
        problems.append(f"licenses {names} must be exactly one name that Kaggle knows, such as apache-2.0 or other")
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


def check_kernel(folder: Path, owner: str, data_sets: set[str]) -> list[str]:
    """What Kaggle would refuse, or run in another way than meant, of a kernel folder."""
    metadata, problems = _read_metadata(folder / "kernel-metadata.json")
    kernel_id, title = metadata.get("id"), str(metadata.get("title", ""))
    slug = str(kernel_id).rpartition("/")[2]
    if not _is_id(kernel_id) or not layout.is_slug(slug):
        problems.append(f"id {kernel_id!r} is not OWNER/SLUG, slug of 5 to 50 small letters, digits, hyphens")
    if len(title) < 5 or layout.slugify(title) != slug:
        problems.append(f"title {title!r} has under 5 characters or does not give the address {slug!r}")
    wanted = {"language": "python", "kernel_type": "notebook", "is_private": True}
    for key, value in wanted.items():
        if metadata.get(key) != value:
            problems.append(f"{key} is {metadata.get(key)!r}; it must be {value!r}")
    if metadata.get("machine_shape") not in MACHINES:
        problems.append(f"machine_shape is {metadata.get('machine_shape')!r}; choose {' or '.join(MACHINES)}")
    problems += [
        f"{key} is deprecated; machine_shape chooses" for key in ("enable_gpu", "enable_tpu") if key in metadata
    ]
    if metadata.get("enable_internet") is not False:
        problems.append("enable_internet must be false: the client's default is true, and the competition forbids it")
    for key in ("competition_sources", "dataset_sources", "kernel_sources", "model_sources"):
        if not isinstance(metadata.get(key, []), list):
            problems.append(f"{key} must be a list")
            metadata[key] = []
    for source in [*metadata.get("dataset_sources", []), *metadata.get("kernel_sources", [])]:
        if not _is_id(source):
            problems.append(f"source {source!r} is not OWNER/SLUG")
    for source in metadata.get("dataset_sources", []):
        if str(source).startswith(f"{owner}/") and source not in data_sets:
            problems.append(f"source {source!r} is not in this bundle")
    for source in metadata.get("model_sources", []):
        if len(str(source).split("/")) != 5 or not str(source).split("/")[-1].isdigit():
            problems.append(f"model source {source!r} is not OWNER/MODEL/FRAMEWORK/VARIATION/VERSION")
    code = folder / str(metadata.get("code_file", ""))
    if code.suffix != ".ipynb" or not code.is_file():
        return [*problems, f"code_file {metadata.get('code_file')!r} is no notebook in this folder"]
    return problems + [f"{code.name}: {text}" for text in check_notebook(code)]


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


def _is_id(text: object) -> bool:
    parts = str(text).split("/")
    return len(parts) == 2 and layout.is_slug(parts[0], 1) and layout.is_slug(parts[1])


def _read_metadata(path: Path) -> tuple[dict, list[str]]:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}, [f"{path.name} is missing or no JSON"]
    return (metadata, []) if isinstance(metadata, dict) else ({}, [f"{path.name} must hold one JSON object"])


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
