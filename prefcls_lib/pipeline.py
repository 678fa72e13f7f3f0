"""The main job in the order of its steps; the command line and the notebooks both call these and nothing else.

job = start(config)              everything that can be wrong is found here; a prior submission is in place
encoded = encode(job)            token ids of the training rows
ladder = run_ladder(job)         plain baselines on the same folds
fit_folds(job, encoded)          one model a fold, each saved when it is done
result = finish(job, ladder)     submission.csv, the tables, result.json
"""

import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib import metrics
from prefcls_lib.backbones import load_backbone
from prefcls_lib.baselines import OutOfSample, best_rung, cross_validate, ladder_table
from prefcls_lib.batching import Examples, TokenCount, make_chunks, plan_epoch, split_step
from prefcls_lib.checkpoint import SavedModel, build_model, load_model, save_model
from prefcls_lib.config import RunConfig
from prefcls_lib.environment import make_accelerator, seed_everything
from prefcls_lib.features import FeatureScaler, compute_features
from prefcls_lib.files import UserError, read_json, write_json, write_whole
from prefcls_lib.job import Job, claim_folder, read_job, read_out_of_sample, score_job
from prefcls_lib.model import PreferenceModel
from prefcls_lib.predict import predict_proba
from prefcls_lib.resume import stop_on_sigterm
from prefcls_lib.rungs import FAST_RUNGS, load_rung, predict_rows
from prefcls_lib.runs import RunFolder, prediction_table, write_table
from prefcls_lib.schema import ID, NUM_CLASSES
from prefcls_lib.submission import write_submission
from prefcls_lib.tokenization import EncodedRows, encode_rows
from prefcls_lib.train import MIN_ROWS_TO_SELECT, Collapsed, Session, fit

MAX_RESTARTS = 2  # after a collapse
FINISH_SECONDS = 10  # of a time budget, for loading and saving after the last fold


def start(config: RunConfig) -> Job:
    """Check files, settings, folds and the backbone; claim the run folder; put the prior's submission in it.

    Raises:
        UserError: whatever is wrong, before any time is spent.
    """
    job = read_job(config)
    backbone = load_backbone(config.backbone, config.max_length)
    make_accelerator(config.mixed_precision)
    return claim_folder(replace(job, config=config.with_recipe(backbone.recipe(config.recipe)), backbone=backbone))


def encode(job: Job) -> EncodedRows:
    """Token ids of the training rows."""
    return encode_rows(job.rows, job.backbone.tokenizer, job.config.max_length, job.config.text_cleaning)


def run_ladder(job: Job, rung_names: tuple[str, ...] = FAST_RUNGS) -> dict[str, OutOfSample]:
    """The plain baselines, fitted and scored on the folds of this run.

    Where the run folder holds only the prior's submission, the best rung's takes its place.
    """
    results = cross_validate(rung_names, job.rows, job.folds, job.config.folds, job.config.seed)
    if job.wrote_prior:
        best = best_rung(results, job.rows["label"].to_numpy())
        probs = predict_rows(results[best].rungs, job.test_rows)
        write_submission(job.folder / "submission.csv", list(job.test_rows[ID]), probs)
    return results


def describe_first_step(job: Job, encoded: EncodedRows) -> pd.DataFrame:
    """The chunks of the first optimizer step: their micro-step, shape, and share of useful tokens."""
    train, _, _ = _split(job, encoded, job.config.folds[0])
    step = plan_epoch(train.lengths, job.config.batch_size, job.config.seed, epoch=0)[0]
    lines = []
    for number, rows in enumerate(split_step(step, train.lengths, job.config.max_tokens_per_micro_step)):
        token_ids = [train.token_ids[i] for i in np.unique(train.sides[rows])]
        for chunk in make_chunks(token_ids, job.backbone.tokenizer.pad_id):
            sides, length = chunk.input_ids.shape
            share = float(chunk.attention_mask.float().mean())
            lines.append({"micro_step": number, "sides": sides, "length": length, "useful_token_share": share})
    return pd.DataFrame(lines)


def untrained_log_loss(job: Job, encoded: EncodedRows, max_rows: int = 64) -> float:
    """Log loss of the untrained model on the first validation rows: the cross-entropy of the training prior.

    Says at once whether data, labels and head fit together.
    """
    train, valid, _ = _split(job, encoded, job.config.folds[0])
    valid = valid.take(slice(0, max_rows))
    accelerator = make_accelerator(job.config.mixed_precision)
    model = _new_model(job, train.labels).to(accelerator.device)
    probs, _ = predict_proba(model, valid, accelerator, job.backbone.tokenizer.pad_id)
    return metrics.log_loss(valid.labels, probs)


