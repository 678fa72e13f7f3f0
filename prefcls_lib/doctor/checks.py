"""`prefcls doctor`, and the notebooks' first look: can this machine do the job, before anything is spent on it."""

import importlib.metadata
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from packaging.version import Version

from prefcls_lib.config import RunConfig
from prefcls_lib.data.loading import read_rows, sample_path
from prefcls_lib.data.tokenization import encode_rows
from prefcls_lib.doctor import capacity
from prefcls_lib.models.backbones import Backbone, load_backbone, load_encoder
from prefcls_lib.runtime import devices, kaggle
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training.step import SMALLEST_MICRO_BATCH

# package: (oldest that works, newest tested)
SUPPORTED = {
    "torch": ("2.6", "2.13.0"),
    "transformers": ("5.0", "5.23.0"),
    "accelerate": ("1.1", "1.15.0"),
    "safetensors": ("0.4", "0.8.0"),
    "numpy": ("1.26", "2.4.6"),
    "pandas": ("2.2.2", "3.1.1"),
    "scikit-learn": ("1.5", "1.9.1"),
}
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
KAGGLE_HOURS, KAGGLE_RERUN_HOURS = 12.0, 9.0
LARGEST_PRECISION_ERROR = 0.05  # of the largest fp32 value, in the embedding of one side
MANY_UNKNOWN = 0.2  # share of unknown tokens from which a script is a hole to the backbone
SCRIPTS = {
    "latin": "Where is the nearest railway station, please?",
    "accents": "Où est la gare la plus proche, s'il vous plaît ? Größe, año",
    "cyrillic": "Где находится ближайшая железнодорожная станция?",
    "greek": "Πού είναι ο πλησιέστερος σταθμός;",
    "chinese": "请问最近的火车站在哪里？",
    "japanese": "一番近い駅はどこですか。",
    "korean": "가장 가까운 기차역이 어디에 있나요?",
    "arabic": "أين أقرب محطة قطار من فضلك؟",
    "hebrew": "איפה תחנת הרכבת הקרובה?",
    "devanagari": "निकटतम रेलवे स्टेशन कहाँ है?",
    "thai": "สถานีรถไฟที่ใกล้ที่สุดอยู่ที่ไหน",
    "emoji": "😀 🚆 👍🏽",
}


@dataclass(frozen=True)
class Check:
    """One finding. state: "ok"; "note", worth knowing; "bad", this machine cannot do the job as it is."""

    name: str
    state: str
    finding: str
    advice: str = ""


def examine(backbone: str | None = None, out: str | Path = ".", max_length: int | None = None) -> list[Check]:
    """All checks, none of which writes anything.

    Args:
        backbone: the one to be trained; None leaves out what depends on it.
        out: where the run folder will be, for the room on its disk.
        max_length: tokens of one side, for the memory; None: the default setting.
    """
    checks = [check_python(sys.version_info[:2]), check_packages(installed_versions()), check_library(), check_gpu()]
    runs_on_device = checks[-1].state != "bad"
    checks += [check_inputs(), check_internet(), check_time()]
    if backbone is None:
        return checks
    try:
        found = load_backbone(backbone, max_length or 16)
    except UserError as error:
        return [*checks, Check("backbone", "bad", str(error))]
    checks += [Check("backbone", "ok", str(found.path)), check_tokenizer(found), check_disk(found, Path(out))]
    if runs_on_device:
        checks += [check_memory(found, max_length), check_precision(found)]
    return checks


def is_usable(checks: list[Check]) -> bool:
    """Whether nothing is bad."""
    return all(check.state != "bad" for check in checks)


def checks_table(checks: list[Check]) -> pd.DataFrame:
    """One line a check."""
    return pd.DataFrame([asdict(check) for check in checks]).set_index("name")


def format_checks(checks: list[Check]) -> str:
    """The checks as text for a terminal."""
    lines = []
    for check in checks:
        first, *more = f"{check.finding} {check.advice}".strip().splitlines()
        lines += [f"{check.state:5}{check.name:12}{first}", *(f"{'':17}{line}" for line in more)]
    return "\n".join(lines)


def first_look(backbone: str | None = None, out: str | Path = ".", max_length: int | None = None):
    """The notebooks' first cell with the library: the checks as a table; a bad one stops the notebook.

    Raises:
        UserError: what is bad, with the way out.
    """
    checks = examine(backbone, out, max_length)
    bad = [check for check in checks if check.state == "bad"]
    if bad:
        raise UserError("this machine cannot do the job as it is:\n" + format_checks(bad))
    table = checks_table(checks)
    return table.style.set_properties(**{"text-align": "left", "white-space": "pre-wrap"})


