"""What it brings, and costs, that a cross-encoder reads both orders of A and B: on a finished run's validation rows.

python report/studies/orders.py runs/study/minilm-cross          writes report/studies/orders.json
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from prefcls_lib.config import RunConfig
from prefcls_lib.data.schema import SWAP
from prefcls_lib.evaluation import compare, scores, slices
from prefcls_lib.models.predict import embed_unique_sides, predict_from_embeddings
from prefcls_lib.models.saved import load_fold_model
from prefcls_lib.pipeline import steps
from prefcls_lib.pipeline.folder import fold_models
from prefcls_lib.pipeline.folds import split_rows
from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.runtime.files import read_json, write_json


def compare_orders(folder: Path) -> dict:
    """Log loss in the order of the file, in the other, and by both averaged; verdicts that the order alone changes."""
    config = RunConfig.from_mapping(read_json(folder / "config.json")["settings"])
    job = steps.start(replace(config, out=str(folder)))
    encoded = steps.encode(job)
    found: dict[str, list[np.ndarray]] = {"labels": [], "groups": [], "first": [], "second": [], "both": []}
    tokens = {"one order": 0, "both orders": 0}
    for fold_model in fold_models(config):
        saved = load_fold_model(job.folder.model_folder(fold_model))
        accelerator = make_accelerator(saved.mixed_precision)
        model = saved.model.to(accelerator.device)
        _, valid, _ = split_rows(job, encoded, fold_model.fold)
        embeddings, _ = embed_unique_sides(model, valid, accelerator, job.backbone.tokenizer.pad_id, fold_model.name)
        first, second = valid, valid.swapped()
        found["both"].append(predict_from_embeddings(model, embeddings, valid, accelerator))
        for name, examples in (("first", first), ("second", second)):
            with torch.inference_mode():
                x = None if examples.features is None else torch.as_tensor(examples.features, device=accelerator.device)
                logits = model(embeddings[examples.sides[:, 0].copy()], None, x)
            probs = torch.softmax(logits.double(), dim=1).cpu().numpy()
            found[name].append(probs if name == "first" else probs[:, SWAP])
        found["labels"].append(valid.labels)
        found["groups"].append(job.rows["group"].to_numpy()[job.folds == fold_model.fold])
        tokens["one order"] += int(valid.lengths[:, 0].sum())
        tokens["both orders"] += int(valid.lengths.sum())
    all_of = {name: np.concatenate(parts) for name, parts in found.items()}
    labels = all_of["labels"]
    return {
        "run": folder.name,
        "rows": len(labels),
        "log_loss": {name: scores.log_loss(labels, all_of[name]) for name in ("first", "second", "both")},
        "flip_rate_of_one_order": slices.flip_rate(all_of["first"], all_of["second"][:, SWAP]),
        "both_against_first": compare.compare(labels, all_of["both"], all_of["first"], all_of["groups"]).to_dict(),
        "tokens_to_predict": tokens,
    }


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run with architecture=cross, its models in it")
    result = compare_orders(parser.parse_args().run)
    write_json(Path(__file__).parent / "orders.json", result)
    print(pd.Series(result).to_string())


if __name__ == "__main__":
    main()
