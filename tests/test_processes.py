"""Processes of a user's own: several give the numbers of one, and killed or stopped ones lose nothing. gloo, here."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TWO_FOLDS, predict, read_tree, run_arguments, run_small
from test_fp16 import make_fp16_accelerator
from test_train import LEARNS, fit, make_config, make_model

from prefcls_lib import cli
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.evaluation.scores import log_loss
from prefcls_lib.pipeline import folds, launch, steps
from prefcls_lib.pipeline.folder import fold_models, read_probs, read_table
from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.runtime.files import RESUME, UserError, read_json
from prefcls_lib.training import loop, step
from prefcls_lib.training.checkpoint import Session

OVERFLOWING_STEP = 3
TWO_BY_TWO = {"num_epochs": 2, "batch_size": 7, "validations_per_epoch": 2, **LEARNS}
LONG = ("num_epochs=6", "validations_per_epoch=1")  # 30 steps


@pytest.fixture(scope="module")
def fork() -> Callable:
    """fork(function, *arguments): in a process of its own, forked from one that has imported what this module does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        multiprocessing.forkserver.ensure_running()

    def start(function: Callable, *arguments: object) -> multiprocessing.Process:
        process = context.Process(target=function, args=arguments, daemon=True)
        process.start()
        return process

    return start


def join_group(rank: int, port: int, function: Callable, arguments: tuple) -> None:
    """Call a function as one of two processes that torchrun started."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    assert not function(*arguments)
    torch.distributed.destroy_process_group()


def run_in_two(fork: Callable, function: Callable, *arguments: object) -> None:
    """Call a function, which returns nothing or 0, in two processes at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [fork(join_group, rank, port, function, arguments) for rank in range(2)]
    deadline = time.monotonic() + 150
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()  # where it waits for the other
    assert [process.exitcode for process in processes] == [0, 0]


def call(arguments: list[str], variables: dict[str, str]) -> None:
    """`prefcls ARGUMENTS` in a worker, with the caller's environment; the standard input is no parent's pipe here."""
    os.environ |= variables
    launch.end_with_parent = lambda: None
    sys.exit(cli.main(arguments))


# --- several processes on one machine


