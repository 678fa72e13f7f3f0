"""What a bundle consists of: names on Kaggle, the manifest, the commit it was built from.

dist/kaggle/
  manifest.json               SHA-256 and size of every file, versions, commit
  datasets/prefcls-lib/       the library: folder to browse, wheel
  datasets/prefcls-backbones/ one folder a backbone
  datasets/prefcls-runs/      finished runs and their blend.json, if any were given
  datasets/prefcls-extra/     files of extra rows, if a training has any
  kernels/01-deberta-v3-xsmall/  02-.. 03-..   train
  kernels/submit/             predicts with all attached runs
"""

import hashlib
import json
import re
import subprocess
from pathlib import Path

from prefcls_lib.runtime.files import UserError, sha256, write_text

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist" / "kaggle"
LIBRARY, BACKBONES, RUNS, EXTRA = "prefcls-lib", "prefcls-backbones", "prefcls-runs", "prefcls-extra"  # data sets
NOTEBOOKS = ("01_deberta_v3_xsmall", "02_roberta_base", "03_electra_large")
OWN_BACKBONE = dict(zip(NOTEBOOKS, ("deberta-v3-xsmall", "roberta-base", "electra-large"), strict=True))
SUBMIT = "submit"
SOURCES = ("prefcls_lib", "notebooks", "kaggle", "pyproject.toml", "README.md", "LICENSE")  # what a bundle is made of
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def check_owner(owner: str) -> str:
    """A Kaggle user name as it stands in addresses.

    Raises:
        UserError: none was given, or it cannot be one.
    """
    if not owner:
        raise UserError("no OWNER. Add your Kaggle user name to the command, as in: make kaggle-bundle OWNER=me")
    if len(owner) > 50 or not _SLUG.fullmatch(owner):
        raise UserError(
            f"OWNER={owner!r} is no Kaggle user name: small letters, digits and single hyphens. It is the last part of "
            "your profile's address, kaggle.com/NAME."
        )
    return owner


def extra_name(path: Path) -> str:
    """The name of a file of extra rows in its data set, where it lies unpacked."""
    return path.name.removesuffix(".gz")


def kernel_slug(kernel: str) -> str:
    """A kernel's name on Kaggle: "prefcls-" and the name of its folder."""
    return f"prefcls-{kernel}"


def kernel_name(notebook: str) -> str:
    """The kernel folder of a notebook: 01_deberta_v3_xsmall -> 01-deberta-v3-xsmall."""
    return notebook.replace("_", "-")


def list_files(folder: Path) -> list[str]:
    """Every file and link below `folder`, sorted, as paths in it."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())


def describe_files(folder: Path) -> dict[str, dict]:
    """path in `folder` -> its SHA-256 and size."""
    return {name: {"sha256": sha256(folder / name), "size": (folder / name).stat().st_size}
            for name in list_files(folder)}  # fmt: skip


def write_manifest(folder: Path, facts: dict) -> None:
    """Write manifest.json over all other files of the bundle in `folder`."""
    facts = {**facts, "files": describe_files(folder)}
    write_text(folder / "manifest.json", _manifest_text(facts))


def read_manifest(folder: Path) -> dict:
    """Read manifest.json, byte for byte as `write_manifest` wrote it.

    Raises:
        UserError: it is missing or was changed.
    """
    path = folder / "manifest.json"
    try:
        text = path.read_bytes().decode("utf-8")
        facts = json.loads(text)
        facts.pop("sha256")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Build the bundle first: make kaggle-bundle OWNER=me") from None
    except (ValueError, KeyError, AttributeError):
        text, facts = "", {}
    if text != _manifest_text(facts):
        raise UserError(f"{path}: was changed after it was built. Build the bundle again.")
    return facts


def library_commit(root: Path = ROOT) -> str:
    """The commit of the checkout, with "-dirty" where what a bundle is made of differs from it.

    Raises:
        UserError: `root` is no git checkout.
    """
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


def _manifest_text(facts: dict) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return json.dumps({**facts, "sha256": digest}, indent=1, sort_keys=True) + "\n"
