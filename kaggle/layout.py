"""What is sent to Kaggle: names there, the commit, and the mark by which a kernel knows its data sets.

dist/kaggle/
  datasets/prefcls-lib/           the library
  datasets/prefcls-roberta-base/  one data set for each backbone
  datasets/prefcls-runs/          finished runs and their blend.json
  datasets/prefcls-extra/         files of extra rows
  kernels/02-roberta-base/        trains
  kernels/submit/                 predicts with all attached runs
"""

import hashlib
import re
import subprocess
from pathlib import Path

from prefcls_lib.runtime.files import UserError, sha256, write_text

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist" / "kaggle"
LIBRARY, RUNS, EXTRA = "prefcls-lib", "prefcls-runs", "prefcls-extra"  # data sets
# a training kernel's name, also its notebook's with _ for -, and the backbone that it trains
OWN_BACKBONE = {
    "01-deberta-v3-xsmall": "deberta-v3-xsmall", "02-roberta-base": "roberta-base",
    "03-electra-large": "electra-large",
}  # fmt: skip
SUBMIT = "submit"
CONTENT = "content.txt"  # in every data set: its mark
METADATA = "dataset-metadata.json"  # for Kaggle's client, which does not upload it
SOURCES = ("prefcls_lib", "notebooks", "kaggle")  # folders from which everything that is sent is made
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]+")


def check_owner(owner: str) -> str:
    """The Kaggle user name as it stands in addresses; signing in shows whether it is right."""
    if not owner:
        raise UserError("no OWNER. Add your Kaggle user name to the command, as in: make kaggle-train OWNER=me")
    return owner.lower()


def check_name(path: Path) -> Path:
    """A file or folder whose name an upload leaves as it is."""
    if not _PLAIN_NAME.fullmatch(path.name):
        raise UserError(f"{path}: Kaggle would change the name {path.name!r}. Rename it to letters, digits and . _ -")
    return path


def backbone_slug(name: str) -> str:
    """A backbone's name in a kernel: microsoft/deberta-v3-xsmall -> deberta-v3-xsmall.

    Its data set is called "prefcls-" and this.
    """
    slug = re.sub("[^a-z0-9]+", "-", Path(name).name.lower()).strip("-")
    data_set = f"prefcls-{slug}"
    if not slug or len(data_set) > 50 or data_set in (LIBRARY, RUNS, EXTRA):
        raise UserError(f"backbone {name!r}: its data set cannot be called {data_set!r}. Rename the folder.")
    return slug


def kernel_slug(kernel: str) -> str:
    """A kernel's name on Kaggle: "prefcls-" and the name of its folder."""
    return f"prefcls-{kernel}"


def list_files(folder: Path) -> list[str]:
    """Every file below `folder`, sorted, as paths in it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def mark_data_set(folder: Path, commit: str = "") -> None:
    """Write the mark of a data set: a digest of its files, before it the library's commit."""
    files = [(name, sha256(folder / name)) for name in list_files(folder) if name not in (CONTENT, METADATA)]
    write_text(folder / CONTENT, f"{commit} {hashlib.sha256(repr(files).encode()).hexdigest()}".strip() + "\n")


def read_mark(folder: Path) -> str:
    """The mark of a data set that was built here."""
    return (folder / CONTENT).read_text(encoding="utf-8").strip()


def library_commit(root: Path = ROOT) -> str:
    """The commit of the checkout, with "-dirty" where what is sent differs from it."""
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", *SOURCES)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        raise UserError(f"{root}: the commit cannot be read ({reason.strip()}). Build from a git clone.") from None
    return head + ("-dirty" if changed else "")


def source_files(root: Path, folder: str) -> list[str]:
    """Files of `folder` that git has or would take, sorted, as paths in `root`."""
    names = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", folder).split("\0")
    return sorted({name for name in names if name and (root / name).is_file()})


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
