"""Runs that are killed, stopped or out of time, and what becomes of them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import KINDS, run_arguments
from safetensors.torch import load_file
from test_train import make_config, make_examples, make_model

from prefcls_lib import cli
from prefcls_lib.data import loading
from prefcls_lib.data.submission import check_submission
from prefcls_lib.doctor import capacity
from prefcls_lib.pipeline.folder import RunFolder, describe_progress
from prefcls_lib.runtime.devices import make_accelerator, seed_everything
from prefcls_lib.runtime.files import UserError, backup_of, write_whole
from prefcls_lib.training import loop, optim
from prefcls_lib.training import step as steps
from prefcls_lib.training.state import Session, Stopped, TrainingState, load_state, save_state


def fit(model, config, session=None):
    """Train on 48 rows, validate on 12."""
    seed_everything(config.seed)
    accelerator = make_accelerator(config.mixed_precision)
    return loop.fit(model, make_examples(48, 1), make_examples(12, 2), config, accelerator, 0, "fold", session)


class StopAt(threading.Event):
    """An event that is set once it was asked `step` times: fit asks after every step."""

    def __init__(self, step: int):
        super().__init__()
        self.left = step

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_stopped_anywhere_and_resumed_ends_the_same(tiny, tmp_path, capsys, precision):
    """Weights, history and predictions to the bit, with dropout, selection of the best step, and two stops."""
    config = make_config(
        num_epochs=3, dropout=0.1, learning_rate=1e-3, mixed_precision=precision, structure_features=False
    )
    whole = make_model(tiny, config)
    expected = fit(whole, config)
    for first in (1, 3, 5):
        for step in (first, 2):
            model = make_model(tiny, config)
            with pytest.raises(Stopped):
                fit(model, config, Session(tmp_path / "state", stop=StopAt(step)))
        model = make_model(tiny, config)
        seed_everything(99)  # the random state comes from the checkpoint
        accelerator = make_accelerator(config.mixed_precision)
        session = Session(tmp_path / "state")
        result = loop.fit(model, make_examples(48, 1), make_examples(12, 2), config, accelerator, 0, "fold", session)
        assert f"fold: resumed at step {first + 2}" in capsys.readouterr().out
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in whole.state_dict().items())
        np.testing.assert_array_equal(result.valid_probs, expected.valid_probs)
        columns = ["step", "epoch", "train_log_loss", "valid_log_loss", "learning_rate"]
        assert result.history[columns].equals(expected.history[columns])
        assert result.tokens == expected.tokens
        shutil.rmtree(tmp_path / "state")


def test_time_left_of_a_resumed_training_counts_its_own_steps(tiny, tmp_path, monkeypatch):
    """The bar starts at the step of the checkpoint, so that its pace is that of the steps of this session."""
    bars, config = [], make_config(structure_features=False)
    make = loop.progress_bar
    monkeypatch.setattr(loop, "progress_bar", lambda *given: bars.append(make(*given)) or bars[-1])
    with pytest.raises(Stopped):
        fit(make_model(tiny, config), config, Session(tmp_path / "state", stop=StopAt(3)))
    fit(make_model(tiny, config), config, Session(tmp_path / "state"))
    assert [bar.initial for bar in bars] == [0, 3]
    assert [bar.n for bar in bars] == [3, bars[1].total]


def test_best_weights_survive_a_stop(tiny, tmp_path, monkeypatch):
    """The best step lies before the stop; its weights are in the checkpoint."""
    monkeypatch.setattr(loop, "MIN_ROWS_TO_SELECT", 1)
    config = make_config(num_epochs=4, learning_rate=0.02, head_learning_rate=0.02, structure_features=False)
    whole = make_model(tiny, config)
    expected = fit(whole, config)
    with pytest.raises(Stopped):
        fit(make_model(tiny, config), config, Session(tmp_path / "state", stop=StopAt(11)))
    model = make_model(tiny, config)
    assert fit(model, config, Session(tmp_path / "state")).chosen == expected.chosen
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_best_weights_take_their_space_once(tiny, tmp_path, monkeypatch):
    """They are the weights of this step: one file. Later: the file of the checkpoint before. Without links: a copy."""
    config, folder = make_config(structure_features=False), tmp_path / "state"
    model, accelerator = make_model(tiny, config), make_accelerator("no")
    optimizer = optim.make_optimizer(model, config, accelerator.device)
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = TrainingState(9, 512, step=3, records=[{"step": 3}], best=0, best_weights=best)

    def saved_inodes() -> dict[str, int]:
        save_state(folder, state, model, optimizer, accelerator)
        found = load_file(folder / "best.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in state.best_weights.items())
        return {name: (folder / f"{name}.safetensors").stat().st_ino for name in ("model", "best")}

    first = saved_inodes()
    assert first["model"] == first["best"]
    state.step = 4
    model.head.output.bias.data += 1
    second = saved_inodes()
    assert second["best"] == first["best"] != second["model"]
    state.records.append({"step": 4})  # the next best was validated, and the checkpoint at that step was lost
    state.step, state.best = 5, 1
    state.best_weights = {name: tensor + 1 for name, tensor in best.items()}
    saved_inodes()
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no hard links")))
    state.step = 6
    saved_inodes()


def test_only_one_process_logs(tiny, tmp_path, monkeypatch, capsys):
    """The second of two processes resumes, trains and validates without a line."""
    config = make_config(structure_features=False)
    with pytest.raises(Stopped):
        fit(make_model(tiny, config), config, Session(tmp_path / "state", stop=StopAt(2)))
    capsys.readouterr()
    monkeypatch.setattr(loop.Accelerator, "is_main_process", False)
    fit(make_model(tiny, config), config, Session(tmp_path / "state"))
    assert capsys.readouterr().out == ""


def test_resumed_after_its_last_step(tiny, tmp_path, monkeypatch):
    """Killed between the last checkpoint and the saved model: nothing is trained, and the result is the same."""
    config = make_config(structure_features=False)
    expected = fit(make_model(tiny, config), config, Session(tmp_path / "state"))
    monkeypatch.setattr(steps, "train_step", None)
    result = fit(make_model(tiny, config), config, Session(tmp_path / "state"))
    for name in ("valid_probs", "swapped_probs"):
        np.testing.assert_array_equal(getattr(result, name), getattr(expected, name))
    assert (result.tokens, result.valid_tokens) == (expected.tokens, expected.valid_tokens)


def test_checkpoint_holds_the_random_state_of_its_own_gpu(tiny, tmp_path, monkeypatch):
    """On a machine with two GPUs; so does one of an earlier version, which holds those of both, resume on one GPU."""
    states, restored = {0: torch.tensor([10]), 1: torch.tensor([11])}, []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device.index])
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states.values()))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append((int(state), device.index)))
    config = make_config(structure_features=False)
    model, folder = make_model(tiny, config), tmp_path / "state"
    optimizer = optim.make_optimizer(model, config, torch.device("cpu"))
    for index in (0, 1):
        accelerator = SimpleNamespace(device=torch.device("cuda", index), scaler=None)
        save_state(folder, TrainingState(6, 8192), model, optimizer, accelerator)
        del states[1 - index]  # the machine that resumes has the other one no more
        load_state(folder, model, optimizer, accelerator)
        assert restored.pop() == (10 + index, index)
        states = {0: torch.tensor([10]), 1: torch.tensor([11])}
    tensors = torch.load(folder / "state.pt", weights_only=True)
    tensors["random"]["cuda"] = list(states.values())
    torch.save(tensors, folder / "state.pt")
    load_state(folder, model, optimizer, SimpleNamespace(device=torch.device("cuda", 0), scaler=None))
    assert restored == [(10, 0)]


@pytest.mark.parametrize(("min_rows", "bytes_each"), [(1, 16), (2000, 12)])
def test_checkpoint_has_so_many_bytes_a_parameter(tiny, tmp_path, monkeypatch, min_rows, bytes_each):
    """fp32 weights and two moments, with enough validation rows the best weights too; the disk is planned for those."""
    monkeypatch.setattr(loop, "MIN_ROWS_TO_SELECT", min_rows)
    config = make_config(num_epochs=1, structure_features=False)
    model = make_model(tiny, config)
    model.encoder.resize_token_embeddings(20_000, mean_resizing=False)  # large beside the files' headers
    fit(model, config, Session(tmp_path / "state"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    written = sum(path.stat().st_size for path in (tmp_path / "state").iterdir())
    assert bytes_each * parameters < written < 1.02 * bytes_each * parameters
    planned = capacity.state_bytes(model.encoder.config) / capacity.count_parameters(model.encoder.config)
    assert planned == 16 >= bytes_each


def start_run(home: Path, out: Path, *settings: str) -> subprocess.Popen:
    """`prefcls run` of 30 steps as its own process; a checkpoint after every step."""
    arguments = run_arguments(home, out, "folds=[0]", "num_epochs=6", "save_every_minutes=0", *settings)
    return subprocess.Popen(
        [sys.executable, "-m", "prefcls_lib", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_checkpoint(process: subprocess.Popen, out: Path, steps: int) -> None:
    """Until the run has done so many steps of its own, or ended."""
    position = out / "checkpoint" / "fold0" / "position.json"
    first = None
    while process.poll() is None:
        try:
            step = json.loads(position.read_text())["step"]
        except (OSError, ValueError):
            step = 0
        first = step if first is None else first
        if step >= first + steps:
            return
        time.sleep(0.01)


def test_killed_at_random_moments_ends_with_the_same_submission(home, tmp_path):
    """kill -9 three times, wherever it hits; then the bytes of a run that was left alone, and no checkpoint."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    process = start_run(home, alone)
    process.communicate(timeout=120)
    assert process.returncode == 0
    moments = random.Random(7)
    for _ in range(3):
        process = start_run(home, killed)
        wait_for_checkpoint(process, killed, steps=moments.randint(2, 8))
        time.sleep(moments.random() * 0.05)
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    process = start_run(home, killed)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "fold0: resumed at step" in out
    assert (killed / "submission.csv").read_bytes() == (alone / "submission.csv").read_bytes()
    assert not list(killed.glob("checkpoint/*"))


