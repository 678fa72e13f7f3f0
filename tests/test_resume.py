"""Runs that are killed, stopped or out of time, and what becomes of them."""

import itertools
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TWO_FOLDS, read_tree, run_arguments, run_small
from test_train import LEARNS, assert_same_weights, fit, make_config, make_examples, make_model

from prefcls_lib import cli
from prefcls_lib.data.batching import TokenCount
from prefcls_lib.doctor import capacity
from prefcls_lib.pipeline.folder import earlier_run
from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training import loop, optim, step, validation
from prefcls_lib.training.checkpoint import Session, Stopped, TrainingState, load_checkpoint, save_checkpoint


class StopAt(threading.Event):
    """An event that is set once it was asked `step` times: fit asks after every step."""

    def __init__(self, step: int):
        super().__init__()
        self.left = step

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


def stop(tiny, config, folder: Path, step: int, **given) -> None:
    """Train a new model, or resume, and stop after so many steps."""
    with pytest.raises(Stopped):
        fit(make_model(tiny, config), config, session=Session(folder, stop=StopAt(step)), **given)


@pytest.mark.parametrize(("precision", "stops"), [("no", (1, 5)), ("bf16", (3,))])
def test_stopped_anywhere_and_resumed_ends_the_same(tiny, tmp_path, monkeypatch, capsys, precision, stops):
    """Weights, history and predictions to the bit, with dropout and two stops; a bar starts at its session's step."""
    bars, make = [], loop.progress_bar
    monkeypatch.setattr(loop, "progress_bar", lambda *given: bars.append(make(*given)) or bars[-1])
    config = make_config(num_epochs=3, dropout=0.1, learning_rate=1e-3, mixed_precision=precision)
    whole = make_model(tiny, config)
    expected = fit(whole, config)
    for first in stops:
        stop(tiny, config, tmp_path / "state", first)
        stop(tiny, config, tmp_path / "state", 2)
        other_seed = replace(config, seed=99)  # the random state comes from the checkpoint
        model = make_model(tiny, other_seed)
        torch.manual_seed(99)
        result = fit(model, config, session=Session(tmp_path / "state"))
        said = capsys.readouterr().out
        assert said.index("fold: starts at step 0") < said.index(f"fold: resumed at step {first + 2}")
        steps = [0, first, first + 2, bars[0].total]
        assert [(bar.initial, bar.n) for bar in bars[-3:]] == list(itertools.pairwise(steps))
        assert_same_weights(model, whole)
        np.testing.assert_array_equal(result.valid_probs, expected.valid_probs)
        columns = ["step", "epoch", "train_log_loss", "valid_log_loss", "learning_rate"]
        assert result.history[columns].equals(expected.history[columns])
        assert result.tokens == expected.tokens
        shutil.rmtree(tmp_path / "state")


def test_best_weights_survive_a_stop(tiny, tmp_path, monkeypatch):
    """The best step lies before the stop; its weights are in the checkpoint."""
    monkeypatch.setattr(validation, "MIN_ROWS_TO_SELECT", 1)
    config = make_config(num_epochs=4, **LEARNS)
    valid = make_examples(12, 2)
    given = {"valid": replace(valid, labels=(valid.labels + 1) % 3)}  # what is learned makes them worse
    whole, model = make_model(tiny, config), make_model(tiny, config)
    expected = fit(whole, config, **given)
    stop(tiny, config, tmp_path / "state", 11, **given)
    assert fit(model, config, session=Session(tmp_path / "state"), **given).chosen == expected.chosen < 3
    assert_same_weights(model, whole)


def test_resumed_after_its_last_step(tiny, tmp_path, monkeypatch):
    """Killed before the model is saved: nothing is trained again."""
    config = make_config()
    expected = fit(make_model(tiny, config), config, session=Session(tmp_path / "state"))
    monkeypatch.setattr(loop, "train_step", None)
    result = fit(make_model(tiny, config), config, session=Session(tmp_path / "state"))
    np.testing.assert_array_equal(result.valid_probs, expected.valid_probs)
    assert (result.tokens, result.valid_tokens) == (expected.tokens, expected.valid_tokens)


