"""Several processes: the same numbers as one, every model trained, and no hang when one ends. gloo, on this machine."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import run_arguments
from prefcls_lib.training.collapse import Collapsed

from prefcls_lib import cli
from prefcls_lib.config import RunConfig
from prefcls_lib.data import loading
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.evaluation.scores import log_loss
from prefcls_lib.pipeline import folds, job, predict, results, steps
from prefcls_lib.pipeline import launch as processes
from prefcls_lib.pipeline.folder import FoldModel, RunFolder, read_table
from prefcls_lib.runtime.files import UserError

ONE_MODEL = ("folds=[0]", "batch_size=7", "num_epochs=2", "validations_per_epoch=2", "learning_rate=1e-3")


def history_of(run: Path) -> np.ndarray:
    return read_table(run / "history.csv")[["step", "train_log_loss", "valid_log_loss"]].to_numpy()


def launch(command: list[str], **popen: object) -> subprocess.Popen:
    """A process of its own, as a user starts it: warnings and workers as usual."""
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen,
    )


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-5), ("bf16", 1e-3)])
def test_two_processes_give_the_losses_of_one(home, tmp_path, precision, tolerance, capsys):
    """Steps of 7 pairs are shared as 4 and 3; the last step of an epoch has 5. Head-only phase included."""
    settings = (*ONE_MODEL, f"mixed_precision={precision}", "head_only_rows=20")
    assert cli.main(run_arguments(home, tmp_path / "one", *settings)) == 0
    assert cli.main(run_arguments(home, tmp_path / "two", *settings, "num_processes=2")) == 0
    assert "fold0: 2 processes share each step" in capsys.readouterr().out
    one, two = history_of(tmp_path / "one"), history_of(tmp_path / "two")
    np.testing.assert_allclose(two, one, atol=tolerance, rtol=0)
    assert np.ptp(one[:, 1]) > 10 * tolerance  # something was learned
    tokens = [
        json.loads((tmp_path / name / "model/fold0/fold.json").read_text())["tokens"][0] for name in ("one", "two")
    ]
    assert tokens[0] == tokens[1]


def test_two_nodes_on_loopback_give_the_same(home, reward_folders, tmp_path):
    """torchrun on two nodes of one process each, on `prefcls run` itself, from a reward model: its layouts are
    compared by one process, and the other takes the result."""
    settings = (*ONE_MODEL, f"init_from={reward_folders['bert']}", "mixed_precision=no")
    assert cli.main(run_arguments(home, tmp_path / "one", *settings)) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-backend=c10d"]
    command = ["-m", "torch.distributed.run", *rendezvous, "-m", "prefcls_lib"]
    nodes = [launch([*command, *run_arguments(home, tmp_path / "nodes", *settings)]) for _ in range(2)]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    np.testing.assert_allclose(history_of(tmp_path / "nodes"), history_of(tmp_path / "one"), atol=1e-5, rtol=0)
    assert sum("fold0: 2 processes share each step" in output for output in outputs) == 1
    assert sum(output.count("reward model: pairs ranked as voted") for output in outputs) == 1


def test_folds_and_seeds_side_by_side_equal_one_after_the_other(home, tmp_path, capsys):
    """Two folds of two seeds: four models, the same bytes of weights, out-of-sample file complete, seeds averaged;
    the result has the standard deviation of the two seeds' log losses over all rows."""
    settings = ("num_seeds=2", "mixed_precision=no")
    assert cli.main(run_arguments(home, tmp_path / "one", *settings)) == 0
    assert cli.main(run_arguments(home, tmp_path / "two", *settings, "num_processes=2")) == 0
    assert "[fold0 fold1] " in capsys.readouterr().out
    names = ["fold0", "fold0-seed1", "fold1", "fold1-seed1"]
    assert sorted(path.name for path in (tmp_path / "two" / "model").iterdir()) == names
    for name in names:
        one, two = (read_table(tmp_path / run / "model" / name / "oof.csv") for run in ("one", "two"))
        np.testing.assert_allclose(two[list(LABEL_COLUMNS)], one[list(LABEL_COLUMNS)], atol=1e-5)
    seeds = [read_table(tmp_path / "two" / "model" / name / "oof.csv") for name in names[:2]]
    oof = read_table(tmp_path / "two" / "oof.csv")
    assert not oof["id"].duplicated().any()
    mean = (seeds[0][list(LABEL_COLUMNS)] + seeds[1][list(LABEL_COLUMNS)]) / 2
    np.testing.assert_allclose(oof.loc[oof["fold"] == 0, list(LABEL_COLUMNS)].to_numpy(), mean, atol=1e-12)
    assert np.abs(seeds[0][list(LABEL_COLUMNS)] - seeds[1][list(LABEL_COLUMNS)]).to_numpy().max() > 1e-4
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert [fold["seed"] for fold in result["folds"]] == [42, 43, 42, 43]
    tables = [pd.concat([read_table(tmp_path / "two" / "model" / name / "oof.csv") for name in names[seed::2]])
              for seed in (0, 1)]  # fmt: skip
    one, two = (log_loss(table["label"].to_numpy(), table[list(LABEL_COLUMNS)].to_numpy()) for table in tables)
    assert result["log_loss_seed_sd"] == pytest.approx(abs(one - two) / np.sqrt(2)) != 0


