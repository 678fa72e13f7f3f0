"""What a GPU makes of this kit: speed, memory, precision, waits and a resume, each with a verdict.

    make gpu-check                                   about eight minutes on one GPU (an estimate: nobody has run it yet)
    python -m report.studies.gpu_check --out DIR     gpu_check.json and gpu_check.md in DIR, not beside this file

The architectures are exact, their weights random, so nothing is downloaded; sides have 512 tokens, every eighth fewer.
Training is the library's own `fit`, at the recipe's settings. Exit code 0: every verdict is ok; 1: one is not; 2:
there is no GPU.
"""

import argparse
import gc
import math
import sys
import threading
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoModel, PretrainedConfig

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples
from prefcls_lib.doctor import capacity, checks
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import predict_proba
from prefcls_lib.models.recipes import choose_recipe
from prefcls_lib.runtime import devices
from prefcls_lib.runtime.files import write_json, write_text
from prefcls_lib.training.checkpoint import Session, Stopped, TrainingState
from prefcls_lib.training.loop import fit
from report.page import fill_template
from report.studies.benchmark import timed
from report.studies.t4_plan import flop_per_token, read_config

FOLDER = Path(__file__).parent
NAMES = ("deberta-v3-xsmall", "roberta-base", "electra-large-discriminator", "deberta-v3-large")
LENGTH, PAIRS = 512, 16  # tokens of a side; pairs of an optimizer step
WARM_UP, TIMED = 2, 4  # steps
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
# What a verdict asks for.
MOST_OF_PLAN = 1.1  # of the planned peak memory
MOST_WAITS = 6  # a step: the norm of the gradients, the scaler's two, and what the profiler adds
MOST_SKIPPED = 3  # steps, until the scaler of fp16 has found its scale
LARGEST_PRECISION_ERROR = 0.05  # of the largest fp32 value, in an embedding
LARGEST_RESUME_DIFFERENCE = 0.1  # of what three steps change: a GPU's kernels are not deterministic


class Job:
    """One architecture at the recipe's settings, and pairs of random sides with random labels."""

    def __init__(self, config: PretrainedConfig, length: int, accelerator: Accelerator):
        settings = RunConfig(batch_size=PAIRS, max_length=length, num_epochs=1, validations_per_epoch=1)
        self.settings = settings.with_recipe(choose_recipe(config))
        self.config, self.length, self.accelerator = config, length, accelerator
        random, places = np.random.default_rng(0), np.arange(2 * PAIRS * TIMED)
        sizes = length - length // 8 * (places % 8 == 7)  # every eighth side is an eighth shorter
        ids = [random.integers(10, config.vocab_size, size).astype(np.int32) for size in sizes]
        self.rows = Examples(ids, places.reshape(-1, 2), random.integers(0, 3, PAIRS * TIMED))

    def make_model(self) -> PreferenceModel:
        """A network with random weights, the same each time."""
        torch.manual_seed(0)
        has_pooler = self.config.model_type in ("bert", "roberta", "xlm-roberta", "mpnet")
        encoder = AutoModel.from_config(self.config, **{"add_pooling_layer": False} if has_pooler else {}).train()
        return PreferenceModel(RunConfig(), encoder)

    def train(self, model: PreferenceModel, steps: int, session: Session | None = None) -> TrainingState:
        """`fit` for so many steps."""
        rows = self.rows.take(slice(PAIRS * steps))
        return fit(model, rows, rows.take(slice(8)), self.settings, self.accelerator, session=session)


def count_waits(job: Job, steps: int) -> np.ndarray:
    """How often the host waits for the GPU in a training, as the profiler sees it; passes of the encoder."""
    model, passes = job.make_model(), []
    model.encoder.register_forward_pre_hook(lambda *_: passes.append(1))
    with torch.profiler.profile() as profile:  # of CPU and GPU
        job.train(model, steps)
    return np.array([sum(event.count for event in profile.key_averages() if event.key in WAITS), len(passes)])


def matrix_peak(accelerator: Accelerator, size: int, repeats: int = 8) -> float:
    """Operations a second in large matrix products in the accelerator's precision, the best of `repeats`."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]
    a, b = (torch.randn(size, size, device=accelerator.device).to(dtype) for _ in range(2))
    return max(2 * size**3 / timed(accelerator.device, lambda: a @ b) for _ in range(repeats))


def precision_error(model: PreferenceModel, rows: Examples, accelerator: Accelerator) -> float:
    """Largest difference of an embedding from fp32's, as a share of the largest value."""
    sides = [6, 7], int(rows.lengths.max()), rows.token_ids, accelerator.device
    with torch.inference_mode():
        exact = model.eval().embed(*sides)
        with accelerator.autocast():
            mixed = model.embed(*sides)
    return float((mixed - exact).abs().max() / exact.abs().max())