def test_sigterm_saves_and_says_how_to_go_on(home, tmp_path):
    """Exit code 143, the step at hand is done and saved, the prior's submission is in place."""
    out = tmp_path / "run"
    process = start_run(home, out)
    wait_for_checkpoint(process, out, steps=2)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped at step" in error
    assert "run the same command to resume" in error
    assert (out / "checkpoint" / "fold0" / "position.json").is_file()
    assert (out / "submission.csv").is_file()


def test_resume_from_an_attached_run(home, tmp_path, capsys):
    """An earlier session's folder, read-only: it is copied, stays as it was, and the run goes on in the new place."""
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    process = start_run(home, earlier)
    wait_for_checkpoint(process, earlier, steps=3)
    process.terminate()
    process.communicate(timeout=60)
    before = {p: p.read_bytes() for p in earlier.rglob("*") if p.is_file()}
    for path in before:
        path.chmod(0o444)
    arguments = run_arguments(home, out, "folds=[0]", "num_epochs=6", f"resume_from={earlier}")
    assert cli.main(arguments) == 0
    assert "resumed at step" in capsys.readouterr().out
    assert (out / "result.json").is_file()
    assert {p: p.read_bytes() for p in earlier.rglob("*") if p.is_file()} == before
    assert cli.main(run_arguments(home, tmp_path / "new", f"resume_from={tmp_path / 'nowhere'}")) == 2
    assert "resume_from" in capsys.readouterr().err


