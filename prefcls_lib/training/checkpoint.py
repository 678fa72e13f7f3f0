"""What an interrupted training run needs to resume as if it had not been interrupted.

    checkpoint/fold0/  position.json       step, history so far, tokens and seconds
                       model.safetensors   weights now          best.safetensors  weights of the best validation
                       state.pt            optimizer, gradient scaler, random states (read with weights_only=True)
                       valid_probs.npy     predictions of every validation so far, and with A and B swapped

The folder is replaced by renames: whenever the run is killed, the last checkpoint or the one before it exists.
"""

import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from prefcls_lib.data.batching import TokenCount
from prefcls_lib.runtime.files import backup_of, read_json, reading, write_json, write_whole

Log = Callable[[str], None]  # prints a line of a fit
ARRAYS, COUNTS = ("valid_probs", "swapped_probs"), ("tokens", "valid_tokens")  # of a TrainingState


class Stopped(KeyboardInterrupt):
    """Training was asked to end (SIGTERM); its state is saved."""


@dataclass(frozen=True)
class Session:
    """What a fit needs to know of the session it runs in."""

    folder: Path | None = None  # where checkpoints go, and where an earlier one is looked for; None: none are kept
    deadline: float | None = None  # `time.perf_counter()` by which model and test predictions must be there
    tokens_to_predict: int = 0  # of the test rows, which are predicted after `fit` and before the deadline
    stop: threading.Event | None = None  # set from outside to end training after the step at hand, its state saved


@dataclass
class TrainingState:
    """Where a training run is; all of it is in a checkpoint."""

    max_tokens: int  # held for one backward pass; halved when memory runs out
    step: int = 0  # optimizer steps done
    position: float = 0  # `step`, or what a time budget makes of it: training ends at the planned number of steps
    rows_seen: int = 0  # training rows of all steps so far
    loss_sum: torch.Tensor | float = 0.0  # unsmoothed, since the last validation; a tensor, so that no step waits
    loss_rows: int = 0
    tokens: TokenCount = field(default_factory=TokenCount)  # of all training steps so far
    step_seconds: float = 0.0  # in them
    elapsed: float = 0.0  # seconds since the start, over all sessions
    skipped_steps: int = 0  # left out because a gradient was not finite
    skipped_in_a_row: int = 0  # just now
    records: list[dict] = field(default_factory=list)  # one for each validation so far, as the next two
    valid_probs: list[np.ndarray] = field(default_factory=list)  # (N, 3) each
    swapped_probs: list[np.ndarray] = field(default_factory=list)  # with A and B swapped
    valid_tokens: TokenCount = field(default_factory=TokenCount)  # of one validation
    best: int | None = None  # the validation whose weights are `best_weights`, or None where none are kept
    best_weights: dict[str, torch.Tensor] | None = None
    flagged: int = 0  # validations in a row in which the encoder counted as collapsed

    @property
    def train_log_loss(self) -> float | None:
        """Mean unsmoothed loss of the training rows since the last validation; None: no step had a finite gradient."""
        return float(self.loss_sum) / self.loss_rows if self.loss_rows else None

    @property
    def tokens_per_second(self) -> float:
        """Real tokens of training steps over seconds in those steps."""
        return self.tokens.real / max(self.step_seconds, 1e-9)


def save_checkpoint(
    folder: Path, state: TrainingState, model: nn.Module, optimizer: Optimizer, accelerator: Accelerator
) -> None:
    """Write a checkpoint, in place of the last one."""
    position = {name: value for name, value in vars(state).items() if name not in (*ARRAYS, "best_weights")}
    position |= {"loss_sum": float(state.loss_sum)} | {name: vars(getattr(state, name)) for name in COUNTS}
    device, cuda = accelerator.device, accelerator.device.type == "cuda"
    tensors = {
        "optimizer": optimizer.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else {},
        "random": {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(device)] if cuda else []},
    }

    def write(temporary: Path) -> None:
        temporary.mkdir()
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, temporary / "model.safetensors")
        if state.best_weights is not None:
            save_file(state.best_weights, temporary / "best.safetensors")
        torch.save(tensors, temporary / "state.pt")
        np.save(temporary / "valid_probs.npy", np.array([getattr(state, name) for name in ARRAYS]))
        write_json(temporary / "position.json", position)

    write_whole(folder, write)


def load_checkpoint(
    folder: Path | None, model: nn.Module, optimizer: Optimizer, accelerator: Accelerator
) -> TrainingState | None:
    """Put a checkpoint into model, optimizer, scaler and random states; None where there is none."""
    if folder is not None and not folder.is_dir():
        folder = backup_of(folder)
    if folder is None or not folder.is_dir():
        return None
    with reading(folder, "Delete it to train this fold from its start."):
        position, best = read_json(folder / "position.json"), folder / "best.safetensors"
        model.load_state_dict(load_file(folder / "model.safetensors"))
        tensors = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        optimizer.load_state_dict(tensors["optimizer"])
        if accelerator.scaler is not None and tensors["scaler"]:
            accelerator.scaler.load_state_dict(tensors["scaler"])
        torch.set_rng_state(tensors["random"]["cpu"])
        if tensors["random"]["cuda"] and accelerator.device.type == "cuda":  # the first is the main process's
            torch.cuda.set_rng_state(tensors["random"]["cuda"][0], accelerator.device)
        position |= zip(ARRAYS, map(list, np.load(folder / "valid_probs.npy", allow_pickle=False)), strict=True)
        position |= {name: TokenCount(**position[name]) for name in COUNTS}
        return TrainingState(**position, best_weights=load_file(best) if best.is_file() else None)


@contextmanager
def stop_on_sigterm():
    """`with stop_on_sigterm() as stop:` - `stop` is an Event that SIGTERM sets; only in the main thread."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
