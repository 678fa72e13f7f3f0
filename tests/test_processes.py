"""Several processes: the same numbers as one, every model trained, and no hang when one ends. gloo, on this machine."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import TWO_FOLDS, predict, run_arguments, run_small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prefcls_lib import cli
from prefcls_lib.config import RunConfig
from prefcls_lib.data import loading
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.evaluation.scores import log_loss
from prefcls_lib.pipeline import folds, launch, steps
from prefcls_lib.pipeline.folder import fold_models, read_probs, read_table
from prefcls_lib.pipeline.predict import predict_models, predict_side_by_side
from prefcls_lib.runtime.files import UserError


def start_process(command: list[str]) -> subprocess.Popen:
    """A process of its own, as a user starts it: warnings and workers as usual."""
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *command], env=environment, **output)


def test_two_processes_give_the_losses_of_one(home, reward_folders, tmp_path, capsys):
    """Steps of 7 pairs are shared as 4 and 3; the last step of an epoch has 5. One of the two logs, to TensorBoard what
    is in history.csv and result.json. They start from a reward model, whose temperature both fit alike."""
    settings = ("batch_size=7", "num_epochs=2", "validations_per_epoch=2", "learning_rate=1e-3", "mixed_precision=no",
                f"init_from={reward_folders['bert']}")  # fmt: skip
    results, histories, outputs = [], [], []
    for out, more in ((tmp_path / "one", ()), (tmp_path / "two", ("num_processes=2", "report_to=tensorboard"))):
        results.append(run_small(home, out, *settings, *more))
        histories.append(read_table(out / "history.csv")[["step", "train_log_loss", "valid_log_loss"]])
        outputs.append(capsys.readouterr().out)
    np.testing.assert_allclose(*histories, atol=1e-5, rtol=0)
    assert np.ptp(histories[0]["train_log_loss"]) > 1e-4  # something was learned
    assert results[0]["folds"][0]["tokens"][0] == results[1]["folds"][0]["tokens"][0]
    np.testing.assert_allclose(*(read_probs(tmp_path / run / "submission.csv") for run in ("one", "two")), atol=1e-5)
    for said in ("reward model: temperature", "valid log loss"):
        assert outputs[0].count(said) == outputs[1].count(said) > 0
    found: dict[str, list[float]] = {}
    for folder in {path.parent for path in (tmp_path / "two" / "logs").rglob("events.out.*")}:
        events = EventAccumulator(str(folder)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    assert found["valid_log_loss"] == pytest.approx(histories[1]["valid_log_loss"].tolist(), rel=1e-6)
    assert found["log_loss"] == pytest.approx([results[1]["log_loss"]], rel=1e-6)


def test_folds_and_seeds_side_by_side_equal_one_after_the_other(home, tmp_path, capsys):
    """Two folds of two seeds: four models, the same predictions, seeds averaged. The workers read what was prepared,
    not the CSVs, which are gone by then; what they predict of the test rows is what `predict` makes of their models."""
    settings = (*TWO_FOLDS, "num_seeds=2", "mixed_precision=no")
    run_small(home, tmp_path / "one", *settings)
    copies = Path(shutil.copytree(home, tmp_path / "copies"))
    arguments = cli._parser().parse_args(run_arguments(copies, tmp_path / "two", *settings, "num_processes=2"))
    job = steps.start(cli._config(arguments))
    data = steps.prepare(job)
    steps.fit_baselines(job)
    for name in ("train.csv", "test.csv"):
        (copies / name).unlink()
    steps.fit_folds(data)
    result = steps.finish(job)
    assert "[fold0 fold1] " in capsys.readouterr().out
    names, columns = ["fold0", "fold0-seed1", "fold1", "fold1-seed1"], list(LABEL_COLUMNS)
    assert sorted(path.name for path in (tmp_path / "two" / "model").iterdir()) == names
    for name in names:
        for table in ("oof.csv", "test.csv"):
            one, two = (read_probs(tmp_path / run / "model" / name / table) for run in ("one", "two"))
            np.testing.assert_allclose(two, one, atol=1e-5)
    again = predict(tmp_path / "two", home / "test.csv", tmp_path / "again.csv")
    np.testing.assert_allclose(again, read_probs(tmp_path / "two" / "submission.csv"), atol=1e-12)
    seeds = [pd.concat([read_table(tmp_path / "two" / "model" / name / "oof.csv") for name in names[seed::2]])
             for seed in (0, 1)]  # fmt: skip
    oof = read_table(tmp_path / "two" / "oof.csv")
    assert not oof["id"].duplicated().any()
    first, second = (table[columns].to_numpy() for table in seeds)
    np.testing.assert_allclose(oof[columns].to_numpy(), (first + second) / 2, atol=1e-12)
    assert np.abs(first - second).max() > 1e-4
    assert [fold["seed"] for fold in result["folds"]] == [42, 43, 42, 43]
    one, two = (log_loss(table["label"].to_numpy(), table[columns].to_numpy()) for table in seeds)
    assert result["log_loss_seed_sd"] == pytest.approx(abs(one - two) / np.sqrt(2)) != 0


def test_rows_predicted_by_two_processes(finished_run, home, tmp_path, monkeypatch, capfd):
    """What one process predicts, model by model; in a rerun one that cannot be read is left out, the reason printed."""
    broken = Path(shutil.copytree(finished_run / "model" / "fold0", tmp_path / "run" / "model" / "broken"))
    (broken / "head.safetensors").write_bytes(b"cut off")
    one, two = (finished_run / "model" / name for name in ("fold0", "fold1"))
    rows, alone, shared = loading.read_rows(home / "test.csv", labelled=False).head(11), {}, {}
    with pytest.raises(UserError, match="head.safetensors: is damaged"):
        predict_models([one, broken, two], rows, alone.__setitem__)
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    predict_models([one, broken, two], rows, alone.__setitem__)
    predict_side_by_side([one, broken, two], rows, shared.__setitem__, math.inf, 2)
    assert list(alone) == list(shared) == [0, 2]
    for number in alone:
        np.testing.assert_allclose(shared[number], alone[number], atol=1e-6)
    wanted = read_probs(finished_run / "submission.csv")[:11]
    np.testing.assert_allclose((alone[0] + alone[2]) / 2, wanted, atol=1e-6)
    assert "head.safetensors: is damaged" in capfd.readouterr().out  # a worker's, passed on


def test_failing_worker_ends_the_run_with_its_message(tmp_path):
    """Its last message becomes the caller's."""
    with pytest.raises(UserError, match=rf"fold1 failed: {tmp_path / 'config.json'}: no such file"):
        launch.run_side_by_side({"fold1": ["fit", str(tmp_path), "fold1"]})


