"""Speed of training and prediction beside what one would use instead, on real rows: interleaved, medians over repeats.

    make benchmark                      MiniLM, 512 tokens, a few minutes on 2 cores; ARGS="--lengths 256 512" for more

Variants of training (pairs that go through forward, backward and AdamW in a second):

    original   the study's loop: two encoder passes a step, padded to max_length, fp32, dropout 0.1
    trainer    Hugging Face Trainer: the same model, both sides in one pass, dynamic padding, our precision and dropout
    ours       `fit`

and of prediction: original, ours (`predict_proba`, both orders of A and B).
"""

import argparse
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
from prefcls_lib.models.network import PreferenceHead, PreferenceModel, mean_pool
from prefcls_lib.models.predict import predict_proba
from prefcls_lib.models.recipes import choose_recipe
from prefcls_lib.runtime.devices import choose_precision, make_accelerator, process_state, versions
from prefcls_lib.runtime.files import write_json
from prefcls_lib.training.loop import fit
from report.page import draw_svg

OUT = Path(__file__)
PAIRS = {"original": 8, "trainer": 32, "ours": 128}  # a repeat; variants that pad need few
TITLES = {"original": "the study's loop", "trainer": "Hugging Face Trainer", "ours": "this kit"}


class Bench:
    """MiniLM at one length: what every variant needs, made once."""

    def __init__(self, max_length: int):
        self.max_length, self.device = max_length, process_state().device
        self.precision = choose_precision("auto", self.device)
        self.backbone = load_backbone("minilm", max_length)
        rows = loading.read_rows(loading.sample_path("train"), labelled=True)
        encoded = encode_rows(rows, self.backbone.tokenizer, max_length, "none")
        everything = Examples(encoded.token_ids, encoded.sides, rows["label"].to_numpy())
        order = np.random.default_rng(0).permutation(len(rows))
        self.train, self.valid = everything.take(order[: PAIRS["ours"]]), everything.take(order[PAIRS["ours"] :][:8])
        self.side_tokens = float(everything.lengths.mean())
        self.config = RunConfig(max_length=max_length, num_epochs=1, validations_per_epoch=1, start_from="none")
        self.config = self.config.with_recipe(choose_recipe(self.backbone.config))

    @property
    def accelerator(self) -> Accelerator:
        """A new one: Trainer resets accelerate's state."""
        return make_accelerator(self.precision)

    def model(self, dropout: float) -> PreferenceModel:
        """A new PreferenceModel on the device."""
        encoder = load_encoder(self.backbone.path, dropout)
        head = PreferenceHead(encoder.config.hidden_size, True, dropout)
        return PreferenceModel(encoder, head).to(self.device)

    def padded(self, rows: np.ndarray, side: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and attention_mask (B, length) of one side of some rows."""
        ids = torch.full((len(rows), length), self.backbone.tokenizer.pad_id)
        for line, place in zip(ids, self.train.sides[rows, side], strict=True):
            tokens = torch.as_tensor(self.train.token_ids[place].astype(np.int64))
            line[: len(tokens)] = tokens
        lengths = torch.as_tensor(self.train.lengths[rows, side])
        mask = (torch.arange(length)[None] < lengths[:, None]).long()
        return ids.to(self.device), mask.to(self.device)

    def logits(self, model: PreferenceModel, rows: np.ndarray, passes: list[tuple]) -> torch.Tensor:
        """(B, 3), from passes of the encoder over (input_ids, attention_mask): a pass a side, or one for both."""
        embedded = [mean_pool(model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
                    for ids, mask in passes]  # fmt: skip
        u, v = torch.cat(embedded).split(len(rows))
        return model.head(u, v)

    def loss(self, model: PreferenceModel, rows: np.ndarray, passes: list[tuple], label_smoothing: float = 0.0):
        """Mean cross-entropy of some rows."""
        labels = torch.as_tensor(self.train.labels[rows], device=self.device)
        return nn.functional.cross_entropy(self.logits(model, rows, passes), labels, label_smoothing=label_smoothing)


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
        passes = [bench.padded(rows, side, bench.max_length) for side in (0, 1)]
        bench.loss(model, rows, passes, label_smoothing=0.1).backward()
        optimizer.step()

    return len(rows), timed(bench.device, step)


def train_trainer(bench: Bench) -> tuple[int, float]:
    """A step of Hugging Face Trainer: 16 pairs a batch, two batches a step."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bench.model(bench.config.dropout)

        def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
            rows = rows.cpu().numpy()
            sides = [bench.padded(rows, side, int(bench.train.lengths[rows].max())) for side in (0, 1)]
            both = tuple(torch.cat(parts) for parts in zip(*sides, strict=True))
            return {"loss": bench.loss(self.inner, rows, [both])}

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.begin = time.perf_counter()

        def on_train_end(self, *_, **__):
            self.seconds = time.perf_counter() - self.begin

    pairs, clock = PAIRS["trainer"], Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=16, gradient_accumulation_steps=2, num_train_epochs=1,
            bf16=bench.precision == "bf16", fp16=bench.precision == "fp16",
            use_cpu=bench.device.type == "cpu", optim="adamw_torch_fused", report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        collate = lambda rows: {"rows": torch.tensor(rows)}  # noqa: E731
        trainer = Trainer(Wrapped(), arguments, train_dataset=range(pairs), data_collator=collate, callbacks=[clock])
        trainer.train()
    return pairs, clock.seconds


def train_ours(bench: Bench) -> tuple[int, float]:
    """`fit`, the time in training steps."""
    model = bench.model(bench.config.dropout)
    result = fit(model, bench.train, bench.valid, bench.config, bench.accelerator)
    return len(bench.train), result.step_seconds


def predict_original(bench: Bench) -> tuple[int, float]:
    """The study's prediction: padded, fp32."""
    model, rows = bench.model(dropout=0.0).eval(), np.arange(PAIRS["original"])

    def work() -> None:
        with torch.inference_mode():
            bench.logits(model, rows, [bench.padded(rows, side, bench.max_length) for side in (0, 1)])

    return len(rows), timed(bench.device, work)


def predict_ours(bench: Bench) -> tuple[int, float]:
    """`predict_proba`: each different side once, both orders of A and B."""
    given = bench.model(dropout=0.0), bench.train, bench.accelerator
    return len(bench.train), timed(bench.device, lambda: predict_proba(*given))


VARIANTS = {("train", "original"): train_original, ("train", "trainer"): train_trainer, ("train", "ours"): train_ours,
            ("predict", "original"): predict_original, ("predict", "ours"): predict_ours}  # fmt: skip


def measure(bench: Bench, repeats: int) -> list[dict]:
    """Run the variants in turn, `repeats` times: pairs a second, the median, the slowest and the quickest."""
    found: dict[tuple, list[float]] = {name: [] for name in VARIANTS}
    for repeat in range(repeats):
        for name, variant in VARIANTS.items():
            pairs, seconds = variant(bench)
            found[name].append(pairs / seconds)
            print(f"  {' '.join(name)} {repeat + 1}/{repeats}: {pairs / seconds:.2f} pairs/s", flush=True)
    return [
        {"max_length": bench.max_length, "precision": bench.precision, "kind": kind, "variant": variant,
         "pairs_per_second": statistics.median(paces), "slowest": min(paces), "quickest": max(paces)}
        for (kind, variant), paces in found.items()
    ]  # fmt: skip


def draw(lines: list[dict]) -> Figure:
    """Pairs a second of every variant: training above, prediction below, a column for each length."""
    table = pd.DataFrame(lines)
    lengths = table["max_length"].unique()
    figure = Figure(figsize=(7.5, 3.0), layout="constrained")
    panels = figure.subplots(2, len(lengths), squeeze=False, sharey="row")
    for row, (kind, title) in zip(panels, (("train", "training"), ("predict", "prediction")), strict=True):
        for axes, length in zip(row, lengths, strict=True):
            part = table[(table["kind"] == kind) & (table["max_length"] == length)].set_index("variant").iloc[::-1]
            pairs = part["pairs_per_second"]
            errors = np.maximum(0, [pairs - part["slowest"], part["quickest"] - pairs])
            colors = [plots.BLUE if name == "ours" else "#b5b5b5" for name in part.index]
            names = [TITLES[name] for name in part.index]
            axes.barh(names, pairs, color=colors, xerr=errors, error_kw={"lw": 0.8}, height=0.7)
            for place, (name, value) in enumerate(pairs.items()):
                text = f"{value:.2g}" + ("" if name == "ours" else f" (ratio {pairs['ours'] / value:.1f})")
                axes.text(value + errors[1][place] + 0.02 * pairs.max(), place, text, va="center", fontsize=8)
            axes.set(title=f"{title}, MiniLM, {length} tokens a side", xlim=(0, 1.25 * pairs.max()))
            axes.set_xlabel("pairs a second" if kind == "predict" else "")
            axes.tick_params(labelsize=9)
    return plots.finish(figure)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    lines = []
    for length in arguments.lengths:
        print(f"MiniLM, {length} tokens", flush=True)
        bench = Bench(length)
        lines += measure(bench, arguments.repeats)
    write_json(OUT.with_suffix(".json"), {"versions": versions(), "lines": lines, "side_tokens": bench.side_tokens})
    OUT.with_suffix(".svg").write_bytes(draw_svg(draw(lines)))
    print(pd.DataFrame(lines).to_string(index=False, float_format="{:,.2f}".format))


if __name__ == "__main__":
    main()