def check_python(version: tuple[int, int]) -> Check:
    """Python's version against the supported range."""
    text = ".".join(map(str, version))
    if version < OLDEST_PYTHON:
        return Check("python", "bad", text, f"Python {'.'.join(map(str, OLDEST_PYTHON))} or newer is needed.")
    if version > NEWEST_PYTHON:
        return Check("python", "note", text, f"Newer than tested ({'.'.join(map(str, NEWEST_PYTHON))}).")
    return Check("python", "ok", text)


def installed_versions() -> dict[str, str | None]:
    """Versions of the packages in SUPPORTED; None where one is missing."""
    found: dict[str, str | None] = {}
    for name in SUPPORTED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def check_packages(installed: dict[str, str | None]) -> Check:
    """Package versions against the supported range."""
    finding = ", ".join(f"{name} {version or 'missing'}" for name, version in installed.items())
    old = [f"{name}>={SUPPORTED[name][0]}" for name, version in installed.items()
           if version is None or Version(version) < Version(SUPPORTED[name][0])]  # fmt: skip
    new = [f"{name} {SUPPORTED[name][1]}" for name, version in installed.items()
           if version is not None and Version(Version(version).base_version) > Version(SUPPORTED[name][1])]  # fmt: skip
    if old:
        return Check("packages", "bad", finding, f"Install {' '.join(old)}; on Kaggle choose the latest environment.")
    if new:
        return Check("packages", "note", finding, f"Newer than tested: {', '.join(new)} was the newest.")
    return Check("packages", "ok", finding)


def check_library() -> Check:
    """Which copy of the library runs, of which commit, and whether attached copies agree with it."""
    versions = devices.versions()
    place = Path(kaggle.__file__).parents[1]
    finding = f"prefcls-lib {versions['prefcls-lib']}, commit {versions['commit']}, in {place}"
    commits = kaggle.attached_commits()
    if len(set(commits.values()) - {versions["commit"]}) and commits:
        listed = ", ".join(f"{path} ({commit})" for path, commit in commits.items())
        return Check("library", "note", finding, f"Attached in several versions: {listed}. Detach all but one.")
    return Check("library", "ok", finding)


def check_gpu() -> Check:
    """Whether there is a GPU and this torch has code for it: one that it lacks fails at the first operation."""
    if not torch.cuda.is_available():
        advice = "Training the three backbones needs a GPU: on Kaggle choose Settings, Accelerator, GPU T4 x2."
        return Check("gpu", "note", devices.machine_name(), advice)
    for index in range(torch.cuda.device_count()):
        capability, built = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
        if not capacity.can_run(capability, built):
            name = torch.cuda.get_device_name(index)
            finding = f"{name} is sm_{capability[0]}{capability[1]}; torch {torch.__version__} has {' '.join(built)}"
            advice = (
                "This torch cannot run on it. On Kaggle choose Settings, Accelerator, GPU T4 x2; elsewhere install a "
            )
            return Check("gpu", "bad", finding, f"{advice}torch built for it (for a P100 the cu126 build).")
    try:
        torch.ones(8, device="cuda").sum().item()
    except RuntimeError as error:
        finding = f"{devices.machine_name()}: the first operation fails ({str(error).splitlines()[0]})"
        return Check("gpu", "bad", finding, "Restart the session; choose GPU T4 x2.")
    bf16 = "native" if torch.cuda.is_bf16_supported(including_emulation=False) else "only emulated: fp16 is used"
    return Check("gpu", "ok", f"{devices.machine_name()}, bf16 {bf16}")


def check_inputs() -> Check:
    """Which of a job's files are attached."""
    found, missing = [], []
    for name in ("train.csv", "test.csv"):
        try:
            found.append(str(kaggle.find_competition_file(name)))
        except UserError as error:
            missing.append(str(error))
    runs = kaggle.attached_runs()
    found += [f"run {run}" for run in runs]
    try:
        blend = kaggle.find_blend()
        found += [str(blend)] if blend else []
    except UserError as error:
        return Check("inputs", "bad", str(error))
    twice = [text for text in missing if "more than once" in text]
    if twice or (missing and kaggle.on_kaggle()):
        return Check("inputs", "bad", (twice or missing)[0])
    return Check("inputs", "ok", "\n".join(found) or "nothing is attached; name files by their paths")


def check_internet() -> Check:
    """Whether the model hub can be reached; in the competition's notebooks it must not be."""
    online = _answers_in_time(lambda: socket.create_connection(("huggingface.co", 443), timeout=2).close(), seconds=3)
    if online and kaggle.on_kaggle():
        return Check("internet", "note", "on", "The competition refuses notebooks with internet: turn it off.")
    return Check("internet", "ok", "on, the hub is reached" if online else "off: everything must be attached or local")


def check_time() -> Check:
    """How much of the session is left, where there is a limit."""
    if not kaggle.on_kaggle():
        return Check("time", "ok", "no limit known")
    limit = KAGGLE_RERUN_HOURS if kaggle.is_competition_rerun() else KAGGLE_HOURS
    left = limit - kaggle.session_seconds() / 3600
    finding = f"{left:.1f} h of {limit:.0f} left, counted from the start of this machine's first process"
    return Check("time", "ok" if left > 1 else "note", finding, "" if left > 1 else "Set time_budget_hours below it.")


