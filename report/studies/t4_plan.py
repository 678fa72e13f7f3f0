"""What fits on a T4 and how long it would take, for every configuration in report/backbones: a plan, nothing measured.

    python report/studies/t4_plan.py            writes report/studies/t4_plan.md, which the report shows

Memory and operations are computed from the configurations (`prefcls_lib.machine`); tokens are counted on the shipped
rows with MiniLM's tokenizer.
"""

from pathlib import Path

import numpy as np
from transformers import AutoConfig, PretrainedConfig

from prefcls_lib.data import loading
from prefcls_lib.data.tokenization import encode_rows
from prefcls_lib.doctor import capacity
from prefcls_lib.models.backbones import load_backbone, max_positions
from prefcls_lib.models.recipes import choose_recipe
from prefcls_lib.report.page import markdown_table
from prefcls_lib.runtime.files import read_json, write_text

FOLDER = Path(__file__).parent
T4_BYTES = 15 * 2**30
LENGTHS = (512, 768)  # tokens of a side
EPOCH_ROWS, TEST_ROWS = 51_729, 25_000  # nine tenths of the competition's training rows; its hidden test set
HEADER = ("backbone", "tokens a side", "GB fixed", "KB a token", "most tokens", "recipe's", "hours an epoch",
          "hours for the test rows")  # fmt: skip


def plan_backbone(config: PretrainedConfig, max_length: int, lengths: np.ndarray) -> list[str]:
    """One line of the table, without the name.

    Args:
        config: the backbone's.
        max_length: tokens of a side; what is longer is cut.
        lengths: (N,) tokens of the sides, uncut.
    """
    cut = np.minimum(lengths, max_length)
    mean, in_attention = cut.mean(), (cut**2).sum() / cut.sum()  # long sides have more of the tokens
    side_seconds = mean * capacity.flop_per_token(config, in_attention) / capacity.T4_FLOP_PER_SECOND
    hours = {"epoch": 3 * 2 * EPOCH_ROWS * side_seconds / 3600, "test": 2 * TEST_ROWS * side_seconds / 3600}
    held = [capacity.bytes_per_token(config, True, max_length, again) / 1e3 for again in (False, True)]
    most = [capacity.largest_micro_step(config, T4_BYTES, True, max_length, again) for again in (False, True)]
    return [
        str(max_length),
        f"{capacity.fixed_bytes(config) / 1e9:.1f}",
        " / ".join(f"{kilobytes:,.0f}" for kilobytes in held),
        " / ".join(f"{tokens // 256 * 256:,}" for tokens in most),
        f"{choose_recipe(config)['max_tokens_per_micro_step']:,}",
        f"{hours['epoch']:.1f} / {hours['epoch'] * 4 / 3:.1f}",
        f"{hours['test']:.2f}",
    ]


def make_plan(lengths: np.ndarray) -> str:
    """The plan as Markdown: a line for each backbone and each of LENGTHS that it takes, the smallest first."""
    configs = {
        path.stem: AutoConfig.for_model(**read_json(path)["config"])
        for path in (FOLDER.parent / "backbones").glob("*.json")
    }
    lines = [
        [name, *plan_backbone(config, max_length, lengths)]
        for name, config in sorted(configs.items(), key=lambda item: (capacity.count_parameters(item[1]), item[0]))
        for max_length in LENGTHS
        if (max_positions(config) or max_length) >= max_length
    ]
    cuts = " and ".join(f"{np.minimum(lengths, limit).mean():.0f} tokens when cut at {limit}" for limit in LENGTHS)
    parts = [
        "# Plan for a T4",
        f"Projected, not measured. One T4 of {T4_BYTES // 2**30} GiB in fp16, at an assumed "
        f"{capacity.T4_FLOP_PER_SECOND / 1e12:.0f} TFLOP/s of its peak of 65; one epoch of {EPOCH_ROWS:,} rows, "
        f"{TEST_ROWS:,} test rows; with both T4 about half the hours. A side has {cuts}, on average of the "
        "shipped rows with MiniLM's tokenizer.",
        "“Fixed” are weights, gradients and optimizer state. “KB a token” is what the backward pass holds for each "
        "token of a full side, “most tokens” how many of them one micro-step may have, beside “recipe's”, the setting "
        "`max_tokens_per_micro_step` that the recipe has. Before the slash without gradient checkpointing, behind it "
        "with it, a third slower. Unfused attention (DeBERTa) moves more memory than it computes: expect more hours.",
        markdown_table(HEADER, lines),
        "Every recipe fits without checkpointing, so a longer side takes one setting: `max_length=768`. Should memory "
        "run out, the micro-step is halved by itself; when not even one pair fits, set `gradient_checkpointing=true` "
        "and, for larger micro-steps again, `max_tokens_per_micro_step=8192`. RoBERTa, XLM-R and ELECTRA have one "
        "embedding for each of 512 positions and take no more; DeBERTa's positions are relative and ModernBERT's "
        "rotary, so those two read 768.",
    ]
    return "\n\n".join(parts) + "\n"


def count_tokens() -> np.ndarray:
    """Tokens of the different sides of the shipped rows, uncut."""
    rows = loading.read_rows(loading.sample_path("train"), labelled=True)
    return encode_rows(rows, load_backbone("minilm", 512).tokenizer, 10**6, "none").lengths


def main() -> None:
    """Count tokens, write the plan, print it."""
    text = make_plan(count_tokens())
    write_text(FOLDER / "t4_plan.md", text)
    print(text)


if __name__ == "__main__":
    main()
