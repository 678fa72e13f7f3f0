"""The main job in the order of its steps; the command line and the notebooks both call these and nothing else.

job = start(config)              everything that can be wrong is found here; a prior submission is in place
encoded = encode(job)            token ids of the training rows
ladder = run_ladder(job)         plain baselines on the same folds
fit_folds(job, encoded)          one model a fold (and seed), each saved when it is done; on several GPUs side by side
result = finish(job, ladder)     submission.csv, the tables, result.json
"""

import math
import shutil
import time
from dataclasses import replace

import numpy as np
import pandas as pd

from prefcls_lib.baselines.cross_validation import OutOfSample, choose_baseline, cross_validate, ladder_table
from prefcls_lib.baselines.estimators import FAST_BASELINES, predict_rows
from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import TokenCount, make_padded_batches, plan_epoch, split_batch
from prefcls_lib.data.schema import ID
from prefcls_lib.data.submission import write_submission
from prefcls_lib.data.tokenization import EncodedRows
from prefcls_lib.evaluation import metrics
from prefcls_lib.models.backbones import load_backbone
from prefcls_lib.models.predict import predict_proba
from prefcls_lib.models.reward import check_reward_model
from prefcls_lib.pipeline.folder import FoldModel, RunFolder, fold_models
from prefcls_lib.pipeline.folds import fit_here, new_model, split_rows
from prefcls_lib.pipeline.job import Job, open_folder, read_job
from prefcls_lib.pipeline.launch import count_processes, run_side_by_side, run_together
from prefcls_lib.pipeline.offsets import read_out_of_sample_baseline
from prefcls_lib.pipeline.predict import predict_run
from prefcls_lib.pipeline.results import read_out_of_sample, score_job
from prefcls_lib.runtime.devices import make_accelerator, process_state
from prefcls_lib.runtime.files import read_json, write_json
from prefcls_lib.training.loop import epoch_examples


def start(config: RunConfig) -> Job:
    """Check files, settings, folds and the backbone; claim the run folder; put the prior's submission in it.

    Raises:
        UserError: whatever is wrong, before any time is spent.
    """
    job = read_job(config)
    backbone = load_backbone(config.init_from or config.backbone, config.max_length)
    if config.init_from is not None:
        check_reward_model(backbone.path, backbone.config)
    make_accelerator(config.mixed_precision)
    return open_folder(replace(job, backbone=backbone), backbone.recipe(config.recipe))


def encode(job: Job) -> EncodedRows:
    """Token ids of the training rows."""
    return job.encode(job.rows)


def run_ladder(job: Job) -> dict[str, OutOfSample]:
    """The plain baselines, fitted and scored on the folds of this run; one of them is what the networks start from.

    Where the run folder holds only the prior's submission, the best baseline's takes its place.
    """
    names = [name for name in (*FAST_BASELINES, "structure_tfidf") if name != job.config.start_from]
    results = cross_validate(names, job.rows, job.folds, job.config.folds, job.config.seed)
    if job.config.start_from != "none":
        results[job.config.start_from] = read_out_of_sample_baseline(job)
    if job.wrote_prior:
        best, _ = choose_baseline(results, job.rows["label"].to_numpy(), job.rows["group"].to_numpy())
        probs = predict_rows(results[best].baselines, job.test_rows)
        write_submission(job.folder / "submission.csv", list(job.test_rows[ID]), probs)
    return results


def describe_first_step(job: Job, encoded: EncodedRows) -> pd.DataFrame:
    """The padded batches of the first optimizer step: their micro-batch, shape, and share of useful tokens."""
    train, _, _ = split_rows(job, encoded, job.config.folds[0])
    train = epoch_examples(train, job.config, epoch=0)
    step = plan_epoch(train.lengths, job.config.batch_size, job.config.seed, epoch=0)[0]
    lines = []
    for number, rows in enumerate(split_batch(step, train.lengths, job.config.max_tokens_per_micro_step)):
        token_ids = [train.token_ids[i] for i in np.unique(train.sides[rows])]
        for batch in make_padded_batches(token_ids, job.backbone.tokenizer.pad_id):
            sides, length = batch.input_ids.shape
            share = float(batch.attention_mask.float().mean())
            lines.append({"micro_batch": number, "sides": sides, "length": length, "useful_token_share": share})
    return pd.DataFrame(lines)


def untrained_log_loss(job: Job, encoded: EncodedRows, max_rows: int = 64) -> float:
    """Log loss of the untrained model on the first validation rows: the cross-entropy of the training prior.

    Says at once whether data, labels and head fit together.
    """
    train, valid, _ = split_rows(job, encoded, job.config.folds[0])
    valid = valid.take(slice(0, max_rows))
    accelerator = make_accelerator(job.config.mixed_precision)
    model = new_model(job, train, accelerator)
    probs, _ = predict_proba(model, valid, accelerator, job.backbone.tokenizer.pad_id)
    return metrics.log_loss(valid.labels, probs)