def test_rows_predicted_side_by_side(finished_run, home, monkeypatch):
    """Twelve rows by two processes: in the order of the rows, and what one process predicts."""
    rows = loading.read_rows(home / "test.csv", labelled=False)
    alone, _ = predict.predict_run(RunFolder(finished_run), rows)
    monkeypatch.setattr(predict, "BLOCK_ROWS", 6)
    shared, _ = predict.predict_run(RunFolder(finished_run), rows, num_processes=2)
    np.testing.assert_allclose(shared, alone, atol=2e-3)  # bf16, and other rows beside each in a padded batch
    assert np.ptp(alone[:, 0]) > 0.01


def test_failing_worker_ends_the_run_with_its_message(home, tmp_path, capsys):
    """A worker that cannot write its model: its message is ours, the other is stopped, and nothing hangs."""
    out = tmp_path / "run"
    blocked = out / "model"
    out.mkdir()
    blocked.write_text("a file where a folder must be")
    started = time.monotonic()
    assert cli.main(run_arguments(home, out, "num_processes=2")) == 2
    assert "model" in capsys.readouterr().err
    assert time.monotonic() - started < 120


def test_killed_worker_ends_the_others(capsys):
    """One is killed, as the kernel does when memory runs out; the other, which would run for minutes, is stopped."""
    sleeper = "import time; print('asleep', flush=True); time.sleep(600)"
    killed = "import os, signal, time; print('here', flush=True); time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)"
    started = time.monotonic()
    with pytest.raises(UserError, match=r"second failed: exit code -9. Its last lines:\n  here"):
        processes._run([["-c", sleeper], ["-c", killed]], ["first", "second"], [dict(os.environ)] * 2)
    assert time.monotonic() - started < 30
    assert "[first] asleep" in capsys.readouterr().out


def test_worker_ends_when_its_parent_is_killed(tmp_path):
    """SIGKILL of the parent closes the workers' standard input, and they go."""
    mark = tmp_path / "pid"
    worker = (
        "import os, time, pathlib; from prefcls_lib.pipeline.launch import end_with_parent; end_with_parent(); "
        f"pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    start = f"p._run([['-c', {worker!r}]], ['worker'], [p._worker_environment(1, None)])"
    parent = launch(["-c", f"from prefcls_lib.pipeline import launch as p; {start}"])
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
    assert processes.count_processes(None) == 1
    assert processes.count_processes(3) == 3
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 2)
    assert processes.count_processes(None) == 2
    assert processes.count_processes(1) == 1
    with pytest.raises(UserError, match="num_processes=3: this machine has 2 GPUs"):
        processes.count_processes(3)
    monkeypatch.setenv(processes.WORKER, "2")
    assert processes.count_processes(None) == 1


