"""What the tests of the folder kaggle/ share: its modules."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kaggle" / "rehearsal"))
sys.path.insert(0, str(Path(__file__).parents[1] / "kaggle"))

import backbone
import bundle
import client
import first
import follow
import kernel_folders
import layout
import rehearse
import rows
import submit
import train

OWNER = "tester"
__all__ = ["OWNER", "backbone", "bundle", "client", "first", "follow", "kernel_folders", "layout", "rehearse", "rows",
           "submit", "train"]  # fmt: skip
