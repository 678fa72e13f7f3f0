"""Where the code runs: the only room that knows Kaggle. Inputs, output folder, device, precision, seeds, versions."""

import importlib.metadata
import os
import platform
import random
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from prefcls_lib.files import UserError

COMPETITION = "llm-classification-finetuning"
PACKAGES = ("prefcls-lib", "torch", "transformers", "tokenizers", "accelerate", "safetensors",
            "numpy", "pandas", "scikit-learn")  # fmt: skip


def input_root() -> Path:
    """Where attached inputs are mounted: /kaggle/input, or the folder named by PREFCLS_INPUT_ROOT."""
    return Path(os.environ.get("PREFCLS_INPUT_ROOT", "/kaggle/input"))


def on_kaggle() -> bool:
    """Whether this is a Kaggle notebook machine."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def default_out(backbone: str) -> Path:
    """The run folder for `out="auto"`: /kaggle/working on Kaggle, else runs/<backbone>."""
    return Path("/kaggle/working") if on_kaggle() else Path("runs") / Path(backbone).name


def find_competition_file(name: str) -> Path:
    """The attached competition's train.csv or test.csv.

    Raises:
        UserError: not attached; the message lists what was tried.
    """
    folders = [
        f"competitions/{COMPETITION}",
        COMPETITION,
        f"competitions/{COMPETITION}/*",
        f"{COMPETITION}/*",
    ]
    tried = [f"{folder}/{name}{zipped}" for folder in folders for zipped in ("", ".gz")]
    for pattern in tried:
        for path in sorted(input_root().glob(pattern)):
            return path
    places = "\n  ".join(str(input_root() / pattern) for pattern in tried)
    raise UserError(
        f"the competition's {name} was not found. Tried:\n  {places}\n"
        f"On Kaggle attach the competition {COMPETITION!r} as an input; elsewhere name a CSV file, or sample for "
        "the shipped rows."
    )


def choose_precision(setting: str, device: torch.device) -> str:
    """The mixed precision for `device`: "no", "bf16" or "fp16".

    "auto" is bf16 where the hardware has it natively (emulation is slower than fp32), fp16 on other CUDA GPUs, and
    fp32 elsewhere.

    Raises:
        UserError: "fp16" on a CPU, where it is slower and less stable than both others.
    """
    if setting == "fp16" and device.type != "cuda":
        raise UserError("setting mixed_precision='fp16': needs a CUDA GPU. Use auto, bf16 or no.")
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "no"


def make_accelerator(mixed_precision: str) -> Accelerator:
    """The engine for device, autocast and gradient scaling; a new one may choose another precision."""
    AcceleratorState._reset_state(reset_partial_state=False)
    probe = PartialState()
    return Accelerator(mixed_precision=choose_precision(mixed_precision, probe.device))


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers, and the machine."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    found["machine"] = machine_name()
    return found


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
