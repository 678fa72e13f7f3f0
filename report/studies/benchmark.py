"""Speed of training and prediction beside what one would use instead, on real rows: interleaved, medians over repeats.

    make benchmark                                      MiniLM, 512 tokens, about five minutes on 2 cores
    python -m report.studies.benchmark --lengths 256 512 --models minilm deberta-v3-xsmall --variants st ...      longer

Variants of training (pairs that go through forward, backward and AdamW in a second):

    original   the study's loop: two encoder passes a step, padded to max_length, fp32, dropout 0.1
    trainer    Hugging Face Trainer: the same model, both sides in one pass, dynamic padding, our precision and dropout
    st         sentence-transformers with SoftmaxLoss as its users run it (by request: pip install datasets too)
    ours       `train.fit`
    limit      the bare encoder, forward and backward, on full batches of 256 tokens a side: what no loop can pass
    limit-long the same with sides of the full length, whose attention costs more; real sides are of both kinds

and of prediction: original, st (its `encode`), ours (`predict_proba`, both orders of A and B), limit, limit-long.
Models other than minilm are the exact architectures with random weights, fed with MiniLM's ids. `peak_share` is the
encoder's counted operations (`machine.flop_per_token`) as a share of what the device reaches in large matrix products.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from prefcls_lib.data.batching import TokenCount, make_padded_batches, padding_for, plan_epoch, split_batch
from prefcls_lib.doctor.capacity import flop_per_token
from prefcls_lib.evaluation import plots
from prefcls_lib.models.predict import PREDICT_SIDES, PREDICT_TOKENS
from prefcls_lib.runtime.devices import choose_precision, process_state, versions
from prefcls_lib.runtime.files import write_json, write_text
from report.page import draw_svg, markdown_table
from report.studies.variants import LIMIT_LENGTH, PREDICT, TRAIN, Bench, measure_peak

OUT = Path(__file__).parent / "benchmark"
GOAL_LENGTH = 512  # tokens of a side at which the goals are set
VARIANT_NAMES = {"original": "the study's loop", "trainer": "Hugging Face Trainer", "st": "sentence-transformers",
                 "ours": "this kit"}  # fmt: skip
DEFAULT_VARIANTS = ["original", "trainer", "ours", "limit", "limit-long"]


class Memory:
    """Peak memory of one variant above what was there before: of the GPU, or resident memory of this process."""

    def __init__(self, cuda: bool):
        self.cuda = cuda

    def __enter__(self) -> "Memory":
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
            self.before = self._resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        peak = torch.cuda.max_memory_allocated() if self.cuda else self._resident("VmHWM")
        self.gib = (peak - self.before) / 2**30

    @staticmethod
    def _resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(bench: Bench, variants: dict, repeats: int) -> list[dict]:
    """Run the variants in turn, `repeats` times; medians of pairs and useful tokens a second."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in variants}
    for repeat in range(repeats):
        for name, variant in variants.items():
            with Memory(bench.device.type == "cuda") as memory:
                pairs, tokens, seconds = variant(bench)
            found[name].append((pairs / seconds, tokens / seconds, memory.gib))
            print(f"  {name} {repeat + 1}/{repeats}: {tokens / seconds:,.0f} useful tokens/s", flush=True)
    return [
        {
            "variant": name,
            "pairs_per_second": statistics.median(x[0] for x in values) or None,
            "useful_tokens_per_second": statistics.median(x[1] for x in values),
            "slowest": min(x[1] for x in values),
            "quickest": max(x[1] for x in values),
            "peak_gib": max(x[2] for x in values),
        }
        for name, values in found.items()
    ]


def token_shares(bench: Bench, max_tokens: int) -> dict[str, float]:
    """useful_token_share of one epoch's training steps and of prediction, on all rows of the file."""
    lengths, counts = bench.everything.lengths, {"training": TokenCount(), "prediction": TokenCount()}

    def add(kind: str, token_ids: list[np.ndarray], *limits: int) -> None:
        batches = make_padded_batches(token_ids, bench.pad_id, *limits, **padding_for(bench.device))
        computed = sum(batch.tokens_computed for batch in batches)
        counts[kind] += TokenCount(sum(map(len, token_ids)), computed)

    for step in plan_epoch(lengths, 32, seed=0, epoch=0):
        for rows in split_batch(step, lengths, max_tokens):
            add("training", [bench.everything.token_ids[i] for i in np.unique(bench.everything.sides[rows])])
    sides = np.unique(bench.everything.sides)
    add("prediction", [bench.everything.token_ids[i] for i in sides], PREDICT_SIDES, PREDICT_TOKENS)
    return {kind: count.useful_share for kind, count in counts.items()}


