"""What fits on a T4 and how long it would take, for every configuration in report/backbones.

    python -m report.studies.t4_plan            writes report/studies/t4_plan.md, which the report shows

Memory (`prefcls_lib.doctor.capacity`) and operations are computed from the configurations; the lengths of sides are
those of the shipped rows, stretched to the mean of the competition's.
"""

from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from transformers import AutoConfig, PretrainedConfig

from prefcls_lib.data import loading
from prefcls_lib.data.tokenization import encode_rows
from prefcls_lib.doctor import capacity
from prefcls_lib.models.backbones import load_backbone, max_positions
from prefcls_lib.models.recipes import choose_recipe
from prefcls_lib.runtime.files import read_json, write_text
from report.page import fill_template, markdown_table

FOLDER = Path(__file__).parent
LENGTHS = (512, 768)  # tokens of a side
MEAN_TOKENS = 288  # of a side cut at 512; counted on 1,000 rows of the competition: 283 to 291 for the three backbones
EPOCH_ROWS, TEST_ROWS = 51_729, 25_000  # nine tenths of the competition's training rows; its hidden test set
T4_BYTES = int(14.6 * 2**30)  # what CUDA shows of a T4's memory
# What a T4 may sustain in fp16 with these encoders, of its peak of 65 TFLOP/s, as long as nobody has measured it:
T4_FLOP_PER_SECOND = (15e12, 2.4e12)  # assumed; what another project measured, its compilation included
HEADER = ("backbone", "tokens a side", "GiB fixed", "KB a token", "most tokens", "recipe", "GiB peak", "hours an epoch",
          "hours for the test rows")  # fmt: skip


def read_config(name: str, dropout: float | None = None) -> PretrainedConfig:
    """A published configuration from report/backbones/; `dropout`: every kind of it set to this."""
    config = read_json(FOLDER.parent / "backbones" / f"{name}.json")["config"]
    if dropout is not None:
        config |= {key: dropout for key in config if "dropout" in key}
    return AutoConfig.for_model(**config)


def flop_per_token(config: PretrainedConfig, length: float) -> float:
    """Operations of a forward pass for one token of a side of `length` tokens: two for each weight, and attention's.

    DeBERTa's attention also compares each token with every bucket of distances, twice.
    """
    attention = 4 * config.hidden_size * length
    if config.model_type == "deberta-v2":
        attention += 8 * config.hidden_size * max(config.position_buckets, 0)
    return config.num_hidden_layers * (2 * capacity.layer_weights(config) + attention)


def t4_seconds(config: PretrainedConfig, lengths: np.ndarray) -> tuple[float, float]:
    """Seconds of a forward pass over sides of `lengths` (N,) tokens on one T4: projected, at both of its paces."""
    mean = (lengths**2).sum() / lengths.sum()  # of the tokens, for long sides have more of them
    return tuple(lengths.sum() * flop_per_token(config, mean) / pace for pace in T4_FLOP_PER_SECOND)


def plan_backbone(config: PretrainedConfig, max_length: int, lengths: np.ndarray) -> list[str]:
    """One line of the table, without the name; sides of `lengths` (N,) tokens are cut at max_length."""
    cut = np.minimum(lengths, max_length)
    fast, slow = (2 * seconds / len(cut) / 3600 for seconds in t4_seconds(config, cut))  # hours a row
    epoch = f"{3 * EPOCH_ROWS * fast:.1f} to {3 * EPOCH_ROWS * slow:.1f}"  # the backward pass is two forward passes
    fixed = capacity.fixed_bytes(config, True)
    held = [capacity.bytes_per_token(config, True, max_length, again) for again in (False, True)]
    most = [capacity.largest_micro_batch(config, T4_BYTES, True, max_length, again) for again in (False, True)]
    recipe = choose_recipe(config)["max_tokens_per_micro_step"]
    return [
        str(max_length), f"{fixed / 2**30:.1f}", " / ".join(f"{one / 1e3:,.0f}" for one in held),
        " / ".join(f"{tokens // 256 * 256:,}" for tokens in most), f"{recipe:,}",
        f"{(fixed + recipe * held[0]) / 2**30:.1f}", epoch, f"{TEST_ROWS * fast:.2f} to {TEST_ROWS * slow:.2f}",
    ]  # fmt: skip


def make_plan(lengths: np.ndarray) -> str:
    """The plan as Markdown: a line for each backbone and each of LENGTHS that it takes, the smallest first."""
    configs = {path.stem: read_config(path.stem) for path in (FOLDER.parent / "backbones").glob("*.json")}
    lines = [
        [name, *plan_backbone(config, max_length, lengths)]
        for name, config in sorted(configs.items(), key=lambda item: (capacity.count_parameters(item[1]), item[0]))
        for max_length in LENGTHS
        if (max_positions(config) or max_length) >= max_length
    ]
    cuts = " and ".join(f"{np.minimum(lengths, limit).mean():.0f} tokens when cut at {limit}" for limit in LENGTHS)
    return fill_template(FOLDER / "t4_plan_template.md", {
        "gib": T4_BYTES / 2**30, "paces": [pace / 1e12 for pace in T4_FLOP_PER_SECOND], "epoch_rows": EPOCH_ROWS,
        "test_rows": TEST_ROWS, "cuts": cuts, "table": markdown_table(HEADER, lines),
    }) + "\n"  # fmt: skip


def count_tokens() -> np.ndarray:
    """Tokens of the different sides of the shipped rows, uncut, stretched so that cut at 512 they have MEAN_TOKENS."""
    rows = loading.read_rows(loading.sample_path("train"), labelled=True)
    token_ids = encode_rows(rows, load_backbone("minilm", 512).tokenizer, 10**6, "none").token_ids
    lengths = np.array([*map(len, token_ids)])
    return lengths * brentq(lambda factor: np.minimum(lengths * factor, 512).mean() - MEAN_TOKENS, 0.5, 2.0)


def main() -> None:
    """Count tokens, write the plan, print it."""
    text = make_plan(count_tokens())
    write_text(FOLDER / "t4_plan.md", text)
    print(text)


if __name__ == "__main__":
    main()
