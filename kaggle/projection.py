"""How long a rerun of `submit` would take on a T4: a projection from counted tokens, not a measurement."""

from pathlib import Path

import numpy as np
from transformers import PretrainedConfig

from prefcls_lib.data.loading import read_rows
from prefcls_lib.doctor.capacity import T4_FLOP_PER_SECOND, flop_per_token
from prefcls_lib.models.saved import load_fold_model

# The study's backbones, one fold each, at the training notebook's max_length.
STUDY = {
    "deberta-v3-xsmall": PretrainedConfig(
        model_type="deberta-v2", num_hidden_layers=12, hidden_size=384, intermediate_size=1536, position_buckets=256
    ),
    "roberta-base": PretrainedConfig(
        model_type="roberta", num_hidden_layers=12, hidden_size=768, intermediate_size=3072
    ),
    "electra-large": PretrainedConfig(
        model_type="electra", num_hidden_layers=24, hidden_size=1024, intermediate_size=4096
    ),
}


def project(record: dict, wall_seconds: float, fold: Path, test: Path) -> dict:
    """The projected hours of a rerun with all three backbones.

    Everything but the encoders (reading, features, tokens, the ladder) is taken as it was measured here.

    Args:
        record: submit.json of the rerun that was measured.
        wall_seconds: of that rerun.
        fold: a saved model whose tokenizer and max_length count the tokens.
        test: its test rows.
    """
    encoder_seconds = sum(run.get("encoder_seconds", 0.0) for run in record["runs"])
    saved = load_fold_model(fold)
    rows = read_rows(test, labelled=False)
    lengths = np.array([len(ids) for ids in saved.read_inputs(rows).token_ids])
    tokens, mean = int(lengths.sum()), float((lengths**2).sum() / lengths.sum())
    seconds = {name: tokens * flop_per_token(config, mean) / T4_FLOP_PER_SECOND for name, config in STUDY.items()}
    other = max(0.0, wall_seconds - encoder_seconds)
    return {
        "rows": len(rows), "tokens": tokens, "max_length": saved.max_length, "encoder_seconds": seconds,
        "other_seconds": other, "hours": (sum(seconds.values()) + other) / 3600,
    }  # fmt: skip


def projection_text(projected: dict) -> str:
    """The projection for people, with what it rests on."""
    parts = [f"{name} {seconds / 60:.1f} min" for name, seconds in projected["encoder_seconds"].items()]
    return (
        f"projection, not measured: {projected['rows']:,} rows are {projected['tokens'] / 1e6:.1f} million tokens at "
        f"max_length={projected['max_length']}; at an assumed {T4_FLOP_PER_SECOND / 1e12:.0f} TFLOP/s of a T4 one fold "
        f"takes {', '.join(parts)}; with {projected['other_seconds'] / 60:.1f} min for all else, as measured here, "
        f"submit takes {projected['hours']:.2f} h with all three"
    )