def add_peak_share(lines: list[dict], bench: Bench) -> None:
    """Operations that reached a result, of useful tokens alone, as a share of the device's measured peak."""
    peak, lengths = measure_peak(bench), bench.train.lengths
    mean = float((lengths**2).sum() / lengths.sum())  # the side that an average token is in
    length_of = {"limit": LIMIT_LENGTH, "limit-long": bench.max_length}
    config = bench.encoder(dropout=0.0).config
    for line in lines:
        passes = 3 if line["kind"] == "train" else 1  # a backward pass is two
        flop = passes * flop_per_token(config, length_of.get(line["variant"], mean))
        line["peak_share"] = line["useful_tokens_per_second"] * flop / peak


def judge_goals(lines: list[dict], shares: dict[str, float]) -> list[dict]:
    """The goals that these measurements can judge: what, goal, found, met."""
    speed = {(line["kind"], line["variant"]): line for line in lines}

    def ratio(kind: str, variant: str, unit: str) -> float | None:
        ours, other = speed.get((kind, "ours")), speed.get((kind, variant))
        return ours[unit] / other[unit] if ours and other else None

    pairs, tokens = "pairs_per_second", "useful_tokens_per_second"
    goals = [
        ("useful token share, training, 8,192 tokens a micro-batch", 0.96, shares["training"]),
        ("useful token share, training, 6,144 tokens a micro-batch", 0.93, shares["training 6144"]),
        ("useful token share, prediction", 0.985, shares["prediction"]),
        ("training pairs/s, ours : the original's loop", 8.0, ratio("train", "original", pairs)),
        ("training pairs/s, ours : Hugging Face Trainer", 1.6, ratio("train", "trainer", pairs)),
        ("training pairs/s, ours : sentence-transformers", 5.0, ratio("train", "st", pairs)),
        ("training useful tokens/s, ours : the limit", 1.0, ratio("train", "limit", tokens)),
        ("training useful tokens/s, ours : the limit at full length", 1.0, ratio("train", "limit-long", tokens)),
        ("prediction useful tokens/s, ours : sentence-transformers' encode", 1.1, ratio("predict", "st", tokens)),
    ]
    return [{"goal": name, "wanted": wanted, "found": found, "met": found is not None and found >= wanted}
            for name, wanted, found in goals if found is not None]  # fmt: skip


def draw(lines: list[dict]) -> Figure:
    """Pairs a second of every variant: training above, prediction below, a column for each model and length."""
    table = pd.DataFrame(lines).dropna(subset="pairs_per_second")
    settings = list(dict.fromkeys(zip(table["model"], table["max_length"], strict=True)))
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    panels = figure.subplots(2, len(settings), squeeze=False, sharey="row")
    for row, (kind, title) in zip(panels, (("train", "training"), ("predict", "prediction")), strict=True):
        for axes, (model, length) in zip(row, settings, strict=True):
            here = (table["kind"] == kind) & (table["model"] == model) & (table["max_length"] == length)
            part = table[here].set_index("variant").iloc[::-1]
            pairs, names = part["pairs_per_second"], [VARIANT_NAMES.get(name, name) for name in part.index]
            scale = pairs / part["useful_tokens_per_second"]  # the repeats are known in tokens
            errors = np.maximum(0, [pairs - part["slowest"] * scale, part["quickest"] * scale - pairs])
            colors = [plots.BLUE if name == "ours" else "#b5b5b5" for name in part.index]
            axes.barh(names, pairs, color=colors, xerr=errors, error_kw={"lw": 0.8}, height=0.7)
            for place, (name, value) in enumerate(pairs.items()):
                ratio = "" if name == "ours" or "ours" not in pairs else f"   ratio {pairs['ours'] / value:.1f}"
                axes.text(
                    value + errors[1][place] + 0.02 * pairs.max(), place, f"{value:.2g}{ratio}", va="center", fontsize=8
                )
            axes.set(title=f"{title}, {model}, {length} tokens a side", xlim=(0, 1.25 * pairs.max()))
            axes.set_xlabel("pairs a second" if kind == "predict" else "")
            axes.tick_params(labelsize=9)
    return plots.finish(figure)


