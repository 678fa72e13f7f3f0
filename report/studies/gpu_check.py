"""What a GPU makes of this kit: speed, memory, precision, waits and a resume, each with a verdict.

    make gpu-check                                   about eight minutes on one GPU (an estimate: nobody has run it yet)
    python -m report.studies.gpu_check --out DIR     gpu_check.json and gpu_check.md in DIR, not beside this file

The architectures are exact, their weights random, so nothing is downloaded; sides have 512 tokens, every eighth fewer.
Training is the library's own `Trainer`, at the recipe's settings. Exit code 0: every verdict is ok; 1: one is not; 2:
there is no GPU.
"""

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModel, PretrainedConfig

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, it finds its neighbours as the tests do

from prefcls_lib.training.state import Session, save_state

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples, make_padded_batches
from prefcls_lib.data.features import SIGNS
from prefcls_lib.doctor import capacity, checks
from prefcls_lib.models.network import PreferenceHead, PreferenceModel
from prefcls_lib.models.predict import predict_proba
from prefcls_lib.models.recipes import choose_recipe
from prefcls_lib.runtime import devices
from prefcls_lib.runtime.files import read_json, write_json, write_text
from prefcls_lib.training.loop import Trainer
from report.page import markdown_table
from report.studies.disentangled import use_fused_attention

FOLDER = Path(__file__).parent
NAMES = ("deberta-v3-xsmall", "roberta-base", "electra-large-discriminator", "deberta-v3-large")
LENGTH, PAIRS = 512, 16  # tokens of a side; pairs of an optimizer step
WARM_UP, TIMED = 2, 4  # steps; one more runs under the profiler
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
# What a verdict asks for.
MOST_OF_PLAN = 1.1  # of the planned peak memory
MOST_WAITS = 6  # a step: the norm of the gradients, the scaler's two, and what the profiler adds
MOST_SKIPPED = 3  # steps, until the scaler of fp16 has found its scale
LARGEST_RESUME_DIFFERENCE = 1e-3  # of the largest weight, after one more step: kernels on a GPU are not deterministic
FUSED_GAIN = 1.5  # from which fused attention is worth its lines in the library


def read_config(name: str) -> PretrainedConfig:
    """A published configuration from report/backbones/, without dropout."""
    config = read_json(FOLDER.parent / "backbones" / f"{name}.json")["config"]
    return AutoConfig.for_model(**{key: 0.0 if "dropout" in key else value for key, value in config.items()})


def make_encoder(config: PretrainedConfig) -> torch.nn.Module:
    """As `load_encoder` would make it, with random weights."""
    extra = {"add_pooling_layer": False} if config.model_type in ("bert", "roberta", "xlm-roberta", "mpnet") else {}
    return AutoModel.from_config(config, **extra).train()


