"""Work in several processes, one for each GPU, started alike from a notebook and the command line.

torchrun starts them, and ends all where one fails. Their lines are passed on as they come, and the message of the one
that failed is the caller's. A process whose parent was killed ends at once: no two ever write to one run folder.
"""

import os
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TextIO

import torch

from prefcls_lib.runtime.files import RESUME, UserError
from prefcls_lib.training.checkpoint import Stopped, stop_on_sigterm

SECONDS_TO_STOP = 120  # to save a checkpoint after SIGTERM: 5 GB for ELECTRA-large


def count_processes(wanted: int | None) -> int:
    """How many processes to work in: `num_processes`, or one a GPU."""
    gpus = torch.cuda.device_count()
    if wanted is not None and 0 < gpus < wanted:
        raise UserError(f"setting num_processes={wanted}: this machine has {gpus} GPUs. Set {gpus}, or leave it out.")
    return wanted or max(1, gpus)


def run_workers(num_processes: int, command: list[str]) -> None:
    """Run `python COMMAND` in several processes that torchrun starts; they share the cores.

    A UserError where one of them fails; Stopped after SIGTERM: they were asked to save and stop.
    """
    torch.cuda.empty_cache()  # what this process holds, the workers may need
    alone = ["--standalone", "--local-addr=127.0.0.1"]  # no look-up of the host's name
    torchrun = ["-m", "torch.distributed.run", *alone, f"--nproc-per-node={num_processes}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    messages: list[str] = []
    with stop_on_sigterm() as stop:
        workers = subprocess.Popen([sys.executable, *torchrun, *command], env=_environment(num_processes), **pipes)
        reader = threading.Thread(target=_pass_on, args=(workers.stdout, messages), daemon=True)
        reader.start()
        try:
            while workers.poll() is None:
                if stop.wait(0.2):
                    raise Stopped("stopped")
        finally:
            workers.terminate()  # it gives its processes time to save
            with workers.stdin, suppress(subprocess.TimeoutExpired):
                workers.wait(SECONDS_TO_STOP + 10)
            workers.kill()
            reader.join(timeout=10)
    if workers.returncode:
        failed = f"a process failed; its last lines are above. {RESUME}"
        raise UserError(next((message for message in messages if RESUME not in message), failed))


def take_share(names: list[str]) -> list[str]:
    """The models that this process of torchrun trains: a single one with all others; of several a share, on its GPU."""
    if len(names) == 1:
        return names
    rank, size = (int(os.environ.pop(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    os.environ.pop("LOCAL_RANK", None)  # it joins no group of processes
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    return names[rank::size]


def end_with_parent() -> None:
    """In a worker: end at once when the parent is gone, which closes our standard input."""

    def watch() -> None:
        while os.read(0, 1):  # not through sys.stdin, whose lock would be held at exit
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _environment(num_processes: int) -> dict[str, str]:
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}  # lengths vary: fragments less
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SECONDS_TO_STOP)  # torchrun kills its processes after 30
    environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // num_processes))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the library may only be on a notebook's path
    return environment


def _pass_on(output: TextIO, messages: list[str]) -> None:
    """Print the lines of the workers as they come, and keep their messages to the user."""
    with output:
        for line in output:
            print(line.rstrip() + "\n", end="", flush=True)  # written at once: other threads print, too
            if message := line.rstrip().partition("prefcls: ")[2]:
                messages.append(message)
