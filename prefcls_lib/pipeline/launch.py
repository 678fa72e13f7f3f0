"""Work in subprocesses: one for each GPU, started alike from a notebook and the command line.

Each runs `python -m prefcls_lib ...`. Its lines are passed on as they come; the first that fails ends the others, and
its message is the caller's. A subprocess whose parent was killed ends at once: no two ever write to one run folder.
"""

import os
import subprocess
import sys
import threading
from collections import deque
from typing import TextIO

import psutil
import torch

from prefcls_lib.runtime.files import UserError
from prefcls_lib.training.checkpoint import Stopped, stop_on_sigterm

WORKER = "PREFCLS_WORKER"  # set in a subprocess, which starts no further ones
PREFCLS = ["-m", "prefcls_lib"]
SECONDS_TO_STOP = 120  # to save a checkpoint after SIGTERM: 5 GB for ELECTRA-large


def count_processes(wanted: int | None) -> int:
    """How many processes to work in: `num_processes`, or one a GPU; 1 inside a worker or under torchrun."""
    if WORKER in os.environ or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return 1
    gpus = torch.cuda.device_count()
    if wanted is not None and 0 < gpus < wanted:
        raise UserError(f"setting num_processes={wanted}: this machine has {gpus} GPUs. Set {gpus}, or leave it out.")
    return wanted or max(1, gpus)


def torchrun(num_processes: int) -> list[str]:
    """What stands before PREFCLS where several processes train one model together."""
    alone = ["--standalone", "--local-addr=127.0.0.1"]  # no look-up of the host's name
    return ["-m", "torch.distributed.run", *alone, f"--nproc-per-node={num_processes}"]


def run_workers(commands: dict[str, list[str]], num_processes: int) -> None:
    """Run Python with the arguments of each command, by name; several have a GPU each, where there are GPUs.

    A UserError where one of them fails; Stopped after SIGTERM: they were asked to save and stop.

    Args:
        num_processes: in all commands together; they share the cores.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what this process holds, the workers may need
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    workers, readers, tails = [], [], {name: deque(maxlen=200) for name in commands}
    with stop_on_sigterm() as stop:
        try:
            for gpu, (name, command) in enumerate(commands.items()):
                environment = _worker_environment(num_processes, gpu if len(commands) > 1 else None)
                workers.append(psutil.Popen([sys.executable, *command], env=environment, errors="replace", **pipes))
                given = (workers[-1].stdout, f"[{name}] " if len(commands) > 1 else "", tails[name])
                readers.append(threading.Thread(target=_pass_on, args=given, daemon=True))
                readers[-1].start()
            codes = [None] * len(commands)
            while None in codes:
                if stop.wait(0.2):
                    raise Stopped("stopped")
                codes = [worker.poll() for worker in workers]
                if any(codes):
                    break
        finally:
            _stop(workers)
            for reader in readers:
                reader.join(timeout=10)
    for (name, tail), code in zip(tails.items(), codes, strict=True):
        if code:
            messages = [line.partition("prefcls: ")[2] for line in tail if "prefcls: " in line]
            last = "\n  ".join(["Its last lines:", *list(tail)[-8:]])
            message = f"exit code {code}. {last}\nRun the same command again: what is finished is kept."
            raise UserError(f"{name} failed: {messages[-1] if messages else message}")


def end_with_parent() -> None:
    """In a worker: end at once when the parent is gone, which closes our standard input."""

    def watch() -> None:
        while os.read(0, 1):  # not through sys.stdin, whose lock would be held at exit
            pass
        os._exit(1)

    if WORKER in os.environ:
        threading.Thread(target=watch, daemon=True).start()


def _worker_environment(num_processes: int, gpu: int | None) -> dict[str, str]:
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}  # lengths vary: fragments less
    environment |= {WORKER: "1", "PYTHONUNBUFFERED": "1"}
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SECONDS_TO_STOP)  # torchrun kills its processes after 30
    environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // num_processes))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the library may only be on a notebook's path
    if gpu is not None and torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    return environment


def _pass_on(output: TextIO, prefix: str, tail: deque) -> None:
    """Print the lines of a worker as they come, and keep the last ones."""
    with output:
        for line in output:
            tail.append(line.rstrip())
            print(f"{prefix}{tail[-1]}\n", end="", flush=True)  # written at once: other threads print, too


def _stop(workers: list[psutil.Popen]) -> None:
    """Ask those that still run to stop, give them time to save, then kill them."""
    running = [worker for worker in workers if worker.poll() is None]
    for worker in running:
        worker.terminate()
    for worker in psutil.wait_procs(running, SECONDS_TO_STOP + 10)[1]:  # torchrun waits for its own processes
        worker.kill()
    for worker in workers:
        worker.wait()
        worker.stdin.close()
