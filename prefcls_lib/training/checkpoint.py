"""Where a training run is, and what an interrupted one needs to resume as if it had not been interrupted.

checkpoint/fold0/  weights-120.safetensors  after step 120: the model's, and the best where they are kept
                   state.pt                 the rest, read with weights_only=True; written after the weights
"""

import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from torch.serialization import safe_globals

from prefcls_lib.data.batching import TokenCount
from prefcls_lib.runtime.files import reading, write_whole

Log = Callable[[str], None]  # prints a line of a fit


class Stopped(KeyboardInterrupt):
    """Training was asked to end (SIGTERM); its state is saved."""


@dataclass(frozen=True)
class Session:
    """What a fit needs to know of the session it runs in."""

    folder: Path | None = None  # where checkpoints go, and where an earlier one is looked for; None: none are kept
    deadline: float = float("inf")  # `time.perf_counter()` by which model and test predictions must be there
    tokens_to_predict: int = 0  # of the test rows, which are predicted after `fit` and before the deadline
    stop: threading.Event = field(default_factory=threading.Event)  # set to end training after the current step


@dataclass
class TrainingState:
    """Where a training run is, all of which is in a checkpoint; at its end, what `fit` measured.

    A line of `history` is a validation: step, epoch, train_log_loss and valid_log_loss (both unsmoothed),
    valid_accuracy, flip_rate, encoder_log_loss and encoder_spread (see `validate`), learning_rate, gradient_norm,
    tokens_per_second, skipped_steps, seconds (since the start, until this validation).
    """

    max_tokens: int  # held for one backward pass; halved when memory runs out
    planned_steps: int = 0  # a time budget or a collapse may end training before
    step: int = 0  # optimizer steps done
    position: float = 0  # `step`, or what a time budget makes of it: training ends at `planned_steps`
    loss_sum: torch.Tensor | float = 0.0  # unsmoothed, since the last validation; a tensor, so that no step waits
    loss_rows: int = 0
    tokens: TokenCount = field(default_factory=TokenCount)  # of all training steps so far
    step_seconds: float = 0.0  # in them, validation left out
    elapsed: float = 0.0  # seconds since the start, over all sessions
    skipped_steps: int = 0  # left out because a gradient was not finite
    skipped_in_a_row: int = 0  # just now
    records: list[dict] = field(default_factory=list)  # one for each validation so far
    valid_probs: list[np.ndarray] = field(default_factory=list)  # (N, 3) of each of them
    valid_tokens: TokenCount = field(default_factory=TokenCount)  # of one validation
    chosen: int = 0  # the best validation, whose weights are `best_weights`; where none are kept, the last
    warning: str = ""  # why the encoder contributes nothing at the chosen one; "": it may contribute
    best_weights: dict[str, torch.Tensor] | None = None
    flagged: int = 0  # validations in a row in which the encoder counted as collapsed

    @property
    def history(self) -> pd.DataFrame:
        """A line for each validation."""
        return pd.DataFrame(self.records)

    @property
    def train_log_loss(self) -> float | None:
        """Mean unsmoothed loss of the training rows since the last validation; None: no step had a finite gradient."""
        return float(self.loss_sum) / self.loss_rows if self.loss_rows else None

    @property
    def tokens_per_second(self) -> float:
        """Real tokens of training steps over seconds in those steps."""
        return self.tokens.real / max(self.step_seconds, 1e-9)


def save_checkpoint(
    folder: Path | None, state: TrainingState, model: nn.Module, optimizer: Optimizer, accelerator: Accelerator
) -> None:
    """Write a checkpoint, in place of the last one. The first process does, where there is a folder for it."""
    if folder is None or not accelerator.is_main_process:
        return
    saved = {
        "state": vars(state) | {"valid_probs": torch.as_tensor(np.array(state.valid_probs)), "best_weights": None},
        "optimizer": optimizer.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else {},
        "random": torch.get_rng_state(),
        "cuda_random": torch.cuda.get_rng_state(accelerator.device) if accelerator.device.type == "cuda" else None,
    }
    both = {"model": model.state_dict(), "best": state.best_weights or {}}
    weights = {f"{kind}/{k}": v.cpu().contiguous() for kind, tensors in both.items() for k, v in tensors.items()}
    place = folder / f"weights-{state.step}.safetensors"
    with write_whole(place) as temporary:
        save_file(weights, temporary)
    with write_whole(folder / "state.pt") as temporary:
        torch.save(saved, temporary)
    for older in set(folder.glob("*.safetensors")) - {place}:  # a killed process's temporary file, too
        older.unlink()


def load_checkpoint(
    folder: Path | None, model: nn.Module, optimizer: Optimizer, accelerator: Accelerator
) -> TrainingState | None:
    """Put a checkpoint into model, optimizer, scaler and random states; None where there is none."""
    if folder is None or not (folder / "state.pt").exists():
        return None
    with reading(folder, "Delete it to train this fold from its start."), safe_globals([TokenCount]):
        saved = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        state, weights = saved["state"], {"model": {}, "best": {}}
        for name, tensor in load_file(folder / f"weights-{state['step']}.safetensors").items():
            kind, _, name = name.partition("/")
            weights[kind][name] = tensor
        model.load_state_dict(weights["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if accelerator.scaler is not None and saved["scaler"]:
            accelerator.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["random"])
        if saved["cuda_random"] is not None and accelerator.device.type == "cuda":  # the main process's
            torch.cuda.set_rng_state(saved["cuda_random"], accelerator.device)
        state |= {"valid_probs": list(state["valid_probs"].numpy()), "best_weights": weights["best"] or None}
        return TrainingState(**state)


@contextmanager
def stop_on_sigterm():
    """`with stop_on_sigterm() as stop:` - `stop` is an Event that SIGTERM sets."""
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
