"""The device and its precision, the processes that share it, seeds, and the versions that decide a run's numbers."""

import importlib.metadata
import os
import platform
import random
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

import prefcls_lib
from prefcls_lib.runtime.files import UserError
from prefcls_lib.runtime.kaggle import library_commit
from prefcls_lib.runtime.trackers import find_trackers

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "safetensors",
            "numpy", "pandas", "scikit-learn")  # fmt: skip
MISSING = "not installed as a package"


def choose_precision(setting: str, device: torch.device) -> str:
    """The mixed precision for `device`: "no", "bf16" or "fp16".

    "auto" is bf16 where the hardware has it natively (emulation is slower than fp32), fp16 on other CUDA GPUs, and
    fp32 elsewhere.
    """
    if setting == "fp16" and device.type != "cuda":
        raise UserError("setting mixed_precision='fp16': needs a CUDA GPU. Use auto, bf16 or no.")
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "no"


def process_state() -> PartialState:
    """Which of the processes that torchrun or accelerate launch started this is; the only one otherwise."""
    return PartialState(cpu=_shared_cpu())


def make_accelerator(mixed_precision: str, report_to: str = "none", logs: Path | None = None) -> Accelerator:
    """The engine for device, autocast and gradient scaling, and for several processes where torchrun started them.

    A new one may choose another precision. `report_to` names trackers; `logs` is the folder of those that write files.
    """
    AcceleratorState._reset_state(reset_partial_state=False)
    precision = choose_precision(mixed_precision, process_state().device)
    trackers = find_trackers(report_to) or None
    return Accelerator(cpu=_shared_cpu(), mixed_precision=precision, log_with=trackers, project_dir=logs)


def _shared_cpu() -> bool:
    """Whether several processes share the CPU; accelerate does not find that out by itself."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available()


def seed_everything(seed: int) -> None:
    """Seed python, numpy (modulo 2^32) and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers, and the machine."""

    def version_of(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return MISSING

    found = {"prefcls-lib": prefcls_lib.__version__, "commit": library_commit(), "python": platform.python_version()}
    return found | {name: version_of(name) for name in PACKAGES} | {"machine": machine_name()}


def machine_name() -> str:
    """A short name of the device that computes: the GPUs, or the CPU and its cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively (AVX512-BF16, AMX, or ARM BF16)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="ignore")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "").split()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))
