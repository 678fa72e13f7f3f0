"""What is said of a job before it is trained: how long it will take, and where its settings come from."""

import math
import time

import numpy as np
import pandas as pd

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.tokenization import encode_rows
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import embed_unique_sides
from prefcls_lib.pipeline.job import Job
from prefcls_lib.pipeline.launch import count_processes
from prefcls_lib.runtime.devices import machine_name, make_accelerator

ROWS = 200  # that are tokenised for the mean length of a row
TIMED_ROWS = 4  # of these, whose forward pass is timed
BACKWARD = 2.0  # a backward pass costs as much as so many forward passes
BASELINE_SECONDS = 0.004  # of reading and fitting a row, for each fold: 210 CPU seconds for 57,477 (report/log.md)


def describe_duration(job: Job, model: PreferenceModel) -> str:
    """One sentence on the time that a run needs: a rough estimate, from the forward pass of a few rows."""
    config, num_folds, num_rows = job.config, len(job.config.folds), len(job.table) - len(job.test_rows)
    texts = (config.max_length, config.text_cleaning, config.architecture)
    encoded = encode_rows(job.rows.head(ROWS), job.backbone.tokenizer, *texts)
    examples = Examples(encoded.token_ids, encoded.sides)
    row_tokens = examples.lengths.sum(axis=1)
    near = np.argsort(np.abs(row_tokens - row_tokens.mean()), kind="stable")[:TIMED_ROWS]
    accelerator = make_accelerator(config.mixed_precision)
    model.to(accelerator.device)
    for _ in range(2):  # the first loads kernels
        started = time.perf_counter()
        embeddings, tokens = embed_unique_sides(model, examples.take(near), accelerator)
        embeddings.sum().item()  # waits for the GPU
    seconds_per_row = (time.perf_counter() - started) / tokens.computed * row_tokens.mean()
    valid = job.table["fold"].isin(config.folds).sum() / num_folds
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