@pytest.mark.parametrize("index", [0, 1])
def test_checkpoint_holds_the_random_state_of_its_own_gpu(tiny, tmp_path, monkeypatch, index):
    """Of two GPUs the one of the process that saves; beside it the weights, however they lie in memory."""
    restored = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([10 + device.index]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append((int(state), device.index)))
    model = make_model(tiny, make_config())
    optimizer = optim.make_optimizer(model, make_config(), torch.device("cpu"))
    given = (model, optimizer, SimpleNamespace(device=torch.device("cuda", index), scaler=None, is_main_process=True))
    state = TrainingState(8192, best_weights={"weight": torch.ones(2, 3).T})
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / ".tmp-weights-5.safetensors").touch()  # of a process that was killed
    save_checkpoint(tmp_path / "state", state, *given)
    assert load_checkpoint(tmp_path / "state", *given).best_weights["weight"].tolist() == [[1, 1]] * 3
    assert restored == [(10 + index, index)]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["state.pt", "weights-0.safetensors"]


@pytest.mark.parametrize(("min_rows", "bytes_each"), [(1, 16), (2000, 12)])
def test_checkpoint_has_so_many_bytes_a_parameter(tiny, tmp_path, monkeypatch, min_rows, bytes_each):
    """fp32 weights and two moments, with enough validation rows the best weights too; two of those are planned for."""
    monkeypatch.setattr(validation, "MIN_ROWS_TO_SELECT", min_rows)
    config = make_config(num_epochs=1)
    model = make_model(tiny, config)
    model.encoder.resize_token_embeddings(20_000, mean_resizing=False)  # large beside the files' headers
    fit(model, config, session=Session(tmp_path / "state"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    written = sum(path.stat().st_size for path in (tmp_path / "state").iterdir())
    assert bytes_each * parameters < written < 1.02 * bytes_each * parameters
    encoder = model.encoder.config
    assert capacity.disk_bytes(encoder, 1, 1) == 2 * 16 * capacity.count_parameters(encoder)


def test_steps_without_finite_gradients_are_left_out_and_counted(tiny, monkeypatch):
    """Weights stay finite, the history counts them, and has no training loss where all are; 20 in a row end the run."""
    config, real = make_config(), step.accumulate_gradients
    bad = iter([False, True, False, True, False, False])

    def overflow(model, *rest):
        result = real(model, *rest)
        if next(bad, True):
            model.head.output.bias.grad.fill_(torch.inf)
        return result

    monkeypatch.setattr(step, "accumulate_gradients", overflow)
    model = make_model(tiny, config)
    assert fit(model, config).history["skipped_steps"].tolist() == [1, 2]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    history = fit(make_model(tiny, config), config).history  # none of its six steps is taken
    assert history["skipped_steps"].tolist() == [3, 6]
    assert history["train_log_loss"].isna().all()
    assert history["valid_log_loss"].nunique() == 1
    long = replace(config, num_epochs=1, batch_size=2)
    with pytest.raises(UserError, match="20 steps in a row"):
        fit(make_model(tiny, long), long)


# --- a time budget


def test_position_under_a_time_budget_by_hand(monkeypatch):
    """100 steps in 1,000 s, 60 of them for saving. Two slow steps at first do not tell the pace. Then 0.1 s a token,
    0.04 s without the backward pass, reserve 40 s for 1,000 tokens; 20 s of these are a validation, for which there is
    time while 40 s are left, and at the end."""
    now = [50.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def take_step(clock: loop.Clock, state: TrainingState, seconds: float = 10) -> tuple[float, bool]:
        now[0] += seconds
        state.tokens += TokenCount(100, 128)
        stopping, has_time = clock.count_step(state, now[0] - seconds, make_accelerator("no"))
        return pytest.approx(state.position), has_time and not stopping

    clock, state = loop.Clock(Session(deadline=1050.0, tokens_to_predict=500), 500), TrainingState(512, 100)
    found = [take_step(clock, state, seconds) for seconds in (50, 50, 10)]
    assert found == [(100 * share, True) for share in (50 / 940, 100 / 940, 1 - 840 / 940 * 790 / 800)]
    for moment, has_time in ((859, True), (861, False), (939, True)):
        now[0] = 50 + moment - 10
        assert take_step(clock, state)[1] == has_time
    assert (state.position, state.step, state.step_seconds) == (100, 6, 140)
    state = TrainingState(512, 100, step=40, position=40)  # resumed with 500 s left: 60 more steps need 600
    assert take_step(loop.Clock(Session(deadline=now[0] + 500), 0), state) == (40 + 60 * 10 / (500 - 50), True)
    for session in (Session(), Session(deadline=now[0] + 5000)):
        clock, state = loop.Clock(session, 200), TrainingState(512, 100)
        assert [take_step(clock, state) for _ in range(3)] == [(1, True), (2, True), (3, True)]


def test_time_budget_cuts_the_steps_and_not_the_course_of_the_rate(tiny, monkeypatch):
    """A step takes a second, the first one ten, a validation 4: 109 in all, and 40 for test rows. 1.5 times the time:
    nearly all steps are done. About half of it without test rows: the rate ends near zero, in time."""
    now, config = [0], make_config(num_epochs=5, batch_size=4, validations_per_epoch=2, **LEARNS)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: sum(now)))
    train, paces = make_examples(48, 1), itertools.chain([10], itertools.repeat(1))
    monkeypatch.setattr(loop, "train_step", lambda *given: now.append(next(paces)) or step.train_step(*given))
    monkeypatch.setattr(loop, "validate", lambda *given: now.append(4) or validation.validate(*given))
    session = Session(deadline=1.5 * 149, tokens_to_predict=10 * int(train.lengths.sum()))
    result = fit(make_model(tiny, config), config, session=session, valid=train)
    assert result.history["step"].iloc[-1] >= 0.95 * result.planned_steps == 0.95 * 60
    for budget in (50, 60, 70):
        session = Session(deadline=sum(now) + budget)
        result = fit(make_model(tiny, config), config, session=session, valid=train)
        assert sum(now) <= session.deadline
        assert 0.2 * 60 < result.history["step"].iloc[-1] < 0.6 * 60
        assert result.history["learning_rate"].iloc[-1] < 0.05 * config.learning_rate
        assert result.history["valid_log_loss"].iloc[-1] < result.history["valid_log_loss"].iloc[0]


def test_run_out_of_time_ends_with_a_checked_submission(home, tmp_path):
    """An hour's work in a budget of 4 seconds: fewer steps, all the files; the budget is a free setting."""
    out, settings = tmp_path / "run", ("num_epochs=1000", "validations_per_epoch=1")
    (model,) = run_small(home, out, *settings, "time_budget_hours=0.001")["folds"]
    assert 0 < model["steps"] < model["planned_steps"] == 5000
    assert cli.main(["check-submission", str(out / "submission.csv"), "--test", str(home / "test.csv")]) == 0
    before = read_tree(out)
    run_small(home, out, *settings, "time_budget_hours=5")
    assert read_tree(out) == before


@pytest.mark.parametrize("mount", ["notebooks/me/prefcls-02", "prefcls-02", "datasets/me/prefcls-02"])
def test_earlier_session_is_found_by_its_name(tmp_path, monkeypatch, mount):
    """The name of an attached output is enough, wherever it is mounted; a run that is in the folder comes first."""
    monkeypatch.setenv("PREFCLS_INPUT_ROOT", str(tmp_path))
    earlier, here = tmp_path / mount, tmp_path / "here"
    for folder in (earlier, here):
        folder.mkdir(parents=True)
    (earlier / "config.json").write_text("{}")
    assert earlier_run(here, "prefcls-02") == earlier_run(here, str(earlier)) == earlier
    with pytest.raises(UserError, match="resume_from='prefcls-03'"):
        earlier_run(here, "prefcls-03")
    (here / "config.json").write_text("{}")
    assert earlier_run(here, "prefcls-02") == here


def test_broken_checkpoint_is_named(home, finished_run, tmp_path, prefcls):
    """One message with the folder and the way out; nothing is trained over it."""
    state = tmp_path / "checkpoint" / "fold0"
    state.mkdir(parents=True)
    (state / "state.pt").write_bytes(b"cut off")
    shutil.copy(finished_run / "config.json", tmp_path)
    code, _, error = prefcls(*run_arguments(home, tmp_path, *TWO_FOLDS))
    assert code == 2 and f"{state}: cannot be read" in error and "Delete it" in error
