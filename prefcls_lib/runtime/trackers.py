"""Experiment trackers through accelerate: TensorBoard, W&B, MLflow, trackio and others, as `report_to` names them."""

import difflib
import numbers
from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from prefcls_lib.runtime.files import UserError

PROJECT = "prefcls"


def find_trackers(report_to: str) -> list[str]:
    """The names of the trackers that the setting means, all of them installed; none for "none"."""
    known, installed = sorted(map(str, LOGGER_TYPE_TO_CLASS)), sorted(map(str, get_available_trackers()))
    names = [name.strip().lower() for name in report_to.split(",") if name.strip()]
    if names in (["none"], []):
        return []
    if names == ["all"]:
        return installed
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise UserError(f"setting report_to={name!r}: no such tracker. {hint}Known: none, all, {', '.join(known)}.")
        if name not in installed:
            raise UserError(f"setting report_to={name!r}: it is not installed. Run `pip install {name}`.")
    return names


def begin(accelerator: Accelerator, settings: Mapping[str, object], run: str) -> None:
    """Begin a run of this name in each tracker of an accelerator, with its settings."""
    if accelerator.log_with:
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
        accelerator.init_trackers(PROJECT, config=plain, init_kwargs={"wandb": {"name": run}, "trackio": {"name": run}})


def log(accelerator: Accelerator, values: Mapping[str, object], step: int | None = None) -> None:
    """Log those of the values that are numbers; the first process does so, once."""
    plain = {k: float(v) for k, v in values.items() if isinstance(v, numbers.Real) and not isinstance(v, bool)}
    accelerator.log(plain, step=step)


def end(accelerator: Accelerator) -> None:
    """End the run in each tracker. `Accelerator.end_training` would also end the group of processes."""
    for tracker in accelerator.trackers:
        if accelerator.is_main_process:
            tracker.finish()
