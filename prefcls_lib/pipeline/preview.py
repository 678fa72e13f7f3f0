"""What the notebooks show of a job before it is trained."""

import numpy as np
import pandas as pd

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import make_padded_batches, split_batch
from prefcls_lib.evaluation import scores
from prefcls_lib.models.predict import predict_proba
from prefcls_lib.pipeline.folds import new_model, split_rows
from prefcls_lib.pipeline.prepared import TrainingData
from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.training.loop import StepPlan


def settings_table(given: RunConfig, filled: RunConfig) -> pd.DataFrame:
    """The settings of a run: first those that were given, then those of the backbone's recipe, then the defaults."""
    default, given, filled = (config.to_dict() for config in (RunConfig(), given, filled))
    kinds = ["set for this run", "from the backbone's recipe", "default"]
    kind = {name: kinds[0] if given[name] != default[name] else kinds[1 if filled[name] != given[name] else 2]
            for name in filled}  # fmt: skip
    table = pd.DataFrame({"value": pd.Series(filled, dtype=object).map(str), "where from": pd.Series(kind)})
    return table.sort_values("where from", key=lambda column: column.map(kinds.index), kind="stable")


def describe_first_step(data: TrainingData) -> pd.DataFrame:
    """The padded batches of the first optimizer step: their micro-batch, shape, and share of useful tokens."""
    train, *_ = split_rows(data, data.config.folds[0])
    examples, step = StepPlan(train, data.config).batch(0)
    lines = []
    for number, rows in enumerate(split_batch(step, examples.lengths, data.config.max_tokens_per_micro_step)):
        token_ids = [examples.token_ids[i] for i in np.unique(examples.sides[rows])]
        for batch in make_padded_batches(token_ids, data.backbone.tokenizer.pad_id):
            sides, length = batch.input_ids.shape
            share = float(batch.attention_mask.float().mean())
            lines.append({"micro_batch": number, "sides": sides, "length": length, "useful_token_share": share})
    return pd.DataFrame(lines)


def untrained_log_loss(data: TrainingData, max_rows: int = 64) -> float:
    """Log loss of the untrained model on the first validation rows: its baseline's, or the training prior's.

    Shows at once whether data, labels and head fit together.
    """
    train, valid, *_ = split_rows(data, data.config.folds[0])
    valid = valid.take(slice(0, max_rows))
    accelerator = make_accelerator(data.config.mixed_precision)
    model = new_model(data, train, accelerator)
    probs, _ = predict_proba(model, valid, accelerator, data.backbone.tokenizer.pad_id)
    return scores.log_loss(valid.labels, probs)
