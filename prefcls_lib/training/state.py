"""What an interrupted training run needs to resume as if it had not been interrupted.

    checkpoint/fold0/  position.json       step, plan, history so far, tokens and seconds
                       model.safetensors   weights now          best.safetensors  weights of the best validation
                       state.pt            optimizer, gradient scaler, random states (read with weights_only=True)
                       valid_probs.npy     predictions of every validation so far

The folder is replaced by renames: whenever the run is killed, the last checkpoint or the one before it exists.
"""

import os
import shutil
import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from prefcls_lib.data.batching import TokenCount
from prefcls_lib.runtime.files import UserError, backup_of, read_json, write_json, write_whole


class Stopped(KeyboardInterrupt):
    """Training was asked to end (SIGTERM); its state is saved."""


@dataclass(frozen=True)
class FitResult:
    """What `fit` measured. The model itself holds the chosen weights.

    Attributes:
        history: one line a validation: step, epoch, train_log_loss and valid_log_loss (both unsmoothed),
            valid_accuracy, encoder_log_loss and encoder_spread (see `Trainer.validate`), learning_rate, gradient_norm,
            tokens_per_second, skipped_steps, seconds.
        valid_probs: (V, N, 3) probabilities of the validation rows at each validation.
        chosen: which validation's weights the model holds.
        encoder_warning: why their encoder contributes nothing, "" where it may contribute.
        swapped_probs: (N, 3) of the validation rows with A and B swapped, by those weights.
        tokens: of all training steps.
        valid_tokens: of one pass over the validation rows.
        step_seconds: seconds in training steps, validation left out.
    """

    history: pd.DataFrame
    valid_probs: np.ndarray
    chosen: int
    encoder_warning: str
    swapped_probs: np.ndarray
    tokens: TokenCount
    valid_tokens: TokenCount
    step_seconds: float


@dataclass(frozen=True)
class Session:
    """What a fit needs to know of the session it runs in.

    Attributes:
        state_folder: where checkpoints go, and where an earlier one is looked for; None: none are kept.
        deadline: `time.perf_counter()` by which `fit` must return; None: no time budget.
        tokens_to_predict: tokens that will still have to be predicted after `fit`, before the deadline.
        stop: set from outside to end training after the step at hand, its state saved.
    """

    state_folder: Path | None = None
    deadline: float | None = None
    tokens_to_predict: int = 0
    stop: threading.Event | None = None


@dataclass
class TrainingState:
    """The position of a training run; all of it is in a checkpoint.

    Attributes:
        step: optimizer steps done; total_steps: steps planned.
        max_tokens: tokens held for one backward pass; halved when memory runs out.
        loss_sum, loss_rows: unsmoothed training loss since the last validation (a tensor, so that no step waits).
        tokens, step_seconds: of all training steps so far; elapsed: seconds since the start, over all sessions.
        skipped_steps: steps left out because a gradient was not finite.
        records, valid_probs: one for each validation so far.
        best: the validation whose weights are `best_weights`, or None where none are kept.
    """

    total_steps: int
    max_tokens: int
    step: int = 0
    loss_sum: torch.Tensor | float = 0.0
    loss_rows: int = 0
    tokens: TokenCount = field(default_factory=TokenCount)
    step_seconds: float = 0.0
    elapsed: float = 0.0
    skipped_steps: int = 0
    records: list[dict] = field(default_factory=list)
    valid_probs: list[np.ndarray] = field(default_factory=list)
    best: int | None = None
    best_weights: dict[str, torch.Tensor] | None = None

    @property
    def train_log_loss(self) -> float:
        """Mean unsmoothed loss of the training rows since the last validation."""
        return float(self.loss_sum) / max(1, self.loss_rows)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens of training steps over seconds in those steps."""
        return self.tokens.real / max(self.step_seconds, 1e-9)


def save_state(
    folder: Path,
    state: TrainingState,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> None:
    """Write a checkpoint, in place of the last one."""
    position = {k: v for k, v in vars(state).items() if k not in ("best_weights", "valid_probs")}
    position |= {"loss_sum": float(state.loss_sum), "tokens": vars(state.tokens)}
    device, cuda = accelerator.device, accelerator.device.type == "cuda"
    tensors = {
        "optimizer": optimizer.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else {},
        "random": {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(device)] if cuda else []},
    }

    def write(temporary: Path) -> None:
        temporary.mkdir()
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, temporary / "model.safetensors"
        )
        if state.best_weights is not None:
            _write_best(state, folder, temporary)
        torch.save(tensors, temporary / "state.pt")
        np.save(temporary / "valid_probs.npy", np.array(state.valid_probs))
        write_json(temporary / "position.json", position)

    for stale in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that was killed while it wrote
        shutil.rmtree(stale, ignore_errors=True)
    write_whole(folder, write)


def _write_best(state: TrainingState, folder: Path, temporary: Path) -> None:
    """The best weights into a checkpoint; where a file has them already, a hard link to it, which takes no space."""
    known = folder / "best.safetensors"  # of the checkpoint before
    if state.records[state.best]["step"] == state.step:
        known = temporary / "model.safetensors"
    elif not known.is_file() or read_json(folder / "position.json")["best"] != state.best:
        return save_file(state.best_weights, temporary / "best.safetensors")
    try:
        os.link(known, temporary / "best.safetensors")
    except OSError:  # a file system without hard links
        save_file(state.best_weights, temporary / "best.safetensors")


def load_state(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> TrainingState | None:
    """Put a checkpoint into model, optimizer, scaler and random states; None where there is none.

    Raises:
        UserError: the checkpoint is broken.
    """
    if not folder.is_dir():
        folder = backup_of(folder)
    if not folder.is_dir():
        return None
    position = read_json(folder / "position.json")
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
        tensors = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        optimizer.load_state_dict(tensors["optimizer"])
        if accelerator.scaler is not None and tensors["scaler"]:
            accelerator.scaler.load_state_dict(tensors["scaler"])
        torch.set_rng_state(tensors["random"]["cpu"])
        if tensors["random"]["cuda"] and accelerator.device.type == "cuda":  # the first is the main process's
            torch.cuda.set_rng_state(tensors["random"]["cuda"][0], accelerator.device)
        best = folder / "best.safetensors"
        return TrainingState(
            **{**position, "tokens": TokenCount(**position["tokens"])},
            valid_probs=list(np.load(folder / "valid_probs.npy", allow_pickle=False)),
            best_weights=load_file(best) if best.is_file() else None,
        )
    except Exception as error:  # torch, safetensors, numpy and pickle each raise their own
        raise UserError(
            f"{folder}: this checkpoint cannot be read ({type(error).__name__}: {error}). Delete it to train this fold "
            "from its start."
        ) from error


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