def check_tokenizer(backbone: Backbone) -> Check:
    """The share of unknown tokens by script; that the special tokens are in place was checked at loading."""
    tokenizer = backbone.tokenizer
    shares = {}
    for script, text in SCRIPTS.items():
        ids = tokenizer.encode_texts([text])[0]
        shares[script] = float((ids == tokenizer.tokenizer.unk_token_id).mean()) if len(ids) else 1.0
    finding = "unknown tokens: " + ", ".join(f"{script} {share:.0%}" for script, share in shares.items())
    holes = [script for script, share in shares.items() if share > MANY_UNKNOWN]
    if holes:
        advice = f"It does not know {', '.join(holes)}; the structure features still see those answers."
        return Check("tokenizer", "note", finding, advice)
    return Check("tokenizer", "ok", finding)


def check_disk(backbone: Backbone, out: Path) -> Check:
    """Room for the training state (two copies while a new one is written) and for the weights of a fold."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    state, weights = capacity.state_bytes(backbone.config), capacity.weight_bytes(backbone.config)
    finding = (
        f"{free / 1e9:.1f} GB free at {place}; a fold needs about {state / 1e9:.1f} GB of training state, twice while "
        f"it is saved, and {weights / 1e9:.1f} GB of weights"
    )
    if free < 2 * state + weights:
        return Check("disk", "bad", finding, "Free some space, or name another folder with --out.")
    return Check("disk", "ok", finding)


def check_memory(backbone: Backbone, max_length: int | None = None) -> Check:
    """The most tokens that a micro-batch can hold, from the architecture's size and the free memory.

    Args:
        backbone: the one to be trained.
        max_length: tokens of one side; None: the default setting, or as many as the backbone takes.
    """
    max_length = max_length or min(RunConfig.max_length, backbone.max_length or RunConfig.max_length)
    device = devices.make_accelerator("auto").device
    free = capacity.free_bytes(device)
    half = devices.choose_precision("auto", device) != "no"
    tokens, checkpointed = (
        capacity.largest_micro_step(backbone.config, free, half, max_length, checkpointing)
        for checkpointing in (False, True)
    )
    recipe = backbone.recipe("default")["max_tokens_per_micro_step"]
    finding = (
        f"{free / 1e9:.1f} GB free on {device.type}: about {tokens:,} tokens in a micro-batch (recipe: {recipe:,}) of "
        f"sides of {max_length}"
    )
    if checkpointed < SMALLEST_MICRO_BATCH:
        return Check("memory", "bad", finding, "Too small for this backbone: choose a smaller one.")
    if tokens < 2 * max_length:
        advice = (
            f"Two full sides do not fit: set gradient_checkpointing=true (about {checkpointed:,} tokens) and "
            f"max_tokens_per_micro_step={min(checkpointed, 8192) // 256 * 256}, or max_length lower."
        )
        return Check("memory", "note", finding, advice)
    if tokens < recipe:
        return Check("memory", "note", finding, f"Set max_tokens_per_micro_step={tokens // 256 * 256}.")
    return Check("memory", "ok", finding)


def check_precision(backbone: Backbone) -> Check:
    """One forward pass in the precision that would be used against fp32."""
    accelerator = devices.make_accelerator("auto")
    precision = accelerator.mixed_precision
    if precision == "no":
        return Check("precision", "ok", "fp32")
    rows = read_rows(sample_path("test"), labelled=False)
    encoded = encode_rows(rows, backbone.tokenizer, min(64, backbone.max_length or 64), "none")
    ids = torch.as_tensor(encoded.token_ids[-1], device=accelerator.device, dtype=torch.long)[None]
    encoder = load_encoder(backbone.path, dropout=0.0).to(accelerator.device).eval()
    with torch.inference_mode():
        exact = encoder(input_ids=ids).last_hidden_state.float().mean(1)
        with accelerator.autocast():
            mixed = encoder(input_ids=ids).last_hidden_state.float().mean(1)
    error = float((mixed - exact).abs().max() / exact.abs().max())
    finding = f"{precision} differs from fp32 by {error:.1e} of the largest value of an embedding"
    if not error <= LARGEST_PRECISION_ERROR:  # also true for NaN
        return Check("precision", "bad", finding, "Set mixed_precision=no.")
    return Check("precision", "ok", finding)


def _answers_in_time(action: Callable[[], object], seconds: float) -> bool:
    """Whether `action` ends without an OSError within `seconds`; a name server that never answers is left behind."""
    done = threading.Event()

    def run() -> None:
        try:
            action()
            done.set()
        except OSError:
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return done.is_set()
