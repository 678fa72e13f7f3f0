"""A job: inputs found and checked, run folder opened, and what is written into checkpoint/ before networks are trained.

checkpoint/table.csv         id, fold, label, prompt group and source of all rows, see `Job.table`
checkpoint/rows/             tokens.npy, which all processes map, and sides.safetensors, see `batching.Examples`
checkpoint/baseline-fold0/   model/         the fold's baseline, as the model folder of a run of `prefcls ladder`
                             offsets.npy    (N, 3) its offsets of all rows: of a training row by the models that were
                                            fitted without it, of other rows by all; NaN: left out
                             baselines.csv  predictions of the fold's rows by this and simpler baselines
"""

import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file
from scipy.special import softmax

from prefcls_lib.baselines.columns import BaselineInputs, read_inputs
from prefcls_lib.baselines.estimators import ENSEMBLE
from prefcls_lib.baselines.out_of_fold import BaselineMean, fit_out_of_fold, fit_simple
from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.loading import locate_csv, read_rows, row_keys
from prefcls_lib.data.schema import ID, NUM_CLASSES, SOURCE, class_shares
from prefcls_lib.data.splits import assign_folds, take_rows
from prefcls_lib.data.submission import write_submission
from prefcls_lib.data.tokenization import encode_rows
from prefcls_lib.models.backbones import Backbone, load_backbone
from prefcls_lib.pipeline import folder as run_files
from prefcls_lib.pipeline.folder import prediction_table, read_table, write_model_tables, write_table
from prefcls_lib.runtime.files import lock_folder, reading, sha256, write_json, write_whole
from prefcls_lib.runtime.kaggle import find_attached, run_folder

EXTRA, TEST = -1, -2  # in place of a fold, of rows that no model is validated on
hold_folder = cache(lock_folder)  # until this process ends


@dataclass(frozen=True)
class Job:
    """A run whose inputs were all found and checked; `fold` says in which fold a training row is validated."""

    config: RunConfig  # from `open_folder` on with the backbone's recipe filled in
    folder: Path
    # training rows, extra rows (fold EXTRA), then test rows (fold TEST, label -1), as from `loading.read_rows`, each
    # with its fold and its source: k of the k-th extra file, else 0; in a worker without the texts
    table: pd.DataFrame
    data_sha256: dict[str, str]  # of the train and the test file, and of the extra rows' where there are any
    started_at: float  # `time.time()` of this session
    backbone: Backbone | None = None  # its tokenizer checked; None for a run without a network
    examples: Examples | None = None  # token ids of all rows, from `prepare` on

    @property
    def rows(self) -> pd.DataFrame:
        """The training rows."""
        return self.table[self.table["fold"] >= 0]

    @property
    def test_rows(self) -> pd.DataFrame:
        """The test rows."""
        return self.table[self.table["fold"] == TEST]

    @property
    def baseline_name(self) -> str:
        """The baseline that the network starts from; with start_from=none the one that it is compared with."""
        return ENSEMBLE if self.config.start_from in ("none", None) else self.config.start_from


