"""A collapsed encoder is noticed behind a baseline that works, training ends early, and the user is told."""

import time

import numpy as np
import pytest
import torch
from conftest import run_arguments
from test_resume import StopAt
from test_train import fit, make_config, make_model

from prefcls_lib import cli
from prefcls_lib.data.batching import Examples
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.runtime.files import read_json
from prefcls_lib.training import validation
from prefcls_lib.training.checkpoint import Session, Stopped, TrainingState


@pytest.fixture
def collapsed(monkeypatch):
    """The encoder gives one embedding for every side, and is judged 20 rows after the warm-up."""
    monkeypatch.setattr(PreferenceModel, "embed", lambda self, taken, *_: torch.ones(len(taken), 32))
    monkeypatch.setattr(validation, "COLLAPSE_AFTER_ROWS", 20)


def test_judged_after_the_warm_up_and_ten_thousand_rows():
    """Only then a validation flags the encoder; a healthy one between two, here the chosen, starts the count anew."""
    seen, state, config = [], TrainingState(512, planned_steps=1500), make_config(num_epochs=3, warmup_ratio=1 / 15)
    for epoch, reason in ((2.198, "r"), (2.2, "r"), (2.4, ""), (2.6, "r"), (2.8, "r")):
        state.records, state.chosen, lines = [*state.records, {"epoch": epoch}], min(2, len(state.records)), []
        validation.judge_encoder(state, reason, 5000, config, lines.append)
        seen.append((state.flagged, *lines))
    end = f"the encoder had collapsed at two validations in a row; training ended early. {validation.ADVICE}"
    assert seen == [
        (0, "the encoder does not contribute yet after 10,990 rows: r"),
        (1, "the encoder has collapsed after 11,000 rows: r"),
        (0,),
        (1, "the encoder has collapsed after 13,000 rows: r"),
        (2, "the encoder has collapsed after 14,000 rows: r", end),
    ] and state.warning.startswith("it collapsed later; training ended early. ")


def test_training_of_a_collapsed_encoder_ends_early(tiny, collapsed, tmp_path):
    """Not judged at 48 rows, flagged at 96 and 144, and that is the end, also after a stop between the two. Nothing
    ended early where these are the last, and where one step of 16 rows takes the whole time it is told, not judged."""
    for deadline, end in ((np.inf, f"less than 0.01. {validation.ADVICE}"), (time.perf_counter() - 1, "than 0.01")):
        config, session = make_config(num_epochs=2, warmup_ratio=0.0), Session(deadline=deadline)
        assert fit(make_model(tiny, config), config, session=session).warning.endswith(end)
    config = make_config(num_epochs=6)
    result = fit(make_model(tiny, config), config)
    assert (result.history["step"].tolist(), result.planned_steps) == ([3, 6, 9], 18)
    assert result.history["encoder_spread"].max() < 1e-6
    assert result.warning.endswith(f"training ended early. {validation.ADVICE}")
    with pytest.raises(Stopped):
        fit(make_model(tiny, config), config, session=Session(tmp_path / "state", stop=StopAt(7)))
    resumed = fit(make_model(tiny, config), config, session=Session(tmp_path / "state"))
    assert resumed.history["step"].tolist() == [3, 6, 9] and resumed.warning == result.warning


def test_healthy_encoder_does_not_count_as_collapsed(tiny, monkeypatch):
    """The toy signal is learned, so training goes to its end without a warning."""
    monkeypatch.setattr(validation, "COLLAPSE_AFTER_ROWS", 20)
    config = make_config(num_epochs=4, learning_rate=2e-3, head_learning_rate=2e-3)
    result = fit(make_model(tiny, config), config)
    assert result.warning == "" and result.history["step"].iloc[-1] == result.planned_steps
    assert (result.history["encoder_log_loss"] > 0).all() and np.isfinite(result.history["gradient_norm"]).all()


def test_run_with_a_collapsed_encoder_says_so_with_advice(home, tmp_path, collapsed, capsys):
    """result.json, the log and the printed verdict; the submission is in place."""
    out = tmp_path / "run"
    assert cli.main(run_arguments(home, out, "num_epochs=4", "validations_per_epoch=1")) == 0
    said, result = capsys.readouterr().out, read_json(out / "result.json")
    assert [(model["steps"], model["planned_steps"]) for model in result["folds"]] == [(10, 20)]
    warning = result["encoder_warnings"]["fold0"]
    assert warning.endswith(f"training ended early. {validation.ADVICE}")
    assert f"does not contribute: {warning}" in said and "fold0: the encoder had collapsed at two" in said
    assert cli.main(["check-submission", str(out / "submission.csv"), "--test", str(home / "test.csv")]) == 0


def test_verdict_by_hand():
    """Alike for every row, or no better than prior (ln 3) and baseline (ln 2): collapsed. Better than one: healthy."""
    train = Examples([], np.zeros((3, 2), dtype=int), labels=np.array([0, 1, 2]))
    offsets = np.log(np.array([[0.5, 0.25, 0.25]] * 4, dtype=np.float32))

    def judge(spread: float, alone: float, whole: float, offsets: np.ndarray | None = offsets) -> str:
        valid = Examples([], np.zeros((4, 2), dtype=int), labels=np.zeros(4, dtype=int), offsets=offsets)
        record = {"encoder_spread": spread, "encoder_log_loss": alone, "valid_log_loss": whole}
        return validation.why_collapsed(record, train, valid)

    assert "differ by 0.0090 from row to row, which is less than 0.01" in judge(0.009, 0.5, 0.5)
    assert judge(0.05, 1.0980, 0.6925) == (
        "by itself its log loss is 1.0980 (the prior's 1.0986), and the network's is 0.6925 (its baseline's 0.6931); "
        "at least one must be better by more than 0.001"
    )
    assert judge(0.05, 1.09, 0.70) == judge(0.05, 1.10, 0.69) == judge(0.05, 1.10, 1.08, None) == ""