@pytest.mark.parametrize("mount", ["notebooks/me/prefcls-02", "prefcls-02", "datasets/me/prefcls-02"])
def test_earlier_session_is_found_by_its_name_and_described(tmp_path, monkeypatch, mount):
    """The name of an attached output is enough, wherever it is mounted; the models that are done, and the steps."""
    monkeypatch.setenv("PREFCLS_INPUT_ROOT", str(tmp_path))
    earlier = tmp_path / mount
    for name in ("model/fold0", "checkpoint/fold0-seed1"):
        (earlier / name).mkdir(parents=True)
    (earlier / "config.json").write_text("{}")
    (earlier / "checkpoint/fold0-seed1/position.json").write_text('{"step": 1200, "total_steps": 3232}')
    said = describe_progress("prefcls-02")
    assert said == f"The earlier session in {earlier}: fold0 is done, fold0-seed1 reached step 1,200 of 3,232."
    assert describe_progress(earlier) == said
    RunFolder(tmp_path / "new").copy_from("prefcls-02")
    assert (tmp_path / "new" / "checkpoint/fold0-seed1/position.json").is_file()
    assert "No earlier session" in describe_progress(None)
    with pytest.raises(UserError, match="resume_from='prefcls-03'"):
        describe_progress("prefcls-03")


def test_broken_checkpoint_is_named(home, tmp_path, capsys):
    """One message with the folder and the way out; nothing is trained over it."""
    state = tmp_path / "run" / "checkpoint" / "fold0"
    state.mkdir(parents=True)
    (state / "position.json").write_text("{}")
    (state / "state.pt").write_bytes(b"not torch")
    assert cli.main(run_arguments(home, tmp_path / "run", "folds=[0]")) == 2
    error = capsys.readouterr().err
    assert f"{state}: this checkpoint cannot be read" in error
    assert "Delete it" in error


def test_folder_replaced_between_two_renames_is_found(tmp_path):
    """Killed just there, the older folder lies under its backup name, and nothing else is lost."""
    folder = tmp_path / "state"
    for text in ("one", "two"):

        def write(path: Path, text: str = text) -> None:
            path.mkdir()
            (path / "file").write_text(text)

        write_whole(folder, write)
        assert (folder / "file").read_text() == text
        assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert backup_of(folder).name == ".state.old"