def read_job(config: RunConfig) -> Job:
    """Read both files and plan the folds; nothing is written yet. An earlier session's plan of the folds is taken."""
    started_at = time.time()
    paths = {kind: locate_csv(getattr(config, kind), kind) for kind in ("train", "test")}
    rows = take_rows(read_rows(paths["train"], labelled=True), config.max_train_rows, config.fold_seed)
    test_rows = read_rows(paths["test"], labelled=False)
    extra = [find_attached(name.strip()) for name in (config.extra_train or "").split(",") if name.strip()]
    extra_rows = [read_rows(path, labelled=True).assign(fold=EXTRA, source=k) for k, path in enumerate(extra, 1)]
    hashes = {kind: sha256(path) for kind, path in paths.items()}
    if extra:
        hashes["extra_train"] = ",".join(map(sha256, extra))
        keys, seen = [key for one in extra_rows for key in row_keys(one)], set(row_keys(rows))
        if known := sum(key in seen for key in keys):
            print(f"extra_train: {known:,} of {len(keys):,} rows are training rows, too. `prefcls convert --against` "
                  "leaves them out.", flush=True)  # fmt: skip
    folder = run_folder(config.out, config.init_from or config.backbone)
    resumed = run_files.earlier_run(folder, config.resume_from)
    plan = resumed / "checkpoint" / "table.csv"
    if plan.is_file() and (resumed / "config.json").is_file():  # `open_folder` refuses that of another run
        table = read_table(plan)
        folds = table[table["fold"] >= 0].set_index(ID)["fold"].reindex(rows[ID]).to_numpy()
    else:
        folds = assign_folds(rows, config.num_folds, config.fold_seed, paths["train"])
    rows, test_rows = rows.assign(fold=folds, source=0), test_rows.assign(fold=TEST, label=-1, source=0)
    table = pd.concat([rows, *extra_rows, test_rows], ignore_index=True)[list(rows)]
    return Job(config, folder, table, hashes, started_at)


def open_folder(job: Job, backbone: Backbone | None = None) -> Job:
    """Hold the run folder until the end of this process, and write the settings; one that is complete stays as it is.

    What the setting resume_from names is copied, where no run is in the folder. Where no submission is in it, the
    training prior's is written. A UserError where another process holds the folder, the run there has other settings or
    data, or it cannot be written.
    """
    job = replace(job, config=job.config.with_recipe(backbone.recipe if backbone else {}), backbone=backbone)
    folder, config, submission = job.folder, job.config, job.folder / "submission.csv"
    complete = (folder / "result.json").is_file()
    if not complete:
        hold_folder(folder.resolve())
    earlier = run_files.earlier_run(folder, config.resume_from)
    run_files.refuse_another(earlier, config, job.data_sha256)
    if not complete:
        for name in ("model", "checkpoint"):
            if (earlier / name).is_dir() and not (folder / name).is_dir():
                with write_whole(folder / name) as copy:
                    run_files.copy_folder(earlier / name, copy)
        write_json(folder / "config.json", {"settings": config.to_dict(), "data_sha256": job.data_sha256})
        write_table(folder / "checkpoint" / "table.csv", job.table[[ID, "fold", "label", "group", SOURCE]])
    if not submission.exists():
        shares = np.tile(class_shares(job.rows["label"]), (len(job.test_rows), 1))
        write_submission(submission, list(job.test_rows[ID]), shares)
    return job


def load_job(folder: Path, started_at: float) -> Job:
    """What a worker reads of a run that was started, in place of `read_job` to `prepare`: no texts."""
    config, table = run_files.read_config(folder), read_table(folder / "checkpoint" / "table.csv")
    backbone = load_backbone(config.init_from or config.backbone, config.max_length)
    return prepare(Job(config, folder, table, {}, started_at, backbone))


def prepare(job: Job) -> Job:
    """The job with the token ids of all rows, mapped; they are written into checkpoint/, unless they were before."""
    place = job.folder / "checkpoint" / "rows"
    if not place.is_dir():
        texts = (job.config.max_length, job.config.text_cleaning, job.config.architecture)
        examples = encode_rows(job.table, job.backbone.tokenizer, *texts)
        lengths = np.array([len(ids) for ids in examples.token_ids])
        arrays = {"lengths": lengths, "sides": examples.sides, "full_lengths": examples.full_lengths}
        with write_whole(place) as folder:
            folder.mkdir()
            np.save(folder / "tokens.npy", np.concatenate(examples.token_ids))
            save_file(arrays, folder / "sides.safetensors")
    with reading(place, "Delete it, and run the same command again."):
        arrays = load_file(place / "sides.safetensors")
        tokens = np.load(place / "tokens.npy", mmap_mode="r").view(np.ndarray)
        token_ids = np.split(tokens, np.cumsum(arrays["lengths"])[:-1])
        return replace(job, examples=Examples(token_ids, arrays["sides"], full_lengths=arrays["full_lengths"]))


