"""What is said of a job before it is trained: how long it will take, and what the notebooks show."""

import math
import time

import numpy as np
import pandas as pd

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import plan_padded_batches, split_batch
from prefcls_lib.data.tokenization import encode_rows
from prefcls_lib.evaluation import scores
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import embed_unique_sides, predict_proba
from prefcls_lib.pipeline.folds import new_model, split_rows
from prefcls_lib.pipeline.job import Job, TrainingData
from prefcls_lib.pipeline.launch import count_processes
from prefcls_lib.runtime.devices import machine_name, make_accelerator
from prefcls_lib.training.loop import StepPlan

ROWS = 200  # that are tokenised for the mean length of a row
TIMED_ROWS = 4  # of these, whose forward pass is timed
BACKWARD = 2.0  # a backward pass costs as much as so many forward passes
BASELINE_SECONDS = 0.004  # of reading and fitting a row, for each fold: 210 CPU seconds for 57,477 (report/log.md)


def describe_duration(job: Job, model: PreferenceModel) -> str:
    """One sentence on the time that a run needs: a rough estimate, from the forward pass of a few rows."""
    config, num_folds, num_rows = job.config, len(job.config.folds), len(job.all_rows) - len(job.test_rows)
    texts = (config.max_length, config.text_cleaning, config.architecture)
    examples = encode_rows(job.rows.head(ROWS), job.backbone.tokenizer, *texts)
    row_tokens = examples.lengths.sum(axis=1)
    near = np.argsort(np.abs(row_tokens - row_tokens.mean()), kind="stable")[:TIMED_ROWS]
    accelerator = make_accelerator(config.mixed_precision)
    model.to(accelerator.device)
    for _ in range(2):  # the first loads kernels
        started = time.perf_counter()
        embeddings, tokens = embed_unique_sides(model, examples.take(near), accelerator)
        embeddings.sum().item()  # waits for the GPU
    seconds_per_row = (time.perf_counter() - started) / tokens.computed * row_tokens.mean()
    valid = job.validated.sum() / num_folds
    train = (num_rows - valid) * (1 + BACKWARD) / (2 if config.architecture == "cross" else 1)  # one of its two orders
    passes = config.num_epochs * (train + config.validations_per_epoch * valid) + len(job.test_rows)
    models = num_folds * config.num_seeds
    in_a_row = models / min(count_processes(config.num_processes), models)
    seconds = BASELINE_SECONDS * num_rows * num_folds + passes * seconds_per_row * in_a_row
    hours = config.time_budget_hours
    amount = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{math.ceil(seconds / 60)} min"
    budget = f"; time_budget_hours={hours:g} cuts it" if hours is not None and seconds > 3600 * hours else ""
    return f"this run will take about {amount} on this machine ({machine_name()}){budget}"


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
        for taken, length in plan_padded_batches(token_ids):
            share = sum(len(token_ids[side]) for side in taken) / (len(taken) * length)
            lines.append({"micro_batch": number, "sides": len(taken), "length": length, "useful_token_share": share})
    return pd.DataFrame(lines)


def untrained_log_loss(data: TrainingData, max_rows: int = 64) -> float:
    """Log loss of the untrained model on the first validation rows: its baseline's, or the training prior's.

    Shows at once whether data, labels and head fit together.
    """
    train, valid, *_ = split_rows(data, data.config.folds[0])
    valid = valid.take(slice(0, max_rows))
    accelerator = make_accelerator(data.config.mixed_precision)
    model = new_model(data, train, accelerator)
    probs, _ = predict_proba(model, valid, accelerator)
    return scores.log_loss(valid.labels, probs)