def test_killed_worker_ends_the_others(capsys):
    """One is killed, as the kernel does when memory runs out; the other, which would run for minutes, is stopped."""
    sleeper = "import time; print('asleep', flush=True); time.sleep(600)"
    killed = "import os, signal, time; print('here', flush=True); time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)"
    started = time.monotonic()
    with pytest.raises(UserError, match=r"second failed: exit code -9. Its last lines:\n  here"):
        launch._run({"first": ["-c", sleeper], "second": ["-c", killed]}, 2)
    assert time.monotonic() - started < 30
    assert "[first] asleep" in capsys.readouterr().out


def test_worker_ends_when_its_parent_is_killed(tmp_path):
    """SIGKILL of the parent closes the workers' standard input, and they end."""
    mark = tmp_path / "pid"
    worker = (
        "import os, time, pathlib; from prefcls_lib.pipeline.launch import end_with_parent; end_with_parent(); "
        f"pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    start = f"p._run({{'worker': ['-c', {worker!r}]}}, 1)"
    parent = start_process(["-c", f"from prefcls_lib.pipeline import launch as p; {start}"])
    deadline = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    pid = int(mark.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


def test_count_of_processes(monkeypatch):
    """One a GPU; a wish; never inside a worker; not more than there are GPUs."""
    assert launch.count_processes(None) == 1
    assert launch.count_processes(3) == 3
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 2)
    assert launch.count_processes(None) == 2
    assert launch.count_processes(1) == 1
    with pytest.raises(UserError, match="num_processes=3: this machine has 2 GPUs"):
        launch.count_processes(3)
    monkeypatch.setenv(launch.WORKER, "2")
    assert launch.count_processes(None) == 1


def test_environment_of_a_worker(monkeypatch):
    """A GPU of its own, also where the user has chosen some, and without any, none; memory that does not fragment where
    sides have all lengths, unless the user has a choice of their own."""
    for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in launch._worker_environment(2, 1)
    assert launch._worker_environment(2, 1)["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: True)
    assert launch._worker_environment(2, 1)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    assert launch._worker_environment(2, 1)["CUDA_VISIBLE_DEVICES"] == "5"
    assert launch._worker_environment(2, None)["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert launch._worker_environment(2, 1)["PYTORCH_CUDA_ALLOC_CONF"] == "backend:cudaMallocAsync"


def test_several_processes_on_one_model_may_save_and_look_up_no_name(monkeypatch):
    """torchrun would kill them 30 s after SIGTERM, and would resolve the host's name, in vain without a network."""
    started = []
    monkeypatch.setattr(launch, "_run", lambda *given: started.append(given))
    launch.run_together(["fit", "run", "fold0"], 2)
    [(commands, num_processes, _)] = started
    [command] = commands.values()
    environment = launch._worker_environment(num_processes, None)
    assert command[-5:] == ["-m", "prefcls_lib", "fit", "run", "fold0"]
    assert {"--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"} <= set(command[2:-5])
    assert float(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) == launch.SECONDS_TO_STOP >= 120


def test_models_one_after_the_other_share_the_time_that_is_left(home, tmp_path, monkeypatch):
    """Of an hour, 40 minutes are left: 20 for the first of two models, and all that is left for the second."""
    arguments = cli._parser().parse_args(run_arguments(home, tmp_path / "run", *TWO_FOLDS, "time_budget_hours=1"))
    job, deadlines = steps.start(cli._config(arguments)), []
    data = replace(steps.prepare(job), started_at=time.time() - 1200)
    monkeypatch.setattr(folds, "_train_model", lambda data, model, session: deadlines.append(session))
    now = time.perf_counter()
    folds.train_models(data, fold_models(data.config))
    assert [session.deadline - now for session in deadlines] == pytest.approx([1200, 2400], abs=30)
    tokens = sum(map(len, data.test.encoded.token_ids))
    assert {session.tokens_to_predict for session in deadlines} == {tokens}


def test_names_of_models():
    """Fold by fold, in the order of the setting; the first seed is not named."""
    config = RunConfig(folds=[3, 0], num_seeds=2)
    assert [model.name for model in fold_models(config)] == ["fold3", "fold3-seed1", "fold0", "fold0-seed1"]
