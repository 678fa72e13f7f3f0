"""Two processes that train one model over gloo, started once for all tests: what only several of them can break."""

import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_fp16 import make_fp16_accelerator
from test_train import LEARNS, fit, make_config, make_model

from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.training import loop
from prefcls_lib.training.checkpoint import Session

OVERFLOWING_STEP = 3
CONFIG = {"num_epochs": 2, "batch_size": 7, "validations_per_epoch": 2, **LEARNS}


def measure(folder: Path, accelerator, session: Session | None = None, rows: int = 33, **settings) -> dict:
    """What a fit measured, as plain values; weights as one vector."""
    config = make_config(**{**CONFIG, **settings})
    model = make_model(folder, config)
    result = fit(model, config, rows, session, accelerator=accelerator)
    return {
        "history": result.history[["step", "train_log_loss", "valid_log_loss", "skipped_steps"]].to_numpy(float),
        "weights": torch.cat([parameter.detach().flatten() for parameter in model.parameters()]),
    }


def work(rank: int, port: int, folder: Path, out: Path) -> None:
    """Everything that the tests look at, in one of the two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    accelerator, real, steps = make_accelerator("no"), loop.train_step, []
    found = {"fp16": measure(folder, make_fp16_accelerator())}
    found["no rows"] = measure(folder, make_fp16_accelerator(), rows=5, batch_size=1)

    def overflow_in_process_1(model, *rest):
        counts = real(model, *rest)
        steps.append(1)
        if len(steps) == OVERFLOWING_STEP and rank == 1:
            model.head.output.bias.grad.fill_(torch.inf)
        return counts

    loop.train_step = overflow_in_process_1
    found["one overflows"] = measure(folder, make_fp16_accelerator())
    skewed = SimpleNamespace(perf_counter=lambda: time.perf_counter() * (1 + 50 * rank) + 1000 * rank)
    loop.time = skewed  # in the second process another zero, and another pace
    session = Session(deadline=skewed.perf_counter() + 1.0)
    found["skewed clocks"] = measure(folder, accelerator, session, num_epochs=1000)
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


def test_losses_are_those_of_one_process(tiny, found):
    """Batches of 7 are shared as 4 and 3; in fp16, whose gradients are scaled."""
    one = measure(tiny, make_fp16_accelerator())
    for process in found:
        np.testing.assert_allclose(process["fp16"]["history"], one["history"], atol=1e-3, rtol=0)
    assert np.ptp(one["history"][:, 2]) > 1e-2  # something was learned


def test_no_process_takes_a_step_that_the_other_does_not(found):
    """The weights of both are the same to the bit. With batches of one pair the second process never scales a loss, and
    its gradients are zero; an overflow in one process is skipped by both and counted once in each; one clock counts,
    though the other runs fifty times as quick, so neither waits for the other."""
    one, two = found
    for case in ("fp16", "no rows", "one overflows", "skewed clocks"):
        assert torch.equal(one[case]["weights"], two[case]["weights"]), case
        np.testing.assert_array_equal(one[case]["history"], two[case]["history"])
    assert one["no rows"]["history"][-1, [0, 3]].tolist() == [10, 0]
    assert one["one overflows"]["history"][-1, 3] == 1
    assert one["skewed clocks"]["history"][-1, 0] < 2500