def main() -> None:
    """Measure, print, and write benchmark.json, benchmark.md and benchmark.svg."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["minilm"], help="minilm, or names in report/backbones/")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512])
    parser.add_argument("--variants", nargs="+", choices=TRAIN, default=DEFAULT_VARIANTS)
    parser.add_argument("--precision", choices=("auto", "no", "bf16", "fp16"), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", help="training CSV", default="sample")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    precision = choose_precision(arguments.precision, process_state().device)
    lines, goals, rows_path = [], [], arguments.rows
    for model in arguments.models:
        for length in arguments.lengths:
            print(f"{model}, {length} tokens, {precision}", flush=True)
            bench = Bench(model, length, precision, rows_path)
            found = []
            for kind, variants in (("train", TRAIN), ("predict", PREDICT)):
                chosen = {name: variants[name] for name in arguments.variants if name in variants}
                if model != "minilm":
                    chosen.pop("st", None)  # it would need weights and a tokenizer on disk
                found += [{"model": model, "max_length": length, "precision": precision, "kind": kind, **line}
                          for line in measure(bench, chosen, arguments.repeats)]  # fmt: skip
            add_peak_share(found, bench)
            lines += found
            shares = token_shares(bench, 8192)
            shares["training 6144"] = token_shares(bench, 6144)["training"]
            if length == GOAL_LENGTH:
                goals += [{"model": model, "max_length": length, **goal} for goal in judge_goals(found, shares)]
    side_tokens = float(bench.everything.lengths.mean())
    result = {"versions": versions(), "lines": lines, "goals": goals, "side_tokens": side_tokens}
    text = write_table(result)
    write_json(arguments.out / "benchmark.json", result)
    write_text(arguments.out / "benchmark.md", text)
    (arguments.out / "benchmark.svg").write_bytes(draw_svg(draw(lines)))
    print(text)


def write_table(result: dict) -> str:
    """The result as Markdown."""
    speed = [
        [f"{line['model']}, {line['max_length']}, {line['precision']}", line["kind"], line["variant"],
         f"{line['pairs_per_second']:.2f}" if line["pairs_per_second"] else "",
         f"{line['useful_tokens_per_second']:,.0f}", f"{line['slowest']:,.0f} to {line['quickest']:,.0f}",
         f"{line['peak_gib']:.2f}", f"{line['peak_share']:.2f}"]
        for line in result["lines"]
    ]  # fmt: skip
    goals = [
        [f"{goal['model']}, {goal['max_length']}", goal["goal"], f"{goal['wanted']:g}", f"{goal['found']:.3f}",
         "yes" if goal["met"] else "**no**"]
        for goal in result["goals"]
    ]  # fmt: skip
    header = ("model, tokens, precision", "kind", "variant", "pairs/s", "useful tokens/s", "slowest to quickest",
              "GiB more", "peak share")  # fmt: skip
    versions_line = ", ".join(f"{name} {result['versions'][name]}" for name in ("machine", "torch", "transformers"))
    parts = [
        "# Speed",
        f"On: {versions_line}. Medians over repeats, real rows, {result['side_tokens']:.0f} tokens a side on average. "
        "The variants are those of report/studies/benchmark.py, of which original and st compute in fp32 whatever the "
        "precision. "
        "“Peak share” is what the useful tokens cost in counted operations, as a share of what the device reaches in "
        "large matrix products.",
        markdown_table(header, speed, (0, 1, 2)),
        "## Goals",
        markdown_table(("model, tokens", "goal", "wanted", "found", "met"), goals, (0, 1, 4))
        if goals
        else f"They are set at {GOAL_LENGTH} tokens a side, which was not measured.",
    ]
    if not torch.cuda.is_available():
        parts.append(
            "Not measured, since there was no GPU: tokens a second and peak share of the three architectures on CUDA "
            "(`make gpu-check`)."
        )
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