def fit_folds(job: Job, encoded: EncodedRows) -> None:
    """Train one model for each of `config.folds`; a fold that was finished before is kept, one under way gone on with.

    Raises:
        Stopped: SIGTERM came; the state of the fold under way is saved.
    """
    left = [fold for fold in job.config.folds if not job.folder.fold_folder(fold).is_dir()]
    for fold in sorted(set(job.config.folds) - set(left)):
        print(f"fold {fold}: done before, kept in {job.folder.fold_folder(fold)}", flush=True)
    side_tokens = encoded.lengths[encoded.sides].mean()
    tokens_to_predict = int(2 * side_tokens * len(job.test_rows) * len(job.config.folds))
    with stop_on_sigterm() as stop:
        for number, fold in enumerate(left):
            deadline = job.deadline
            if deadline is not None:  # an equal share of what is left for each fold, after loading and saving
                now = time.perf_counter()
                deadline = now + (deadline - FINISH_SECONDS - now) / (len(left) - number)
            session = Session(job.folder.state_folder(fold), deadline, tokens_to_predict, stop)
            _fit_fold(job, encoded, fold, session)
            shutil.rmtree(job.folder.state_folder(fold), ignore_errors=True)
        shutil.rmtree(job.folder / "checkpoint", ignore_errors=True)


def finish(job: Job, ladder: dict[str, OutOfSample]) -> dict:
    """Predict the test rows with the saved models; write submission, tables and, last, result.json.

    Returns:
        The content of result.json.
    """
    records = job.folder.gather_folds(job.config.folds)
    probs, test_tokens = predict_run(job.folder, job.test_rows)
    write_submission(job.folder / "submission.csv", list(job.test_rows[ID]), probs)
    rows, honest = read_out_of_sample(job)
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy()
    best = best_rung(ladder, job.rows["label"].to_numpy())
    best_probs = ladder[best].probs[job.validated]
    table = ladder_table(ladder, job.rows["label"].to_numpy(), job.rows["group"].to_numpy())
    tokens = sum((TokenCount(*record["tokens"]) for record in records), TokenCount())
    predicted = sum((TokenCount(*record["valid_tokens"]) for record in records), test_tokens)
    flips = [record["flip_rate"] for record in records]
    result = {
        **score_job(job),
        "ladder_log_loss": metrics.log_loss(labels, best_probs),
        "ladder_best": best,
        "ladder": table.to_dict(orient="records"),
        "comparison": metrics.compare(labels, honest, best_probs, groups).to_dict(),
        "flip_rate": float(np.average(flips, weights=[record["valid_rows"] for record in records])),
        "useful_token_share": tokens.useful_share,
        "predict_useful_token_share": predicted.useful_share,
        "tokens_per_second": tokens.real / sum(record["step_seconds"] for record in records),
        "seconds": _total_seconds(job, records),
        "best_epoch": float(np.mean([record["best_epoch"] for record in records])),
        "folds": records,
    }
    write_json(job.folder / "result.json", result)
    return result


def run(config: RunConfig) -> RunFolder:
    """All steps; on a folder whose run is complete, only says so."""
    job = start(config)
    if job.folder.complete:
        print(f"{job.folder.path}: this run is complete; for a new one name another --out.", flush=True)
    else:
        encoded = encode(job)
        ladder = run_ladder(job)
        fit_folds(job, encoded)
        finish(job, ladder)
    return job.folder


def predict_run(folder: RunFolder, rows: pd.DataFrame) -> tuple[np.ndarray, TokenCount]:
    """Probabilities (N, 3) of new rows, averaged over the run's folds; needs nothing but the run folder."""
    folders = folder.fold_folders()
    if (folders[0] / "rung.json").exists():
        return predict_rows([load_rung(path) for path in folders], rows), TokenCount()
    total = np.zeros((len(rows), NUM_CLASSES))
    tokens = TokenCount()
    raw = encoded = None
    for number, path in enumerate(folders, 1):
        saved = load_model(path)
        if encoded is None:  # the folds of a run share tokenizer and text settings
            encoded = encode_rows(rows, saved.backbone.tokenizer, saved.max_length, saved.text_cleaning)
            raw = compute_features(rows) if saved.scaler else None
        probs, used = _predict_saved(saved, encoded, raw, f"predict {number}/{len(folders)}")
        total += probs
        tokens += used
    return total / len(folders), tokens