def test_two_processes_give_the_losses_of_one(home, reward_folders, tmp_path, capsys):
    """Steps of 7 pairs are shared as 4 and 3. They start from a reward model, whose temperature both fit alike; one of
    them logs, to TensorBoard what is in history.csv and result.json."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def test_folds_and_seeds_side_by_side_equal_one_after_the_other(home, finished_run, tmp_path, fork, monkeypatch):
    """Two folds of two seeds: four models, the same predictions, seeds averaged. Workers read no CSV: it is gone.

    They are forked: a new Python would import torch again, which takes longer than their work.
    """

    def run_two(num_processes, command):
        of_torchrun = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(num_processes)]
        processes = [fork(call, command[2:], os.environ | variables) for variables in of_torchrun]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]

    monkeypatch.setattr(steps, "run_workers", run_two)
    settings = (*TWO_FOLDS, "num_seeds=2", "num_processes=2")
    copies = Path(shutil.copytree(home, tmp_path / "copies"))
    arguments = cli._parser().parse_args(run_arguments(copies, tmp_path / "two", *settings))
    job = steps.prepare(steps.start(cli._config(arguments)))
    steps.fit_baselines(job)
    for name in ("train.csv", "test.csv"):
        (copies / name).unlink()
    steps.fit_folds(job)
    result = steps.finish(job)
    names, columns = ["fold0", "fold0-seed1", "fold1", "fold1-seed1"], list(LABEL_COLUMNS)
    assert sorted(path.name for path in (tmp_path / "two" / "model").iterdir()) == names
    for place in ("fold0/oof.csv", "fold0/test.csv", "fold1/oof.csv", "fold1/test.csv"):
        one, two = (read_probs(run / "model" / place) for run in (finished_run, tmp_path / "two"))
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


def measure(folder: Path, accelerator, session: Session | None = None, rows: int = 33, **settings) -> dict:
    """What a fit measured, as plain values; weights as one vector."""
    config = make_config(**{**TWO_BY_TWO, **settings})
    model = make_model(folder, config)
    result = fit(model, config, rows, session, accelerator=accelerator)
    return {
        "history": result.history[["step", "train_log_loss", "valid_log_loss", "skipped_steps"]].to_numpy(float),
        "weights": torch.cat([parameter.detach().flatten() for parameter in model.parameters()]),
    }


def measure_cases(folder: Path, out: Path) -> None:
    """What only several processes can break, in one of the two."""
    rank, accelerator, real, steps = int(os.environ["RANK"]), make_accelerator("no"), step.accumulate_gradients, []
    found = {"fp16": measure(folder, make_fp16_accelerator())}
    found["no rows"] = measure(folder, make_fp16_accelerator(), rows=5, batch_size=1)

    def overflow_in_process_1(model, *rest):
        counts = real(model, *rest)
        steps.append(1)
        if len(steps) == OVERFLOWING_STEP and rank == 1:
            model.head.output.bias.grad.fill_(torch.inf)
        return counts

    step.accumulate_gradients = overflow_in_process_1
    found["one overflows"] = measure(folder, make_fp16_accelerator())
    skewed = SimpleNamespace(perf_counter=lambda: time.perf_counter() * (1 + 50 * rank) + 1000 * rank)
    loop.time = skewed  # in the second process another zero, and another pace
    session = Session(deadline=skewed.perf_counter() + 1.0)
    found["skewed clocks"] = measure(folder, accelerator, session, num_epochs=1000)
    torch.save(found, out / f"{rank}.pt")


def test_two_processes_take_the_same_steps(fork, tiny, tmp_path):
    """The losses of one process in fp16, and both weights the same to the bit: with batches of one pair, of which the
    second process has no loss; with an overflow in one, which both skip; with a clock that is fifty times as quick."""
    run_in_two(fork, measure_cases, tiny, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    alone = measure(tiny, make_fp16_accelerator())["history"]
    np.testing.assert_allclose(one["fp16"]["history"], alone, atol=1e-3, rtol=0)
    assert np.ptp(alone[:, 2]) > 1e-2  # something was learned
    for case in ("fp16", "no rows", "one overflows", "skewed clocks"):
        assert torch.equal(one[case]["weights"], two[case]["weights"]), case
        np.testing.assert_array_equal(one[case]["history"], two[case]["history"])
    assert one["no rows"]["history"][-1, [0, 3]].tolist() == [10, 0]
    assert one["one overflows"]["history"][-1, 3] == 1
    assert one["skewed clocks"]["history"][-1, 0] < 2500


WORKERS = """
import os, signal, sys, time
if os.environ["RANK"] == "0":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("prefcls: stopped. " + RESUME))
    print("asleep", flush=True)
    time.sleep(600)
time.sleep(2)
if "killed" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit("prefcls: none.csv: no such file")
"""
PARENT = """
import os, pathlib, sys, time
from prefcls_lib.pipeline.launch import end_with_parent
end_with_parent()
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("argument", "message"), [("fails", "none.csv: no such file"), ("killed", "a process failed;")]
)
def test_failing_or_killed_worker_ends_the_others_and_the_run(tmp_path, capsys, argument, message):
    """Its message becomes the caller's, not that of the other one, which is stopped because of it."""
    script, started = tmp_path / "workers.py", time.monotonic()
    script.write_text(WORKERS.replace("RESUME", repr(RESUME)))
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        launch.run_workers(2, [str(script), argument])
    assert time.monotonic() - started < 120
    shown = capsys.readouterr().out
    assert "asleep" in shown and "prefcls: stopped" in shown


def test_worker_ends_when_its_parent_is_killed(fork, tmp_path):
    """SIGKILL of the parent closes the workers' standard input, and they end."""
    script, mark = tmp_path / "worker.py", tmp_path / "pid"
    script.write_text(PARENT)
    parent, deadline = fork(launch.run_workers, 1, [str(script), str(mark)]), time.monotonic() + 60
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    pid = int(mark.read_text())
    parent.kill()
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


def test_count_of_processes(monkeypatch):
    """One a GPU; a wish; not more than there are GPUs."""
    assert (launch.count_processes(None), launch.count_processes(3)) == (1, 3)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 2)
    assert (launch.count_processes(None), launch.count_processes(1)) == (2, 1)
    with pytest.raises(UserError, match="num_processes=3: this machine has 2 GPUs"):
        launch.count_processes(3)


