"""A collapsed encoder is noticed behind structure features that work, and what follows is the user's choice."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from conftest import run_arguments
from prefcls_lib.training.collapse import Collapsed, why_collapsed
from test_train import make_config, make_examples, make_model

from prefcls_lib import cli
from prefcls_lib.data import loading
from prefcls_lib.data.submission import check_submission
from prefcls_lib.pipeline import folds
from prefcls_lib.pipeline.folder import read_table
from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.training import collapse, loop

COLLAPSES = ("folds=[0]", "learning_rate=0", "head_learning_rate=0", "validations_per_epoch=1")


@pytest.fixture
def early_verdict(monkeypatch):
    """A verdict after 20 training rows."""
    monkeypatch.setattr(collapse, "COLLAPSE_AFTER_ROWS", 20)


def fit(folder, config):
    model = make_model(folder, config)
    examples = make_examples(48, 1, with_features=True)
    return loop.fit(model, examples, make_examples(12, 2, with_features=True), config, make_accelerator("no"), 0)


def test_collapsed_encoder_behind_structure_features_is_seen(tiny, monkeypatch):
    """The encoder gives one embedding for every side; features move the predictions, the spread is 0 all the same."""
    monkeypatch.setattr(loop.PreferenceModel, "embed", lambda self, batch: torch.ones(len(batch.indices), 32))
    monkeypatch.setattr(collapse, "COLLAPSE_AFTER_ROWS", 90)
    history = fit(tiny, make_config(on_collapse="warn")).history
    assert history["encoder_spread"].max() < 1e-6
    assert history["collapsed"].tolist() == [False, True]  # 48 rows seen, then 96


def test_healthy_encoder_does_not_count_as_collapsed(tiny, early_verdict):
    """The toy signal is learned; no verdict of collapse at any validation."""
    config = make_config(num_epochs=4, learning_rate=2e-3, head_learning_rate=2e-3)
    history = fit(tiny, config).history
    assert not history["collapsed"].any()
    assert (history["encoder_log_loss"] > 0).all()
    assert np.isfinite(history["gradient_norm"]).all()


def test_stop_ends_with_the_reason_and_a_submission(home, tmp_path, capsys, early_verdict):
    """Exit code 2; the message has the evidence; the best baseline's submission is in place, not only the prior's."""
    out = tmp_path / "run"
    assert cli.main(run_arguments(home, out, *COLLAPSES, "on_collapse=stop")) == 2
    error = capsys.readouterr().err
    assert "the encoder has collapsed" in error
    assert "learning_rate lower" in error
    table = check_submission(out / "submission.csv", list(loading.read_rows(home / "test.csv", labelled=False)["id"]))
    assert table["winner_tie"].nunique() > 1


def test_restarts_are_bounded(home, tmp_path, capsys, early_verdict):
    """Twice with other settings, then the end."""
    assert cli.main(run_arguments(home, tmp_path / "run", *COLLAPSES, "on_collapse=restart")) == 2
    captured = capsys.readouterr()
    assert captured.out.count("fold0: restart") == 2
    assert captured.err.count("the encoder has collapsed") == 1


def test_warning_continues_and_the_history_has_the_verdict(home, tmp_path, early_verdict):
    """The run ends as usual; history.csv has the verdict."""
    out = tmp_path / "run"
    assert cli.main(run_arguments(home, out, *COLLAPSES, "on_collapse=warn")) == 0
    assert read_table(out / "history.csv")["collapsed"].tolist() == [True]


def test_restart_uses_another_seed_half_the_rate_and_twice_the_warm_up(home, tmp_path, monkeypatch):
    """The first attempt collapses, the second ends; fold.json keeps the record of the first."""
    seen = []
    real = folds.fit

    def collapse_once(model, train_rows, valid, config, *rest):
        seen.append((config.seed, config.learning_rate, config.warmup_ratio))
        if len(seen) == 1:
            raise Collapsed("collapsed", {"step": 3, "encoder_spread": 0.0})
        return real(model, train_rows, valid, config, *rest)

    monkeypatch.setattr(folds, "fit", collapse_once)
    out = tmp_path / "run"
    assert cli.main(run_arguments(home, out, "folds=[0]", "learning_rate=0.001")) == 0
    assert seen == [(42, 0.001, 0.1), (1042, 0.0005, 0.2)]
    fold = json.loads((out / "model" / "fold0" / "fold.json").read_text())
    assert fold["collapsed"] == [{"step": 3, "encoder_spread": 0.0}]
    assert not (out / "checkpoint").exists()


def test_model_is_freed_before_the_next_attempt(home, tmp_path, monkeypatch, early_verdict):
    """Two models and their moments at once may not fit; nothing waits for the garbage collector."""
    kept, alive, real = [], [], folds.new_model

    def new_model(*args):
        alive.append([reference() is not None for reference in kept])
        model = real(*args)
        kept.extend((weakref.ref(model), weakref.ref(model.head.output.weight)))
        return model

    monkeypatch.setattr(folds, "new_model", new_model)
    gc.collect()
    gc.disable()
    try:
        assert cli.main(run_arguments(home, tmp_path / "run", *COLLAPSES, "on_collapse=restart")) == 2
    finally:
        gc.enable()
    assert alive == [[], [False] * 2, [False] * 4]


def test_no_verdict_before_ten_thousand_rows_by_default(tiny, monkeypatch):
    """DeBERTa-v3 does not move for about so many: 96 rows of a collapsed encoder give no verdict."""
    monkeypatch.setattr(loop.PreferenceModel, "embed", lambda self, batch: torch.ones(len(batch.indices), 32))
    history = fit(tiny, make_config()).history
    assert history["encoder_spread"].max() < 1e-6
    assert not history["collapsed"].any()


def test_verdict_by_hand():
    """Alike for every row, or no better than prior and starting baseline: collapsed. Better than one: healthy."""

    def judge(spread: float, alone: float, whole: float, baseline: float | None) -> str:
        record = {"encoder_spread": spread, "encoder_log_loss": alone, "valid_log_loss": whole}
        return why_collapsed(record, prior_log_loss=1.09, baseline_log_loss=baseline)

    assert "differ by 0.0090 from row to row, which is less than 0.01" in judge(0.009, 1.0, 1.0, 1.05)
    reason = judge(0.05, 1.0895, 1.0495, 1.05)
    assert "the network's is 1.0495 (its baseline's 1.0500); at least one must be better by more than 0.001" in reason
    assert judge(0.05, 1.08, 1.06, 1.05) == ""
    assert judge(0.05, 1.10, 1.04, 1.05) == ""
    assert judge(0.05, 1.10, 1.08, None) == ""
