"""Does it bias training that a step's pairs are of like length? The same model, seeds and rows, sorted and not.

    python report/studies/sorting.py                about ten minutes on 2 cores; writes report/studies/sorting.json

Sorted: `batching.plan_epoch` as it is: random windows of eight steps, pairs sorted inside a window, steps shuffled.
Unsorted: windows of one step, so that a step is any 32 rows. Both cut their padded batches by length.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.config import RunConfig
from prefcls_lib.data import batching
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.features import FeatureScaler, compute_features
from prefcls_lib.data.loading import read_rows, sample_path
from prefcls_lib.data.schema import class_shares
from prefcls_lib.data.splits import assign_folds
from prefcls_lib.data.tokenization import encode_rows
from prefcls_lib.models.backbones import load_backbone
from prefcls_lib.models.recipes import RECIPES
from prefcls_lib.models.saved import build_model
from prefcls_lib.runtime.devices import make_accelerator, seed_everything
from prefcls_lib.runtime.files import write_json
from prefcls_lib.training.loop import fit

OUT = Path(__file__).parent / "sorting.json"
WINDOWS = {"sorted": batching.WINDOW_STEPS, "unsorted": 1}


def train_both(seeds: list[int], max_length: int) -> pd.DataFrame:
    """Histories of training with every seed, sorted and unsorted, on the same split of the shipped rows."""
    backbone = load_backbone("minilm", max_length)
    rows = read_rows(sample_path("train"), labelled=True)
    encoded = encode_rows(rows, backbone.tokenizer, max_length, "none")
    is_train = assign_folds(rows, 5, seed=42) != 0
    raw = compute_features(rows)
    features = FeatureScaler.fit(raw[is_train]).transform(raw).astype(np.float32)
    everything = Examples(encoded.token_ids, encoded.sides, features, rows["label"].to_numpy())
    train, valid = everything.take(is_train), everything.take(~is_train)
    histories = []
    for seed in seeds:
        for order, window in WINDOWS.items():
            config = RunConfig(seed=seed, num_epochs=2, validations_per_epoch=4, start_from="none").with_recipe(
                RECIPES["bert"]
            )
            seed_everything(seed)
            model = build_model(backbone.path, config)
            model.head.start_at_prior(tuple(class_shares(train.labels)))
            batching.WINDOW_STEPS = window
            accelerator = make_accelerator("auto")
            fitted = fit(model, train, valid, config, accelerator, backbone.tokenizer.pad_id, f"{order} {seed}")
            share = fitted.tokens.useful_share
            histories.append(fitted.history.assign(seed=seed, order=order, useful_token_share=share))
    batching.WINDOW_STEPS = WINDOWS["sorted"]
    return pd.concat(histories, ignore_index=True)


def compare(history: pd.DataFrame) -> list[dict]:
    """At each validation: mean losses over the seeds, and the sorted run's minus the unsorted one's, seed by seed."""
    lines = []
    for step, table in history.groupby("step"):
        line: dict = {"step": int(step)}
        for name in ("train_log_loss", "valid_log_loss"):
            losses = table.pivot_table(index="seed", columns="order", values=name)
            difference = losses["sorted"] - losses["unsorted"]
            line |= {f"{name}_{order}": float(losses[order].mean()) for order in WINDOWS}
            line |= {
                f"{name}_difference": float(difference.mean()),
                f"{name}_standard_error": float(difference.std(ddof=1) / len(difference) ** 0.5),
            }
        lines.append(line)
    return lines


def main() -> None:
    """Train, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--max-length", type=int, default=96)
    arguments = parser.parse_args()
    history = train_both(arguments.seeds, arguments.max_length)
    shares = history.groupby("order")["useful_token_share"].mean().to_dict()
    result = {"max_length": arguments.max_length, "seeds": arguments.seeds, "useful_token_share": shares,
              "validations": compare(history)}  # fmt: skip
    write_json(OUT, result)
    print(pd.DataFrame(result["validations"]).to_string(index=False, float_format="{:.4f}".format), shares)


if __name__ == "__main__":
    main()
