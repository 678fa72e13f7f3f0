"""`prefcls doctor`, and the notebooks' first look: can this machine do the job, before anything is spent on it."""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from packaging.version import Version

from prefcls_lib.config import RunConfig
from prefcls_lib.data.loading import locate_csv
from prefcls_lib.doctor import capacity
from prefcls_lib.models.backbones import Backbone, load_backbone
from prefcls_lib.models.reward import check_reward_model
from prefcls_lib.pipeline.launch import count_processes
from prefcls_lib.runtime import devices, kaggle
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training.step import SMALLEST_MICRO_BATCH

# (oldest that works, newest tested)
SUPPORTED = {
    "python": ("3.11", "3.13"), "torch": ("2.6", "2.13.0"), "transformers": ("5.0", "5.23.0"),
    "accelerate": ("1.1", "1.15.0"), "safetensors": ("0.4", "0.8.0"), "numpy": ("1.26", "2.4.6"),
    "pandas": ("2.2.2", "3.1.1"), "scikit-learn": ("1.5", "1.9.1"),
}  # fmt: skip
MANY_UNKNOWN = 0.2  # share of unknown tokens from which a backbone cannot read a script
MOST_CPU_ROWS, BYTES_OF_A_ROW = 2_000, 3_200  # a CPU trains on more for hours; the competition's file has 184 MB
CHOOSE_GPU = (
    "choose Settings, Accelerator, GPU T4 x2. A kernel that was sent for one has none while the account's phone is not "
    "verified: kaggle.com/settings."
)
SCRIPTS = {
    "latin": "Where is the railway station?", "accents": "Où est la gare ? Größe, año", "cyrillic": "Где станция?",
    "greek": "Πού είναι ο σταθμός;", "chinese": "请问最近的火车站在哪里？", "japanese": "一番近い駅はどこですか。",
    "korean": "가장 가까운 기차역이 어디에 있나요?", "arabic": "أين أقرب محطة قطار؟", "hebrew": "איפה תחנת הרכבת?",
    "devanagari": "निकटतम रेलवे स्टेशन कहाँ है?", "thai": "สถานีรถไฟอยู่ที่ไหน", "emoji": "😀 🚆 👍🏽",
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One finding. state: "ok"; "note", to be known; "bad", this machine cannot do the job as it is."""

    name: str
    state: str
    finding: str
    advice: str = ""


def examine(config: RunConfig | None = None) -> list[Check]:
    """All checks, none of which writes anything; `config`: of the run to come, None leaves out what depends on it."""
    gpu, versions = check_gpu(config), devices.versions()
    library = f"{versions['prefcls-lib']}, commit {versions['commit']}, in {Path(kaggle.__file__).parents[1]}"
    checks = [check_packages(versions), Check("library", "ok", library), check_inputs(), gpu]
    if config is None:
        return checks
    try:
        backbone = load_backbone(config.init_from or config.backbone, config.max_length)
        if config.init_from is not None:
            check_reward_model(backbone.path, backbone.config)
        config = config.with_recipe(backbone.recipe)
        checks += [Check("backbone", "ok", str(backbone.path)), check_tokenizer(backbone), check_disk(backbone, config)]
        accelerator = devices.make_accelerator(config.mixed_precision)
    except UserError as error:
        return [*checks, Check("settings", "bad", str(error))]
    return checks if gpu.state == "bad" else [*checks, check_memory(backbone, config, accelerator)]


def format_checks(checks: list[Check]) -> str:
    """The checks as text for a terminal."""
    lines = []
    for check in checks:
        first, *more = (f"{check.finding}. {check.advice}" if check.advice else check.finding).splitlines()
        lines += [f"{check.state:5}{check.name:12}{first}", *(f"{'':17}{line}" for line in more)]
    return "\n".join(lines)


def first_look(config: RunConfig | None = None):
    """The notebooks' first cell with the library: the checks as a table.

    A bad one stops the notebook, but not a competition rerun, where any submission is better than none.
    """
    checks = examine(config)
    bad = [check for check in checks if check.state == "bad"]
    if bad and not kaggle.is_competition_rerun():
        raise UserError("this machine cannot do the job as it is:\n" + format_checks(bad))
    table = pd.DataFrame(checks).set_index("name")
    return table.style.set_properties(**{"text-align": "left", "white-space": "pre-wrap"})


def check_packages(installed: dict[str, str]) -> Check:
    """The versions of Python and packages that `devices.versions` found, against the supported range."""
    finding = ", ".join(f"{name} {installed[name]}" for name in SUPPORTED)
    old, new = [], []
    for name, (oldest, newest) in SUPPORTED.items():
        found, tested = Version(installed[name]).release, Version(newest).release
        if found < Version(oldest).release:
            old.append(f"{name}>={oldest}")
        elif found[: len(tested)] > tested:
            new.append(f"{name} {newest}")
    if old:
        return Check("packages", "bad", finding, f"Install {' '.join(old)}; on Kaggle choose the latest environment.")
    advice = f"Newer than tested: {', '.join(new)} was the newest." if new else ""
    return Check("packages", "note" if new else "ok", finding, advice)


def check_gpu(config: RunConfig | None = None) -> Check:
    """Whether there is a GPU on which this torch computes: without code for it (P100), the first operation fails."""
    if not torch.cuda.is_available():
        advice, rows = f"Training the three backbones needs a GPU: on Kaggle {CHOOSE_GPU}", 0.0
        if config is not None and kaggle.on_kaggle():
            with suppress(OSError, UserError):  # another check reports it
                rows = locate_csv(config.train, "train").stat().st_size / BYTES_OF_A_ROW
            rows = min(rows, config.max_train_rows or rows)
        return Check("gpu", "bad" if rows > MOST_CPU_ROWS else "note", devices.machine_name(), advice)
    try:
        torch.ones(8, device="cuda").sum().item()
    except RuntimeError as error:
        finding = f"{devices.machine_name()}: the first operation fails ({str(error).splitlines()[0]})"
        advice = "Restart the session. If it fails again, elsewhere install a torch built for this GPU; on Kaggle "
        return Check("gpu", "bad", finding, advice + CHOOSE_GPU)
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    finding = f"{devices.machine_name()}, bf16 {'native' if native else 'only emulated: fp16 is used'}"
    if kaggle.on_kaggle() and torch.cuda.device_count() == 1:
        return Check("gpu", "note", finding, "One GPU; GPU T4 x2 has two.")
    return Check("gpu", "ok", finding)


def check_inputs() -> Check:
    """Which of a job's files are attached."""
    try:
        found = [*map(kaggle.find_competition_file, ("train.csv", "test.csv")), kaggle.find_blend()]
    except UserError as error:
        if kaggle.on_kaggle() or "more than once" in str(error):
            return Check("inputs", "bad", str(error))
        found = []
    lines = [*(str(path) for path in found if path), *(f"run {run}" for run in kaggle.attached_runs())]
    return Check("inputs", "ok", "\n".join(lines) or "nothing is attached; name files by their paths")


def check_tokenizer(backbone: Backbone) -> Check:
    """The share of unknown tokens by script; that the special tokens are in place was checked at loading."""
    encode, unknown_id = backbone.tokenizer.encode_texts, backbone.tokenizer.tokenizer.unk_token_id
    ids = {script: encode([text])[0] for script, text in SCRIPTS.items()}
    shares = {script: float((found == unknown_id).mean()) if len(found) else 1.0 for script, found in ids.items()}
    finding = "unknown tokens: " + ", ".join(f"{script} {share:.0%}" for script, share in shares.items())
    unknown = ", ".join(script for script, share in shares.items() if share > MANY_UNKNOWN)
    advice = f"It does not know {unknown}; the baseline still sees those answers." if unknown else ""
    return Check("tokenizer", "note" if unknown else "ok", finding, advice)


def check_disk(backbone: Backbone, config: RunConfig) -> Check:
    """Space for the saved models and for the checkpoints of those that are trained at the same time."""
    out = kaggle.run_folder(config.out, config.init_from or config.backbone)
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    kept = [path.stat().st_size for name in ("checkpoint", "model") for path in (out / name).rglob("*")]  # replaced
    free, models = shutil.disk_usage(place).free + sum(kept), len(config.folds) * config.num_seeds
    at_once = min(models, count_processes(config.num_processes))
    needed, one = (capacity.disk_bytes(backbone.config, models, number) for number in (at_once, 1))
    finding = (
        f"{free / 1e9:.1f} GB at {place}; {needed / 1e9:.1f} GB needed: models to save: {models}, trained at the same "
        f"time: {at_once}, each with two checkpoints while one is written"
    )
    advice = "Free some space, or name another folder with --out."
    if at_once > 1 and free >= one:
        advice = f"Set num_processes=1: one model after the other takes {one / 1e9:.1f} GB. Or free some space."
    return Check("disk", "ok", finding) if free >= needed else Check("disk", "bad", finding, advice)


def check_memory(backbone: Backbone, config: RunConfig, accelerator: Accelerator) -> Check:
    """The most tokens that a micro-batch can hold, from the size of the architecture and the free memory."""
    device, length, wanted = accelerator.device, config.max_length, config.max_tokens_per_micro_step
    given = backbone.config, capacity.free_bytes(device), accelerator.mixed_precision != "no", length
    tokens = capacity.largest_micro_batch(*given, config.gradient_checkpointing)
    checkpointed = capacity.largest_micro_batch(*given, checkpointing=True)
    finding = (
        f"{given[1] / 1e9:.1f} GB free on {device.type}: about {tokens:,} tokens in a micro-batch (setting: "
        f"{wanted:,}) of sides of {length}"
    )
    if checkpointed < SMALLEST_MICRO_BATCH:
        return Check("memory", "bad", finding, "Too small for this backbone: choose a smaller one.")
    advice = "" if tokens >= wanted else f"Set max_tokens_per_micro_step={tokens // 256 * 256 or tokens}."
    if tokens < 2 * length and not config.gradient_checkpointing:
        advice = (
            f"Two full sides do not fit: set gradient_checkpointing=true (about {checkpointed:,} tokens) and "
            f"max_tokens_per_micro_step={min(checkpointed, 8192) // 256 * 256}, or max_length lower."
        )
    return Check("memory", "note" if advice else "ok", finding, advice)