def test_run_out_of_time_ends_with_a_checked_submission(home, tmp_path, capsys):
    """An hour's work (20,000 epochs) in a budget of half a minute: fewer steps, all the files, exit code 0."""
    out = tmp_path / "run"
    settings = ("folds=[0]", "num_epochs=1000", "validations_per_epoch=1", "time_budget_hours=0.007")
    assert cli.main(run_arguments(home, out, *settings)) == 0
    assert "time budget: at" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert result["folds"][0]["steps"] < 5000
    check_submission(out / "submission.csv", list(loading.read_rows(home / "test.csv", labelled=False)["id"]))
    before = (out / "submission.csv").read_bytes()
    assert cli.main(run_arguments(home, out, *settings[:3], "time_budget_hours=5")) == 0  # a free setting
    assert (out / "submission.csv").read_bytes() == before


def test_steps_without_finite_gradients_are_left_out_and_counted(tiny, monkeypatch):
    """Weights stay finite, the history counts them, and has no training loss where all are; 20 in a row end the run."""
    config = make_config(structure_features=False)
    real = steps.train_step
    bad = iter([False, True, False, True, False, False])

    def overflow(model, *rest):
        result = real(model, *rest)
        if next(bad, True):
            model.head.output.bias.grad.fill_(torch.inf)
        return result

    monkeypatch.setattr(steps, "train_step", overflow)
    model = make_model(tiny, config)
    result = fit(model, config)
    assert result.history["skipped_steps"].tolist() == [1, 2]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    history = fit(make_model(tiny, config), config).history  # none of its six steps is taken
    assert history["skipped_steps"].tolist() == [3, 6]
    assert history["train_log_loss"].isna().all()
    assert history["valid_log_loss"].nunique() == 1
    long = replace(config, num_epochs=1, batch_size=2)
    with pytest.raises(UserError, match="20 steps in a row"):
        fit(make_model(tiny, long), long)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_decay_by_hand(kind, backbone_folders):
    """Two layers, decay .5: top layer 1, first .5, all beside them (projection, rel_embeddings, embeddings) .25."""
    config = make_config(learning_rate=0.008, layer_decay=0.5)
    model = make_model(backbone_folders[kind], config)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: g["peak"] for g in optim.parameter_groups(model, config) for p in g["params"]}
    assert set(rates) == set(names.values())
    for name, rate in rates.items():
        if name.startswith("head."):
            assert rate == (optim.WIDE_LEARNING_RATE if "wide" in name else config.head_learning_rate)
        elif "layer.1." in name:
            assert rate == 0.008
        else:
            assert rate == (0.004 if "layer.0." in name else 0.002), name
    expected = {"deberta-v2": "rel_embeddings", "electra": "embeddings_project"}.get(kind, "word_embeddings")
    assert any(expected in name for name in rates)


def test_plateau_by_hand():
    """As ReduceLROnPlateau with patience 1: after the second validation in a row without a new best, a tenth."""
    losses = [1.0, 0.9, 0.95, 0.91, 0.92, 0.93, 0.8]
    found = [optim.plateau_factor(losses[:n]) for n in range(len(losses) + 1)]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, threshold=0.0)
    expected = [1.0]
    for loss in losses:
        scheduler.step(loss)
        expected.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx(expected)
    assert found == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("learning_rate", [1e-3, 0.01])
def test_head_only_phase_moves_the_head_alone(tiny, learning_rate):
    """The encoder is the same to the bit, also where its rate is the head's."""
    rates = {"head_learning_rate": 0.01, "learning_rate": learning_rate}
    config = make_config(head_only_rows=40, structure_features=False, **rates)
    model = make_model(tiny, config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps.fit_head(model, make_examples(48, 1), config, make_accelerator("no"), 0)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("encoder."))
    assert not torch.equal(after["head.output.weight"], before["head.output.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind, backbone_folders):
    """It recomputes activations; after one epoch the weights are those of a run without it."""
    weights = []
    for gradient_checkpointing in (False, True):
        config = make_config(
            num_epochs=1, gradient_checkpointing=gradient_checkpointing, structure_features=False, seed=3
        )
        model = make_model(backbone_folders[kind], config)
        pad_id = model.encoder.config.pad_token_id
        loop.fit(model, make_examples(32, 1), make_examples(9, 2), config, make_accelerator("no"), pad_id)
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-6, rtol=1e-5, msg=name)
