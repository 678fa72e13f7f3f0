"""What the tests of the folder kaggle/ share: its modules, and a bundle with a tiny backbone."""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kaggle"))

import backbone
import bundle
import check
import kernel_folders
import layout
import machine_copy
import projection
import push
import rehearse
import rows

OWNER = "tester"
__all__ = ["OWNER", "backbone", "build_tiny_bundle", "bundle", "check", "kernel_folders", "layout", "machine_copy",
           "projection", "push", "rehearse", "rows"]  # fmt: skip


def build_tiny_bundle(out: Path, tiny: Path, runs: tuple[str, ...] = ()) -> Path:
    """A bundle with a tiny encoder called "backbone"."""
    source = out.parent / "backbone"
    if not source.exists():
        shutil.copytree(tiny, source)
    return bundle.build_bundle(OWNER, [str(source)], list(runs), [], out)