def fit_baselines(job: Job) -> pd.DataFrame:
    """Fit the baseline of each fold of the run, but for those that an earlier session has fitted.

    Until the networks are trained the submission is that of the baseline.

    Returns:
        The content of oof_baselines.csv: predictions as in oof.csv, with the baseline's name (`model`) and the seconds
        in which those of the fold were fitted.
    """
    places = {fold: job.folder / "checkpoint" / f"baseline-fold{fold}" for fold in job.config.folds}
    if left := {fold: place for fold, place in places.items() if not place.is_dir()}:
        inputs = read_inputs(job.table)
        for fold, place in left.items():
            _fit_fold(job, inputs, fold, place)
    if not (job.folder / "result.json").is_file():  # a notebook on a run that is complete
        run_files.write_mean(job.folder, job.test_rows[ID], [place / "model" for place in places.values()])
    predictions = pd.concat([read_table(place / "baselines.csv") for place in places.values()], ignore_index=True)
    write_table(job.folder / "oof_baselines.csv", predictions)
    return predictions


def load_baseline(folder: Path, fold: int) -> tuple[BaselineMean, np.ndarray]:
    """A fold's baseline that `fit_baselines` left, and its offsets (N, 3) of all rows."""
    place = folder / "checkpoint" / f"baseline-fold{fold}"
    with reading(place, "Delete it, and the baseline is fitted again."):
        return BaselineMean.load(place / "model"), np.load(place / "offsets.npy", allow_pickle=False)


def _fit_fold(job: Job, inputs: BaselineInputs, fold: int, place: Path) -> None:
    started, name, rows = time.perf_counter(), job.baseline_name, job.table
    folds, groups, labels = (rows[column].to_numpy() for column in ("fold", "group", "label"))
    left_out = (folds == EXTRA) & np.isin(groups, groups[folds == fold])
    if left_out.any():
        print(f"fold{fold}: {left_out.sum():,} extra rows share a prompt with validation rows: left out", flush=True)
    train, valid = np.flatnonzero((folds != fold) & (folds != TEST) & ~left_out), np.flatnonzero(folds == fold)
    train_inputs, valid_inputs = inputs.take(train), inputs.take(valid)
    offsets = np.full((len(rows), NUM_CLASSES), np.nan)
    given = (train_inputs, labels[train], groups[train], job.config.fold_seed)
    baseline, offsets[train] = fit_out_of_fold(name, *given, f"fold{fold}")
    members = {one: models.predict(valid_inputs) for one, models in baseline.members().items()}
    offsets[valid] = np.mean(list(members.values()), axis=0)
    offsets[folds == TEST] = baseline.predict(inputs.take(folds == TEST))
    probs = {one: model.predict_proba(valid_inputs) for one, model in fit_simple(train_inputs, labels[train]).items()}
    probs |= {one: softmax(values, axis=1) for one, values in (members | {name: offsets[valid]}).items()}
    tables = {one: prediction_table(rows.iloc[valid], values) for one, values in probs.items()}
    test = prediction_table(job.test_rows[[ID]], softmax(offsets[folds == TEST], axis=1))
    seconds = time.perf_counter() - started
    with write_whole(place) as temporary:
        baseline.save(temporary / "model")
        np.save(temporary / "offsets.npy", offsets)
        all_tables = [table.assign(model=one, seconds=seconds) for one, table in tables.items()]
        write_table(temporary / "baselines.csv", pd.concat(all_tables))
        record = {"fold": fold, "valid_rows": len(valid), "seconds": seconds}
        no_history = pd.DataFrame(columns=["fold"])
        write_model_tables(temporary / "model", record, history=no_history, oof=tables[name], test=test)