def make_rows(pairs: int, length: int, vocabulary: int) -> Examples:
    """Pairs of random sides of `length` tokens, every eighth side an eighth shorter, with random labels."""
    random = np.random.default_rng(0)
    lengths = [length - length // 8 * (side % 8 == 7) for side in range(2 * pairs)]
    ids = [random.integers(10, vocabulary, size).astype(np.int32) for size in lengths]
    features = random.standard_normal((pairs, len(SIGNS))).astype(np.float32)
    return Examples(ids, np.arange(2 * pairs).reshape(pairs, 2), features, random.integers(0, 3, pairs))


def make_trainer(
    config: PretrainedConfig, length: int, accelerator: Accelerator, steps: int, folder: Path | None = None
) -> Trainer:
    """A trainer at the recipe's settings; `folder`: of a checkpoint to resume from."""
    devices.seed_everything(0)
    settings = RunConfig(batch_size=PAIRS, max_length=length, on_collapse="warn").with_recipe(choose_recipe(config))
    head = PreferenceHead(config.hidden_size, True, True, 0.0)
    model = PreferenceModel(make_encoder(config), head, settings.pooling)
    rows = make_rows(PAIRS * steps, length, config.vocab_size)
    trainer = Trainer(model, rows, rows.take(slice(8)), settings, accelerator, config.pad_token_id, "", Session(folder))
    trainer.start_or_resume()
    return trainer


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that `work` takes, with the device's queue empty before and after."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def matrix_peak(accelerator: Accelerator, size: int, repeats: int = 8) -> float:
    """Operations a second in large matrix products in the accelerator's precision, the best of `repeats`."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]
    a, b = (torch.randn(size, size, device=accelerator.device).to(dtype) for _ in range(2))
    return max(2 * size**3 / timed(accelerator.device, lambda: a @ b) for _ in range(repeats))


def count_waits(work: Callable[[], object]) -> int:
    """How often the host waits for the GPU in `work`, as the profiler sees it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        work()
    return sum(event.count for event in profile.key_averages() if event.key in WAITS)


def precision_error(model: PreferenceModel, rows: Examples, accelerator: Accelerator) -> float:
    """Largest difference of an embedding from fp32's, as a share of the largest value."""
    (batch,) = make_padded_batches(rows.token_ids[6:8], 0, 2, 10**6)
    batch = batch.to(accelerator.device)
    with torch.inference_mode():
        exact = model.eval().embed(batch)
        with accelerator.autocast():
            mixed = model.embed(batch)
    return float((mixed - exact).abs().max() / exact.abs().max())


def measure(config: PretrainedConfig, length: int, accelerator: Accelerator, peak: float) -> dict:
    """Training and prediction of one architecture in one precision; what only a GPU has is None on a CPU.

    Args:
        config: of the encoder.
        length: tokens of a side.
        accelerator: device and precision.
        peak: operations a second of `matrix_peak`.
    """
    cuda, half = accelerator.device.type == "cuda", accelerator.mixed_precision != "no"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer = make_trainer(config, length, accelerator, WARM_UP + TIMED + 1)
    state, batches = trainer.state, trainer.batches()
    planned = capacity.peak_bytes(config, state.max_tokens, half, length)
    for _ in range(WARM_UP):
        trainer.take_step(next(batches))
    before = state.tokens.real
    seconds = timed(accelerator.device, lambda: [trainer.take_step(next(batches)) for _ in range(TIMED)])
    tokens = state.tokens.real - before
    passes = []
    trainer.model.encoder.register_forward_pre_hook(lambda *_: passes.append(1))
    waits = count_waits(lambda: trainer.take_step(next(batches)))
    batches_per_step = len(passes)
    trainer.progress.close()
    rows, pad_id = trainer.train.take(slice(PAIRS)), trainer.pad_id
    predict = lambda: predict_proba(trainer.model, rows, accelerator, pad_id)  # noqa: E731
    predict()
    predicted = int(rows.lengths.sum()) / timed(accelerator.device, predict)
    flop = capacity.flop_per_token(config, length)
    return {
        "loss": state.train_log_loss if math.isfinite(state.train_log_loss) else None,
        "gradient_norm": trainer.norm if math.isfinite(trainer.norm) else None,
        "skipped_steps": state.skipped_steps,
        "precision_error": precision_error(trainer.model, rows, accelerator),
        "train_tokens_per_second": tokens / seconds,
        "train_peak_share": 3 * flop * tokens / seconds / peak,  # a backward pass is two forward passes
        "predict_tokens_per_second": predicted,
        "predict_peak_share": flop * predicted / peak,
        "waits_per_step": waits if cuda else None,
        "padded_batches_per_step": batches_per_step,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "planned_gib": planned / 2**30,
        "max_tokens": state.max_tokens,
        "recipe_max_tokens": trainer.config.max_tokens_per_micro_step,
    }


def judge(line: dict, config: PretrainedConfig) -> str:
    """ "ok", or what is wrong with a line of `measure`."""
    of_transformers = line["padded_batches_per_step"] if config.model_type == "deberta-v2" else 0  # see test_waits.py
    wrong = {
        "loss or gradient is not finite": line["loss"] is None or line["gradient_norm"] is None,
        "too many steps skipped": line["skipped_steps"] > MOST_SKIPPED,
        "16 bits differ too much from fp32": not line["precision_error"] <= checks.LARGEST_PRECISION_ERROR,
        "the recipe's micro-batch does not fit": line["max_tokens"] < line["recipe_max_tokens"],
        "more memory than planned": (line["peak_gib"] or 0) > MOST_OF_PLAN * line["planned_gib"],
        "too many waits": (line["waits_per_step"] or 0) > MOST_WAITS + of_transformers,
    }
    return "; ".join(what for what, found in wrong.items() if found) or "ok"


def check_resume(config: PretrainedConfig, length: int, accelerator: Accelerator) -> dict:
    """A checkpoint after one step, one step more, and the same step by a trainer that resumed from the checkpoint."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "state"
        first = make_trainer(config, length, accelerator, 3)
        batches = first.batches()
        first.take_step(next(batches))
        save_state(folder, first.state, first.model, first.optimizer, accelerator)
        first.take_step(next(batches))
        second = make_trainer(config, length, accelerator, 3, folder)
        step = second.state.step
        second.take_step(next(second.batches()))
        for trainer in (first, second):
            trainer.progress.close()
    weights = [torch.cat([p.detach().flatten() for p in t.model.parameters()]) for t in (first, second)]
    difference = float((weights[0] - weights[1]).abs().max() / weights[0].abs().max())
    ok = step == 1 and difference <= LARGEST_RESUME_DIFFERENCE
    return {"resumed_at_step": step, "difference": difference, "verdict": "ok" if ok else "the weights differ"}


def compare_attention(config: PretrainedConfig, length: int, accelerator: Accelerator) -> dict:
    """Forward and backward passes of a DeBERTa: its own attention, and through PyTorch's fused attention."""
    device, found = accelerator.device, {}
    encoder = make_encoder(config).to(device)
    tokens = choose_recipe(config)["max_tokens_per_micro_step"] // 2
    ids = torch.randint(10, config.vocab_size, (max(1, tokens // length), length), device=device)
    mask = torch.ones_like(ids)

    def passes() -> None:
        encoder.zero_grad()
        with accelerator.autocast():
            hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden.float().mean().backward()

    for kind in ("eager", "fused"):
        if kind == "fused":
            use_fused_attention(encoder)
        passes()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = min(timed(device, passes) for _ in range(TIMED))
        found[f"{kind}_tokens_per_second"] = ids.numel() / seconds
        found[f"{kind}_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    found["gain"] = found["fused_tokens_per_second"] / found["eager_tokens_per_second"]
    return {**found, "verdict": "worth it" if found["gain"] >= FUSED_GAIN else f"under {FUSED_GAIN} times"}


def check_device(configs: dict[str, PretrainedConfig], precisions: list[str], length: int, matrix: int) -> dict:
    """All measurements: what gpu_check.json holds."""
    record = {"versions": devices.versions(), "length": length, "lines": [], "attention": []}
    record["doctor"] = [vars(check) for check in checks.examine()]
    for precision in precisions:
        accelerator = devices.make_accelerator(precision)
        peak = matrix_peak(accelerator, matrix)
        for name, config in configs.items():
            label = {"backbone": name, "precision": precision}
            line = measure(config, length, accelerator, peak)
            record["lines"].append({**label, "matrix_peak": peak, **line, "verdict": judge(line, config)})
            _free_memory()
            if config.model_type == "deberta-v2":
                record["attention"].append({**label, **compare_attention(config, length, accelerator)})
                _free_memory()
            print(f"{name}, {precision}: {record['lines'][-1]['verdict']}", flush=True)
    record["resume"] = check_resume(next(iter(configs.values())), length, devices.make_accelerator(precisions[0]))
    return record


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_ok(record: dict) -> bool:
    """Whether every verdict is ok; the attention's is a finding, not a fault."""
    lines = [*record["lines"], record["resume"]]
    return all(line["verdict"] == "ok" for line in lines) and all(c["state"] != "bad" for c in record["doctor"])


def format_record(record: dict) -> str:
    """The record as Markdown tables."""

    def show(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    lines = [
        (line["backbone"], line["precision"],
         f"{line['train_tokens_per_second']:,.0f} ({line['train_peak_share']:.0%})",
         f"{line['predict_tokens_per_second']:,.0f} ({line['predict_peak_share']:.0%})",
         f"{show(line['peak_gib'], '.1f')} / {line['planned_gib']:.1f}", show(line["waits_per_step"], "d"),
         str(line["skipped_steps"]), f"{line['precision_error']:.1e}", line["verdict"])
        for line in record["lines"]
    ]  # fmt: skip
    attention = [
        (line["backbone"], line["precision"], f"{line['eager_tokens_per_second']:,.0f}",
         f"{line['fused_tokens_per_second']:,.0f}", f"{line['gain']:.2f}",
         f"{show(line['eager_gib'], '.1f')} / {show(line['fused_gib'], '.1f')}", line["verdict"])
        for line in record["attention"]
    ]  # fmt: skip
    header = ("backbone", "precision", "training, tokens/s", "prediction, tokens/s", "peak / planned, GiB",
              "waits a step", "skipped steps", "difference from fp32", "verdict")  # fmt: skip
    heads = ("backbone", "precision", "eager, tokens/s", "fused, tokens/s", "gain", "peak GiB", "verdict")
    bad = [f"{check['name']}: {check['finding']}" for check in record["doctor"] if check["state"] == "bad"]
    parts = [
        "# GPU check",
        f"Measured on {record['versions']['machine']}, torch {record['versions']['torch']}: exact architectures at "
        f"random weights, sides of {record['length']} tokens. In parentheses the share of what the device reaches in "
        "large matrix products.",
        markdown_table(header, lines),
        "DeBERTa's attention, forward and backward passes of the encoder alone:",
        markdown_table(heads, attention),
        "Resumed at step {resumed_at_step}; a step later weights differ by {difference:.1e} of the largest: {verdict}."
        .format(**record["resume"]),
        f"`prefcls doctor`: {'; '.join(bad) or 'ok'}.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print; see the exit codes above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of gpu_check.json and gpu_check.md")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu-check: this machine has no GPU that torch can use. Run it on one that has.", file=sys.stderr)
        return 2
    precisions = ["fp16", *(["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else [])]
    record = check_device({name: read_config(name) for name in NAMES}, precisions, LENGTH, 4096)
    write_json(arguments.out / "gpu_check.json", record)
    write_text(arguments.out / "gpu_check.md", format_record(record))
    print(format_record(record))
    return 0 if is_ok(record) else 1


if __name__ == "__main__":
    sys.exit(main())