def fit_folds(job: Job, encoded: EncodedRows) -> None:
    """Train the models of the run that are not done yet; one that was stopped resumes from its checkpoint.

    On several GPUs (or with `num_processes`) several models are trained side by side, one in a process; a single one by
    all processes together.

    Raises:
        Stopped: SIGTERM came; the state of what was under way is saved.
    """
    models = fold_models(job.config)
    left = [model for model in models if not job.folder.model_folder(model).is_dir()]
    if process_state().is_main_process:
        for model in sorted(set(models) - set(left)):
            print(f"{model.name}: done before, kept in {job.folder.model_folder(model)}", flush=True)
    num_processes = count_processes(job.config.num_processes)
    if left and num_processes > 1:
        started_at = time.time() - (time.perf_counter() - job.started)
        command, folder = ["fit", "--started-at", str(started_at)], str(job.folder.path)
        if len(left) == 1:
            run_together([*command, folder, left[0].name], num_processes)
        else:
            shares = [left[i::num_processes] for i in range(min(num_processes, len(left)))]
            names = [[model.name for model in share] for share in shares]
            command += ["--side-by-side", str(len(shares)), folder]
            run_side_by_side([[*command, *share] for share in names], [" ".join(share) for share in names])
    else:
        fit_here(job, encoded, left)


def fit_models(folder: RunFolder, names: list[str], started_at: float, side_by_side: int) -> None:
    """What a worker does: train some models of a run that was started at `started_at` (`time.time()`).

    `side_by_side`: workers that do so at the same time, each with models of its own.
    """
    config = RunConfig.from_mapping(read_json(folder / "config.json")["settings"])
    job = start(replace(config, out=str(folder.path)))
    job = replace(job, started=time.perf_counter() - (time.time() - started_at))
    fit_here(job, encode(job), [FoldModel.parse(name) for name in names], side_by_side)


def finish(job: Job, ladder: dict[str, OutOfSample]) -> dict:
    """Predict the test rows with the saved models; write submission, tables and, last, result.json.

    Returns:
        The content of result.json; nothing in processes other than the first.
    """
    probs, test_tokens = predict_run(job.folder, job.test_rows, job.config.num_processes)
    if not process_state().is_main_process:
        return {}
    models = fold_models(job.config)
    records = job.folder.gather_tables(models)
    write_submission(job.folder / "submission.csv", list(job.test_rows[ID]), probs)
    rows, honest = read_out_of_sample(job)
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy()
    everything = job.rows["label"].to_numpy(), job.rows["group"].to_numpy()
    best, best_probs = choose_baseline(ladder, *everything)
    best_probs, table = best_probs[job.validated], ladder_table(ladder, *everything)
    start_probs = best_probs if job.config.start_from == "none" else ladder[job.config.start_from].probs[job.validated]
    tokens = sum((TokenCount(*record["tokens"]) for record in records), TokenCount())
    predicted = sum((TokenCount(*record["valid_tokens"]) for record in records), test_tokens)
    named = [(model.name, record) for model, record in zip(models, records, strict=True)]
    alone = [record.get("encoder_log_loss") for record in records]  # of a fold of an earlier version: not known
    flips, sizes = ([record[name] for record in records] for name in ("flip_rate", "valid_rows"))
    result = {
        **score_job(job),
        "ladder_log_loss": metrics.log_loss(labels, best_probs),
        "ladder_best": best,
        "ladder": table.to_dict(orient="records"),
        "comparison": metrics.compare(labels, honest, best_probs, groups).to_dict(),
        "encoder_share": metrics.compare(labels, honest, start_probs, groups).to_dict(),
        "baseline_log_loss": metrics.log_loss(labels, start_probs),
        "encoder_only_log_loss": None if None in alone else float(np.average(alone, weights=sizes)),
        "encoder_warnings": {
            name: record["encoder_warning"] for name, record in named if record.get("encoder_warning")
        },
        "flip_rate": float(np.average(flips, weights=sizes)),
        "useful_token_share": tokens.useful_share,
        "predict_useful_token_share": predicted.useful_share,
        "tokens_per_second": tokens.real / sum(record["step_seconds"] for record in records),
        "seconds": _total_seconds(job, records),
        "best_epoch": float(np.mean([record["best_epoch"] for record in records])),
        "folds": records,
    }
    write_json(job.folder / "result.json", result)
    shutil.rmtree(job.folder / "checkpoint", ignore_errors=True)
    return result


def run(config: RunConfig) -> RunFolder:
    """All steps; on a folder whose run is complete, only says so.

    Started by torchrun or accelerate launch, every process calls this; the first alone writes.
    """
    with process_state().main_process_first():
        job = start(config)
    if job.folder.complete:
        print(f"{job.folder.path}: this run is complete; for a new one name another --out.", flush=True)
    else:
        encoded = encode(job)
        ladder = run_ladder(job) if process_state().is_main_process else {}
        fit_folds(job, encoded)
        finish(job, ladder)
        process_state().wait_for_everyone()
    return job.folder


def _total_seconds(job: Job, records: list[dict]) -> float:
    """Seconds in which this session or a fit of an earlier one worked; what ran side by side counts once."""
    now = time.time()
    session = now - (time.perf_counter() - job.started)
    spans = [(session, now)]
    for record in records:  # one of an earlier version does not say when it ended: before this session
        end = record.get("finished_at", session)
        spans.append((end - record["seconds"], end))
    total, covered = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total
