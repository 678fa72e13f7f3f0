"""The study of averaged weights: which steps are copied, the mean itself, and that training is not changed by it."""

import numpy as np
import pandas as pd
import pytest
import torch

from prefcls_lib.config import RunConfig
from prefcls_lib.data import loading
from prefcls_lib.evaluation import scores
from prefcls_lib.pipeline import steps
from prefcls_lib.pipeline.folder import read_table
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training.loop import Trainer
from report.studies import averaged_weights


@pytest.fixture
def rows_file(tmp_path):
    """The first 90 shipped rows."""
    path = tmp_path / "rows.csv"
    pd.read_csv(loading.sample_path("train"), dtype=str, keep_default_na=False).head(90).to_csv(path, index=False)
    return path


@pytest.fixture
def restored(monkeypatch):
    """The trainer's own methods are back after the test."""
    for name in ("take_step", "result"):
        monkeypatch.setattr(Trainer, name, getattr(Trainer, name))


def test_copies_are_made_in_the_last_half_and_at_the_end():
    """Of eight even parts of 16 and of 57 steps the ends of the last four."""
    assert averaged_weights.copy_steps(16) == [10, 12, 14, 16]
    assert averaged_weights.copy_steps(57) == [36, 43, 50, 57]


def test_the_mean_is_that_of_each_tensor():
    """Floating-point tensors are averaged, a counter is the last one's."""
    copies = [
        {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(1)},
        {"w": torch.tensor([3.0, 6.0]), "n": torch.tensor(5)},
    ]
    mean = averaged_weights.mean_weights(copies)
    assert mean["w"].tolist() == [2.0, 4.0]
    assert mean["n"].item() == 5


def test_the_run_is_as_always_and_its_last_copy_is_its_prediction(
    tiny, tmp_path, rows_file, monkeypatch, restored, capsys
):
    """ "1" is oof.csv; the mean of four predicts something else; the table has their log losses; a stop is noticed."""
    arguments = ["averaged", str(rows_file), "--out", str(tmp_path), "--set", f"backbone={tiny}"]
    arguments += ["--set", "max_length=32", "--set", "batch_size=8", "--set", "num_folds=3", "--set", "folds=[0,2]"]
    monkeypatch.setattr("sys.argv", arguments)
    averaged_weights.main()
    run = next(tmp_path.glob("*/averaged")).parent
    labels, _, probs = averaged_weights.read_probs(run)
    oof = read_table(run / "oof.csv").sort_values("fold", kind="stable")
    assert np.allclose(probs["1"], oof[["winner_model_a", "winner_model_b", "winner_tie"]], atol=1e-6)
    assert np.abs(probs["4"] - probs["1"]).max() > 1e-6
    table = averaged_weights.compare_weights(tmp_path)
    assert table["mean"].tolist() == [scores.log_loss(labels, probs[name]) for name in ("2", "3", "4")]
    assert "last weights" in capsys.readouterr().out

    def stopped_before(trainer):
        trainer.copies = trainer.copies[1:]
        return resumed(trainer)

    resumed = Trainer.result
    monkeypatch.setattr(Trainer, "result", stopped_before)
    with pytest.raises(UserError, match="was stopped within its training"):
        steps.run(RunConfig.from_mapping({"train": str(rows_file), "test": "sample", "backbone": str(tiny),
                                                "max_length": 32, "out": str(tmp_path / "again")}))  # fmt: skip
