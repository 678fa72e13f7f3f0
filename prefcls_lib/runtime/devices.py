"""The device and its precision, the processes that share it, experiment trackers, and the versions in use."""

import numbers
import os
import platform
import threading
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers

import prefcls_lib
from prefcls_lib.runtime.files import UserError
from prefcls_lib.runtime.kaggle import library_commit

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "safetensors",
            "numpy", "pandas", "scikit-learn")  # fmt: skip
_making = threading.Lock()


def choose_precision(setting: str, device: torch.device) -> str:
    """The mixed precision for `device`, "no", "bf16" or "fp16"; "auto" is bf16 where the hardware has it natively
    (emulation is slower than fp32), fp16 on other CUDA GPUs, and fp32 elsewhere."""
    if setting == "fp16" and device.type != "cuda":
        raise UserError("setting mixed_precision='fp16': needs a CUDA GPU. Use auto, bf16 or no.")
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    flags, cpu = {"avx512_bf16", "amx_bf16", "bf16"}, Path("/proc/cpuinfo")  # the last one is ARM's
    native = device.type == "cpu" and cpu.exists() and flags & set(cpu.read_text(errors="ignore").split())
    return "bf16" if native else "no"


def make_accelerator(mixed_precision: str, report_to: str = "none", logs: Path | None = None) -> Accelerator:
    """The engine for device, autocast and gradient scaling, and for several processes where torchrun started them.

    A new one may choose another precision, but not while another thread computes. `report_to` names trackers; `logs` is
    the folder of those that write files.
    """
    cpu = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available()  # accelerate has to be told
    trackers = [name for name in report_to.lower().replace(" ", "").split(",") if name not in ("", "none")]
    usable = ["all", *sorted(map(str, get_available_trackers()))]  # accelerate leaves out others without a word
    if missing := [name for name in trackers if name not in usable]:
        known = f"Choose among none, {', '.join(usable)}, or install its package."
        raise UserError(f"setting report_to={report_to!r}: no tracker {missing[0]!r} is installed. {known}")
    with _making:  # accelerate's states are filled step by step, and seen by all threads
        precision = choose_precision(mixed_precision, PartialState(cpu=cpu).device)
        if AcceleratorState._shared_state.get("_mixed_precision") != precision:
            AcceleratorState._reset_state(reset_partial_state=False)
        return Accelerator(mixed_precision=precision, log_with=trackers or None, project_dir=logs)


def begin_tracking(accelerator: Accelerator, settings: Mapping[str, object], run: str) -> None:
    """Begin a run of this name in each tracker of an accelerator, with its settings; `end_training` ends it."""
    plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
    names = {"wandb": {"name": run}, "trackio": {"name": run}}
    accelerator.init_trackers("prefcls", config=plain, init_kwargs=names)


def track(accelerator: Accelerator, values: Mapping[str, object], step: int | None = None) -> None:
    """Send those of the values that are numbers to the trackers; the first process does so, once."""
    plain = {k: float(v) for k, v in values.items() if isinstance(v, numbers.Real) and not isinstance(v, bool)}
    accelerator.log(plain, step=step)


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers, and the machine."""
    found = {"prefcls-lib": prefcls_lib.__version__, "commit": library_commit(), "python": platform.python_version()}
    return found | {name: version(name) for name in PACKAGES} | {"machine": machine_name()}


def machine_name() -> str:
    """A short name of the device that computes: the GPUs, or the CPU and its cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{platform.machine()} CPU, threads: {torch.get_num_threads()}"