def test_environment_of_workers(monkeypatch):
    """Memory that does not fragment, unless the user chooses; time to save, where torchrun would kill after 30 s."""
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    environment = launch._environment(2)
    assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert float(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) == launch.SECONDS_TO_STOP >= 120
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    assert launch._environment(2)["PYTORCH_CUDA_ALLOC_CONF"] == "backend:cudaMallocAsync"


def test_models_side_by_side_have_a_gpu_each_and_join_no_group(monkeypatch):
    """The second of two processes takes every second model, on the second GPU; alone, a process takes all."""
    chosen = []
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch.torch.cuda, "set_device", chosen.append)
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert launch.take_share(["fold0", "fold1", "fold2", "fold3"]) == ["fold1", "fold3"]
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(os.environ)
    assert launch.take_share(["fold0", "fold1"]) == ["fold0", "fold1"]
    assert chosen == [1, 0]


def test_models_one_after_the_other_share_the_time_that_is_left(home, tmp_path, monkeypatch):
    """40 minutes are left: 20 for the first of two models, all that is left for the second, in the order given."""
    settings = ("folds=[2,0]", "time_budget_hours=1")
    job, sessions = steps.start(cli._config(cli._parser().parse_args(run_arguments(home, tmp_path, *settings)))), {}
    job = replace(steps.prepare(job), started_at=time.time() - 1200)
    monkeypatch.setattr(folds, "_train_model", lambda _, name, session: sessions.update({name: session}))
    now = time.perf_counter()
    folds.train_models(job, list(fold_models(job.config)))
    assert list(sessions) == ["fold2", "fold0"]
    assert [session.deadline - now for session in sessions.values()] == pytest.approx([1200, 2400], abs=30)
    assert {session.tokens_to_predict for session in sessions.values()} == {job.examples.lengths[-12:].sum()}
    models = fold_models(replace(job.config, num_seeds=2))
    assert models == {"fold2": (2, 42), "fold2-seed1": (2, 43), "fold0": (0, 42), "fold0-seed1": (0, 43)}


# --- runs that are killed or stopped


def run_and_save_every_step(arguments: list[str], log: Path) -> None:
    """`prefcls run`, with what it prints in a file."""
    loop.SAVE_EVERY_SECONDS = 0
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.exit(cli.main(arguments))


def wait_for_checkpoint(process: multiprocessing.Process, out: Path, steps: int) -> None:
    """Until the run has done so many steps of its own, or ended."""
    folder, first = out / "checkpoint" / "fold0", None
    while process.is_alive():
        step = max((int(path.stem.split("-")[1]) for path in folder.glob("weights-*.safetensors")), default=0)
        first = step if first is None else first
        if step >= first + steps:
            return
        time.sleep(0.01)


def test_killed_and_stopped_and_resumed_ends_as_a_run_left_alone(fork, home, tmp_path, capsys):
    """SIGKILL twice, wherever it hits, then SIGTERM. `resume_from` reads the folder, which is read-only, and the run
    ends elsewhere with the bytes of one that nobody stopped."""
    moments, earlier, out, alone = random.Random(7), tmp_path / "earlier", tmp_path / "out", tmp_path / "alone"
    for end, code in ((signal.SIGKILL, -9), (signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        process = fork(run_and_save_every_step, run_arguments(home, earlier, *LONG), tmp_path / "log")
        wait_for_checkpoint(process, earlier, steps=moments.randint(2, 8))
        time.sleep(moments.random() * 0.05)
        os.kill(process.pid, end)
        process.join(60)
        assert process.exitcode == code
    said = (tmp_path / "log").read_text()
    assert all(words in said for words in ("fold0: resumed at step", "stopped at step", "the same command to resume"))
    before = read_tree(earlier)
    assert {"checkpoint/fold0/state.pt", "submission.csv"} <= set(before)
    for name in before:
        (earlier / name).chmod(0o444)
    run_small(home, out, *LONG, f"resume_from={earlier}")
    assert "resumed at step" in capsys.readouterr().out
    assert read_tree(earlier) == before and not (out / "checkpoint").exists()
    # workers read the settings of this session
    assert read_json(out / "config.json")["settings"]["resume_from"] == str(earlier)
    run_small(home, alone, *LONG)
    for name in ("submission.csv", "oof.csv", "model/fold0/model.safetensors"):
        assert (out / name).read_bytes() == (alone / name).read_bytes()