def _predict_saved(
    saved: SavedModel, encoded: EncodedRows, raw: np.ndarray | None, label: str
) -> tuple[np.ndarray, TokenCount]:
    accelerator = make_accelerator(saved.mixed_precision)
    features = None if saved.scaler is None else saved.scaler.transform(raw).astype(np.float32)
    examples = Examples(encoded.token_ids, encoded.sides, features)
    model = saved.model.to(accelerator.device)
    return predict_proba(model, examples, accelerator, saved.backbone.tokenizer.pad_id, label)


def _fit_fold(job: Job, encoded: EncodedRows, fold: int, session: Session) -> None:
    started, config = time.perf_counter(), job.config
    train, valid, scaler = _split(job, encoded, fold)
    pad_id = job.backbone.tokenizer.pad_id
    attempts_file = job.folder / "checkpoint" / f"fold{fold}-collapsed.json"
    collapsed = read_json(attempts_file)["collapsed"] if attempts_file.exists() else []
    while True:
        tried = len(collapsed)  # every attempt after a collapse: new seed, half the rate, twice the warm-up
        attempt = replace(
            config,
            seed=config.seed + 1000 * tried,
            learning_rate=config.learning_rate / 2**tried,
            warmup_ratio=min(0.5, config.warmup_ratio * 2**tried),
        )
        seed_everything(attempt.seed + fold)
        accelerator = make_accelerator(config.mixed_precision)
        model = _new_model(job, train.labels)
        try:
            fitted = fit(model, train, valid, attempt, accelerator, pad_id, f"fold {fold}", session)
            break
        except Collapsed as error:
            shutil.rmtree(session.state_folder, ignore_errors=True)
            collapsed.append(error.record)
            write_json(attempts_file, {"collapsed": collapsed})
            if config.on_collapse == "stop" or len(collapsed) > MAX_RESTARTS:
                raise UserError(
                    f"{error}. Set learning_rate lower or warmup_ratio higher; the baseline's submission is in place."
                ) from None
            print(
                f"fold {fold}: restart {len(collapsed)} of {MAX_RESTARTS}, half the rate, twice the warm-up", flush=True
            )
    rows = job.rows[job.folds == fold]
    swapped, _ = predict_proba(model, valid.swapped(), accelerator, pad_id)
    saved = honest = fitted.valid_probs[fitted.chosen]
    if len(rows) >= MIN_ROWS_TO_SELECT:
        honest, _ = metrics.choose_honestly(fitted.valid_probs, valid.labels, rows["group"].to_numpy())
    record = {
        "fold": fold,
        "valid_rows": len(rows),
        "flip_rate": metrics.flip_rate(saved, swapped),
        "best_epoch": float(fitted.history["epoch"][fitted.chosen]),
        "tokens": [fitted.tokens.real, fitted.tokens.computed],
        "valid_tokens": [fitted.valid_tokens.real, fitted.valid_tokens.computed],
        "step_seconds": fitted.step_seconds,
        "steps": int(fitted.history["step"].iloc[-1]),
        "planned_steps": math.ceil(len(train) / config.batch_size) * config.num_epochs,
        "collapsed": collapsed,
        "skipped_steps": int(fitted.history["skipped_steps"].iloc[-1]),
        "mixed_precision": accelerator.mixed_precision,
        "seconds": time.perf_counter() - started,
    }

    def write(folder: Path) -> None:
        folder.mkdir()
        save_model(folder, model, job.backbone, scaler, config)
        write_table(folder / "history.csv", fitted.history.assign(fold=fold))
        write_table(folder / "oof.csv", prediction_table(rows, fold, honest))
        write_table(folder / "valid.csv", prediction_table(rows, fold, saved).assign(group=rows["group"].to_numpy()))
        write_json(folder / "fold.json", record)

    write_whole(job.folder.fold_folder(fold), write)


def _split(job: Job, encoded: EncodedRows, fold: int) -> tuple[Examples, Examples, FeatureScaler | None]:
    """Training and validation examples of a fold; features standardised on the training rows."""
    scaler = features = None
    is_train = job.folds != fold
    if job.config.structure_features:
        scaler = FeatureScaler.fit(job.features[is_train])
        features = scaler.transform(job.features).astype(np.float32)
    everything = Examples(encoded.token_ids, encoded.sides, features, job.rows["label"].to_numpy())
    return everything.take(is_train), everything.take(~is_train), scaler


def _new_model(job: Job, labels: np.ndarray) -> PreferenceModel:
    model = build_model(job.backbone.path, job.config)
    model.head.start_at_prior(tuple(np.bincount(labels, minlength=NUM_CLASSES) / len(labels)))
    return model


def _total_seconds(job: Job, records: list[dict]) -> float:
    """Seconds of this session, or of all folds where some were fitted in an earlier one."""
    return max(time.perf_counter() - job.started, sum(record["seconds"] for record in records))