def test_each_worker_has_a_gpu_of_its_own(monkeypatch):
    """Also where the user has chosen GPUs; without any, none is named."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in processes._worker_environment(2, 1)
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: True)
    assert processes._worker_environment(2, 1)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert processes._worker_environment(2, 1)["CUDA_VISIBLE_DEVICES"] == "5"
    assert processes._worker_environment(2, None)["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_several_processes_on_one_model_may_save_and_look_up_no_name(monkeypatch):
    """torchrun would kill them 30 s after SIGTERM, and wait for the host's name to be resolved, in vain without a
    network."""
    started = []
    monkeypatch.setattr(
        processes, "_run", lambda commands, names, environments: started.append((commands, environments))
    )
    processes.run_together(["fit", "run", "fold0"], 2)
    [([command], [environment])] = started
    assert command[-5:] == ["-m", "prefcls_lib", "fit", "run", "fold0"]
    assert {"--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"} <= set(command[2:-5])
    assert float(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) == processes.SECONDS_TO_STOP >= 120


def start_job(home: Path, out: Path, **settings: object) -> job.Job:
    """A started job on the files of `home`, two of three folds."""
    paths = {"train": home / "train.csv", "test": home / "test.csv", "backbone": home / "backbone", "out": out}
    small = {"num_folds": 3, "folds": (0, 1), "max_length": 32, "batch_size": 8, "num_epochs": 1}
    return steps.start(RunConfig(**{name: str(path) for name, path in paths.items()}, **{**small, **settings}))


def test_workers_know_how_many_predict_with_them(home, tmp_path, monkeypatch):
    """Two models side by side: each plans with half of the tokens that are predicted afterwards."""
    commands, planned = [], []
    job = start_job(home, tmp_path / "run", num_processes=2)
    encoded = steps.encode(job)
    monkeypatch.setattr(steps, "run_side_by_side", lambda command, names: commands.extend(command))
    steps.fit_folds(job, encoded)
    arguments = [cli._parser().parse_args(command) for command in commands]
    assert [(a.side_by_side, a.models) for a in arguments] == [(2, ["fold0"]), (2, ["fold1"])]
    monkeypatch.setattr(folds, "_fit_model", lambda job, encoded, model, session: planned.append(session))
    folds.fit_here(job, encoded, [FoldModel(0)])
    folds.fit_here(job, encoded, [FoldModel(0)], side_by_side=2)
    assert planned[0].tokens_to_predict // 2 == planned[1].tokens_to_predict > 0


def test_one_process_says_that_a_fold_is_restarted(home, tmp_path, monkeypatch, capsys):
    """Of all processes that train one model together, the first."""

    def collapse(*_):
        raise Collapsed("collapsed", {"encoder_spread": 0.0})

    job = start_job(home, tmp_path / "run", learning_rate=0.001)
    encoded = steps.encode(job)
    monkeypatch.setattr(folds, "fit", collapse)
    said = {}
    for first in (True, False):
        state = SimpleNamespace(is_main_process=first, wait_for_everyone=lambda: None)
        monkeypatch.setattr(folds, "process_state", lambda state=state: state)
        with pytest.raises(UserError, match="collapsed"):
            folds.fit_here(job, encoded, [FoldModel(0)])
        said[first] = capsys.readouterr().out.count("restart")
        shutil.rmtree(tmp_path / "run" / "checkpoint", ignore_errors=True)
    assert said == {True: 2, False: 0}


def test_seconds_of_a_run_by_hand(monkeypatch):
    """The session 900 to 1000 s; two folds side by side 100 to 300 and 150 to 350 of an earlier one; one that this
    session trained; one whose record is older than `finished_at` and lies before the session: 100 + 250 + 0 + 50."""
    monkeypatch.setattr(results.time, "time", lambda: 1000.0)
    monkeypatch.setattr(results.time, "perf_counter", lambda: 5100.0)
    records = [{"seconds": 200.0, "finished_at": 300.0}, {"seconds": 200.0, "finished_at": 350.0},
               {"seconds": 60.0, "finished_at": 970.0}, {"seconds": 50.0}]  # fmt: skip
    assert results._total_seconds(SimpleNamespace(started=5000.0), records) == 100 + 250 + 0 + 50


def test_workers_do_not_fragment_the_memory(monkeypatch):
    """Sides have all lengths, so segments of one size would not be used again; a user's own choice stays."""
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert processes._worker_environment(2, 1)["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    assert processes._worker_environment(2, 1)["PYTORCH_CUDA_ALLOC_CONF"] == "backend:cudaMallocAsync"


def test_names_of_members():
    """There and back; nothing else is a name."""
    for fold_model, name in ((FoldModel(3), "fold3"), (FoldModel(0, 1), "fold0-seed1")):
        assert fold_model.name == name
        assert FoldModel.parse(name) == fold_model
    with pytest.raises(UserError, match="foldx"):
        FoldModel.parse("foldx")
