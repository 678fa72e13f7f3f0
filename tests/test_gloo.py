"""Two processes that train one model over gloo, started once for all tests: what only several of them can break."""

import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prefcls_lib.training.state import Session
from test_fp16 import LEARNS, make_fp16_accelerator
from test_train import make_config, make_examples, make_model

from prefcls_lib.runtime.devices import make_accelerator, seed_everything
from prefcls_lib.training import loop
from prefcls_lib.training import step as steps

OVERFLOWING_STEP = 3
CONFIG = {"num_epochs": 2, "batch_size": 7, "validations_per_epoch": 2, **LEARNS}


def fit(folder: Path, accelerator, session: Session | None = None, rows: int = 33, **settings) -> dict:
    """What a fit measured, as plain values; weights as one vector."""
    config = make_config(**{**CONFIG, **settings})
    model = make_model(folder, config)
    seed_everything(config.seed)
    result = loop.fit(model, make_examples(rows, 1), make_examples(12, 2), config, accelerator, 0, "fold", session)
    return {
        "history": result.history[["step", "train_log_loss", "valid_log_loss", "skipped_steps"]].to_numpy(float),
        "weights": torch.cat([parameter.detach().flatten() for parameter in model.parameters()]),
    }


def overflow_in_process_1(accelerator) -> None:
    """Let the gradient of one process be infinite in one step."""
    real, calls = steps.train_step, []

    def train_step(model, *rest):
        counts = real(model, *rest)
        calls.append(1)
        if len(calls) == OVERFLOWING_STEP and accelerator.process_index == 1:
            model.head.output.bias.grad.fill_(torch.inf)
        return counts

    steps.train_step = train_step
    try:
        yield
    finally:
        steps.train_step = real


def work(rank: int, port: int, folder: Path, out: Path) -> None:
    """Everything that the tests look at, in one of the two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    accelerator = make_accelerator("no")
    sent, all_reduce = [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda tensor, *rest: sent.append(tensor.nbytes) or all_reduce(tensor, *rest)
    found = {"fp32": fit(folder, accelerator)}
    found["fp32 bytes"] = sum(sent)
    found["fp16"] = fit(folder, make_fp16_accelerator())
    found["fp16 bytes"] = sum(sent) - found["fp32 bytes"]
    found["no rows"] = fit(folder, make_fp16_accelerator(), rows=5, batch_size=1)
    for _ in overflow_in_process_1(accelerator):
        found["one overflows"] = fit(folder, make_fp16_accelerator())
    real = loop.time.perf_counter
    skewed = SimpleNamespace(perf_counter=lambda: real() * (1 + 50 * rank) + 1000 * rank)  # another zero, another pace
    loop.time = skewed
    session = Session(deadline=skewed.perf_counter() + 1.0)
    found["skewed clocks"] = fit(folder, accelerator, session, num_epochs=1000)
    torch.save(found, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory) -> list[dict]:
    """What both processes found."""
    out = tmp_path_factory.mktemp("gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.spawn(work, (port, tiny, out), nprocs=2, join=False)
    deadline = time.monotonic() + 150
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-3)])
def test_losses_are_those_of_one_process(tiny, found, precision, tolerance):
    """Batches of 7 are shared as 4 and 3; in fp16 the gradients travel in fp16 too."""
    one = fit(tiny, make_accelerator("no") if precision == "fp32" else make_fp16_accelerator())
    for process in found:
        np.testing.assert_allclose(process[precision]["history"], one["history"], atol=tolerance, rtol=0)
    assert np.ptp(one["history"][:, 2]) > 10 * tolerance  # something was learned


def test_scaled_gradients_travel_in_half_the_bytes(found):
    """The rest are the counts of a step and the embeddings of the validation rows, which are few."""
    assert 0.5 * found[0]["fp32 bytes"] <= found[0]["fp16 bytes"] < 0.51 * found[0]["fp32 bytes"]


@pytest.mark.parametrize("case", ["fp32", "fp16", "no rows", "one overflows"])
def test_weights_of_both_processes_are_the_same(found, case):
    """To the bit: no process ever takes a step that the other does not."""
    assert torch.equal(found[0][case]["weights"], found[1][case]["weights"])


def test_a_process_without_rows_takes_the_step_with_the_others(found):
    """Batches of one pair: the second process never scales a loss, and its gradients are zero."""
    for process in found:
        assert process["no rows"]["history"][-1, 0] == 10
        assert process["no rows"]["history"][-1, 3] == 0


def test_an_overflow_in_one_process_is_skipped_by_both(found):
    """One step, counted once in each."""
    for process in found:
        assert process["one overflows"]["history"][-1, 3] == 1


def test_clocks_of_two_processes_make_one_plan(found):
    """One clock runs fifty times as quick as the other: neither waits for the other, and both stop at one step."""
    taken = [process["skewed clocks"]["history"][-1, 0] for process in found]
    assert taken[0] == taken[1]
    assert taken[0] < 2500
