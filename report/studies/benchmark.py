"""Speed of training and prediction beside what one would use instead, on real rows: interleaved, medians over repeats.

    make benchmark                      MiniLM, 512 tokens, a few minutes on 2 cores

Variants of training (pairs that go through forward, backward and AdamW in a second):

    original   the study's loop: two encoder passes a step, padded to max_length, fp32, dropout 0.1
    trainer    Hugging Face Trainer: the same model, both sides in one pass, dynamic padding, our precision and dropout
    ours       `fit`

and of prediction: original, ours (`predict_proba`, both orders of A and B).
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch import nn

from prefcls_lib.config import RunConfig
from prefcls_lib.data import loading
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.tokenization import encode_rows
from prefcls_lib.evaluation import plots
from prefcls_lib.models.backbones import load_backbone, load_encoder
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import predict_proba
from prefcls_lib.models.recipes import choose_recipe
from prefcls_lib.runtime.devices import make_accelerator, versions
from prefcls_lib.runtime.files import write_json
from prefcls_lib.training.loop import fit
from report.page import draw_svg

OUT = Path(__file__)
LENGTH, REPEATS = 512, 3
PAIRS = {"original": 8, "trainer": 32, "ours": 128}  # a repeat; variants that pad need few
TITLES = {"original": "the study's loop", "trainer": "Hugging Face Trainer", "ours": "this kit"}


class Bench:
    """MiniLM and the rows: what every variant needs, made once."""

    def __init__(self):
        accelerator = make_accelerator("auto")
        self.device, self.precision = accelerator.device, accelerator.mixed_precision
        self.backbone = load_backbone("minilm", LENGTH)
        rows = loading.read_rows(loading.sample_path("train"), labelled=True)
        encoded = encode_rows(rows, self.backbone.tokenizer, LENGTH, "none")
        everything = Examples(encoded.token_ids, encoded.sides, rows["label"].to_numpy())
        order = np.random.default_rng(0).permutation(len(rows))
        self.train, self.valid = everything.take(order[: PAIRS["ours"]]), everything.take(order[PAIRS["ours"] :][:8])
        self.config = RunConfig(max_length=LENGTH, num_epochs=1, validations_per_epoch=1, start_from="none")
        self.config = self.config.with_recipe(choose_recipe(self.backbone.config))

    @property
    def accelerator(self) -> Accelerator:
        """A new one: Trainer resets accelerate's state."""
        return make_accelerator(self.precision)

    def model(self, dropout: float) -> PreferenceModel:
        """A new PreferenceModel on the device."""
        encoder = load_encoder(self.backbone.path, dropout)
        return PreferenceModel(RunConfig(dropout=dropout), encoder).to(self.device)

    def logits(self, model: PreferenceModel, rows: np.ndarray, as_study: bool) -> torch.Tensor:
        """(B, 3): a pass of the encoder a side, padded to LENGTH, as the study's loop has it; or one for both sides,
        padded to the longest."""
        sides = self.train.sides[rows]
        embedded = []
        for places in (sides[:, 0], sides[:, 1]) if as_study else [sides.T.ravel()]:
            ids = [self.train.token_ids[place] for place in places]
            length = LENGTH if as_study else max(map(len, ids))
            embedded.append(model.embed_sides(ids, [([*range(len(ids))], length)], self.device))
        return model.head(*torch.cat(embedded).split(len(rows)))[0]

    def loss(self, logits: torch.Tensor, rows: np.ndarray, label_smoothing: float = 0.0) -> torch.Tensor:
        """Mean cross-entropy of some rows."""
        labels = torch.as_tensor(self.train.labels[rows], device=self.device)
        return nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that `work` takes, with the device's queue empty before and after."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def train_original(bench: Bench) -> tuple[int, float]:
    """A step of the study's loop."""
    model, rows = bench.model(dropout=0.1), np.arange(PAIRS["original"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)

    def step() -> None:
        bench.loss(bench.logits(model, rows, as_study=True), rows, label_smoothing=0.1).backward()
        optimizer.step()

    return len(rows), timed(bench.device, step)


def train_trainer(bench: Bench) -> tuple[int, float]:
    """A step of Hugging Face Trainer: 16 pairs a batch, two batches a step."""
    from transformers import Trainer, TrainingArguments

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bench.model(bench.config.dropout)

        def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
            rows = rows.cpu().numpy()
            return {"loss": bench.loss(bench.logits(self.inner, rows, as_study=False), rows)}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=16, gradient_accumulation_steps=2, num_train_epochs=1,
            bf16=bench.precision == "bf16", fp16=bench.precision == "fp16",
            use_cpu=bench.device.type == "cpu", optim="adamw_torch_fused", report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        collate = lambda rows: {"rows": torch.tensor(rows)}  # noqa: E731
        trainer = Trainer(Wrapped(), arguments, train_dataset=range(PAIRS["trainer"]), data_collator=collate)
        return PAIRS["trainer"], trainer.train().metrics["train_runtime"]


def train_ours(bench: Bench) -> tuple[int, float]:
    """`fit`, the time in training steps."""
    model = bench.model(bench.config.dropout)
    result = fit(model, bench.train, bench.valid, bench.config, bench.accelerator)
    return len(bench.train), result.step_seconds


def predict_original(bench: Bench) -> tuple[int, float]:
    """The study's prediction: padded, fp32."""
    model, rows = bench.model(dropout=0.0).eval(), np.arange(PAIRS["original"])
    with torch.inference_mode():
        return len(rows), timed(bench.device, lambda: bench.logits(model, rows, as_study=True))


def predict_ours(bench: Bench) -> tuple[int, float]:
    """`predict_proba`: each different side once, both orders of A and B."""
    given = bench.model(dropout=0.0), bench.train, bench.accelerator
    return len(bench.train), timed(bench.device, lambda: predict_proba(*given))


VARIANTS = {("train", "original"): train_original, ("train", "trainer"): train_trainer, ("train", "ours"): train_ours,
            ("predict", "original"): predict_original, ("predict", "ours"): predict_ours}  # fmt: skip


def measure(bench: Bench) -> list[dict]:
    """Run the variants in turn, REPEATS times: pairs a second, the median, the slowest and the quickest."""
    found: dict[tuple, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(REPEATS):
        for name, variant in VARIANTS.items():
            pairs, seconds = variant(bench)
            found[name].append(pairs / seconds)
            print(f"  {' '.join(name)} {repeat + 1}/{REPEATS}: {pairs / seconds:.2f} pairs/s", flush=True)
    return [
        {"max_length": LENGTH, "precision": bench.precision, "kind": kind, "variant": variant,
         "pairs_per_second": statistics.median(paces), "slowest": min(paces), "quickest": max(paces)}
        for (kind, variant), paces in found.items()
    ]  # fmt: skip


def draw(lines: list[dict]) -> Figure:
    """Pairs a second of every variant: training above, prediction below."""
    table = pd.DataFrame(lines)
    figure = Figure(figsize=(7.5, 3.0), layout="constrained")
    for axes, (kind, title) in zip(figure.subplots(2), (("train", "training"), ("predict", "prediction")), strict=True):
        part = table[table["kind"] == kind].set_index("variant").iloc[::-1]
        pairs = part["pairs_per_second"]
        errors = np.maximum(0, [pairs - part["slowest"], part["quickest"] - pairs])
        colors = [plots.BLUE if name == "ours" else "#b5b5b5" for name in part.index]
        names = [TITLES[name] for name in part.index]
        axes.barh(names, pairs, color=colors, xerr=errors, error_kw={"lw": 0.8}, height=0.7)
        for place, (name, value) in enumerate(pairs.items()):
            text = f"{value:.2g}" + ("" if name == "ours" else f" (ratio {pairs['ours'] / value:.1f})")
            axes.text(value + errors[1][place] + 0.02 * pairs.max(), place, text, va="center", fontsize=8)
        axes.set(title=f"{title}, MiniLM, {LENGTH} tokens a side", xlim=(0, 1.25 * pairs.max()))
        axes.tick_params(labelsize=9)
    axes.set_xlabel("pairs a second")
    return plots.finish(figure)


def main() -> None:
    """Measure, write, print."""
    lines = measure(Bench())
    write_json(OUT.with_suffix(".json"), {"versions": versions(), "lines": lines})
    OUT.with_suffix(".svg").write_bytes(draw_svg(draw(lines)))
    print(pd.DataFrame(lines).to_string(index=False, float_format="{:,.2f}".format))


if __name__ == "__main__":
    main()
