"""A network, a ladder, a blend and a checkpoint that the version before the packages left behind still work.

The archive was made at the last commit of that version, with a tiny encoder.
"""

import json
import tarfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import run_arguments

from prefcls_lib import cli
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.pipeline.folder import read_table
from prefcls_lib.runtime.devices import choose_precision

ARCHIVE = Path(__file__).with_name("earlier_run.tar.xz")


# what the recipe of this encoder had then and has not now: without it, the command is refused and the setting is named
OLD_RECIPE = ("learning_rate=3e-5", "label_smoothing=0.05")


@pytest.fixture
def earlier(tmp_path, monkeypatch) -> Path:
    """The unpacked folder, as working directory: its runs name their files relative to it."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_same_submission(found: Path, expected: Path) -> None:
    """Up to what another processor rounds in another way, and more where it has no bf16."""
    precision = json.loads(Path("network/model/fold0/fold.json").read_text(encoding="utf-8"))["mixed_precision"]
    same = precision == choose_precision("auto", torch.device("cpu"))
    one, two = (read_table(path).set_index("id")[list(LABEL_COLUMNS)] for path in (found, expected))
    pd.testing.assert_frame_equal(one, two, rtol=0, atol=1e-5 if same else 5e-3)


@pytest.mark.parametrize("run", ["network", "ladder"])
def test_run_predicts_its_submission(earlier, run):
    """From the saved models alone."""
    assert cli.main(["predict", "--run", run, "--test", "test.csv", "--out", "again.csv"]) == 0
    assert_same_submission(Path("again.csv"), earlier / run / "submission.csv")


def test_blend_predicts_and_is_fitted_again(earlier):
    """Its submission; and a new blend of its runs has its keys and names."""
    assert cli.main(["predict", "--blend", "blend.json", "--test", "test.csv", "--out", "again.csv"]) == 0
    assert_same_submission(Path("again.csv"), earlier / "blend.csv")
    assert cli.main(["blend", "--runs", "network", "ladder", "--out", "again.json"]) == 0
    before, after = (json.loads(Path(name).read_text(encoding="utf-8")) for name in ("blend.json", "again.json"))
    assert set(after) >= set(before) and after["runs"] == before["runs"]
    assert after["run_log_loss"] == before["run_log_loss"]


def test_checkpoint_resumes_and_ends(earlier, capsys):
    """At the step where it was stopped, with the submission that the earlier version made of it."""
    assert cli.main(run_arguments(Path(), Path("stopped"), "folds=[0]", "num_epochs=2", *OLD_RECIPE)) == 0
    assert "fold0: resumed at step 4" in capsys.readouterr().out
    assert_same_submission(Path("stopped/submission.csv"), earlier / "stopped-then-resumed.csv")


def test_complete_run_is_recognised(earlier, capsys):
    """The same command on a finished run of then changes nothing, with the recipe of then; without it, it says so."""
    assert cli.main(run_arguments(Path(), Path("network"), "folds=[0]")) == 2
    assert "learning_rate" in capsys.readouterr().err
    assert cli.main(run_arguments(Path(), Path("network"), "folds=[0]", *OLD_RECIPE)) == 0
    assert "this run is complete" in capsys.readouterr().out