def measure(job: Job, peak: float) -> dict:
    """Training and prediction; what only a GPU has is None on a CPU. `peak`: operations a second of `matrix_peak`."""
    cuda = job.accelerator.device.type == "cuda"
    job.train(job.make_model(), WARM_UP)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    model = job.make_model()
    result = job.train(model, TIMED)
    peak_gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    last = result.history.iloc[-1]
    predict = lambda: predict_proba(model, job.rows, job.accelerator)  # noqa: E731
    predict()
    predicted = int(job.rows.lengths.sum()) / timed(job.accelerator.device, predict)
    trained = result.tokens.real / result.step_seconds
    error = precision_error(model, job.rows, job.accelerator)
    few, many = (count_waits(job, steps) for steps in (1, 3))  # what a training has once is in both
    waits, passes = (many - few) / 2
    flop, tokens = flop_per_token(job.config, job.length), job.settings.max_tokens_per_micro_step
    given = job.config, job.accelerator.mixed_precision != "no"
    planned = capacity.fixed_bytes(*given) + tokens * capacity.bytes_per_token(*given, job.length)
    return {
        "finite": all(map(math.isfinite, last[["train_log_loss", "gradient_norm"]].astype(float))),
        "skipped_steps": int(last["skipped_steps"]), "precision_error": error,
        "train_tokens_per_second": trained, "predict_tokens_per_second": predicted,
        "train_peak_share": 3 * flop * trained / peak,  # a backward pass is two forward passes
        "predict_peak_share": flop * predicted / peak,
        "waits_per_step": float(waits) if cuda else None, "padded_batches_per_step": float(passes),
        "peak_gib": peak_gib, "planned_gib": planned / 2**30,
    }  # fmt: skip


def judge(line: dict, config: PretrainedConfig) -> str:
    """ "ok", or what is wrong with a line of `measure`."""
    of_transformers = line["padded_batches_per_step"] if config.model_type == "deberta-v2" else 0
    wrong = {
        "loss or gradient is not finite": not line["finite"],
        "too many steps skipped": line["skipped_steps"] > MOST_SKIPPED,
        "16 bits differ too much from fp32": not line["precision_error"] <= LARGEST_PRECISION_ERROR,
        "more memory than planned": (line["peak_gib"] or 0) > MOST_OF_PLAN * line["planned_gib"],
        "too many waits": (line["waits_per_step"] or 0) > MOST_WAITS + of_transformers,
    }
    return "; ".join(what for what, found in wrong.items() if found) or "ok"


def check_resume(job: Job) -> dict:
    """Three steps at once, and three of which the first was in a session that was asked to stop: the same weights?"""
    whole, asked = job.make_model(), threading.Event()
    job.train(whole, 3)
    asked.set()
    with TemporaryDirectory() as temporary:
        with suppress(Stopped):
            job.train(job.make_model(), 3, Session(Path(temporary) / "state", stop=asked))
        resumed = job.make_model()
        job.train(resumed, 3, Session(Path(temporary) / "state"))
    models = (job.make_model().to(job.accelerator.device), whole, resumed)
    start, one, other = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    difference = float((one - other).norm() / (one - start).norm())
    return {"difference": difference, "verdict": "ok" if difference <= LARGEST_RESUME_DIFFERENCE else "weights differ"}


def check_device(configs: dict[str, PretrainedConfig], precisions: list[str], length: int, matrix: int) -> dict:
    """All measurements: what gpu_check.json holds."""
    record = {"versions": devices.versions(), "length": length, "lines": []}
    record["doctor"] = [vars(check) for check in checks.examine()]
    for precision in precisions:
        accelerator = devices.make_accelerator(precision)
        peak = matrix_peak(accelerator, matrix)
        for name, config in configs.items():
            line = measure(Job(config, length, accelerator), peak)
            line |= {"backbone": name, "precision": precision, "matrix_peak": peak, "verdict": judge(line, config)}
            record["lines"].append(line)
            print(f"{name}, {precision}: {line['verdict']}", flush=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    job = Job(next(iter(configs.values())), length, devices.make_accelerator(precisions[0]))
    return record | {"resume": check_resume(job)}


def main(argv: list[str] | None = None) -> int:
    """Measure, write, print; see the exit codes above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of gpu_check.json and gpu_check.md")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu-check: this machine has no GPU that torch can use. Run it on one that has.", file=sys.stderr)
        return 2
    precisions = ["fp16", *(["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else [])]
    record = check_device({name: read_config(name, dropout=0.0) for name in NAMES}, precisions, LENGTH, 4096)
    write_json(arguments.out / "gpu_check.json", record)
    text = fill_template(FOLDER / "gpu_check_template.md", record | {"nan": math.nan}) + "\n"
    write_text(arguments.out / "gpu_check.md", text)
    print(text)
    is_ok = all(line["verdict"] == "ok" for line in (*record["lines"], record["resume"]))
    return 0 if is_ok and all(check["state"] != "bad" for check in record["doctor"]) else 1


if __name__ == "__main__":
    sys.exit(main())
