"""A job: inputs found and checked, run folder opened, and what is written into checkpoint/ before networks are trained.

checkpoint/folds.npy         the fold of each training row
checkpoint/rows/             of all rows (training, extra, test rows): tokens.npy, which all processes map, and
                             sides.safetensors, see `batching.Examples`; table.csv, see `Job.all_rows`
checkpoint/baseline-fold0/   model/         the fold's baseline, as the model folder of a run of `prefcls ladder`
                             offsets.npy    (N, 3) its offsets of all rows: of a training row by the models that were
                                            fitted without it, of other rows by all; NaN: left out
                             baselines.csv  predictions of the fold's rows by this and simpler baselines
"""

import time
from dataclasses import dataclass, replace
from functools import cached_property
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
from prefcls_lib.pipeline.folder import RunFolder, prediction_table, read_table, write_model_tables, write_table
from prefcls_lib.runtime.files import reading, sha256, write_whole
from prefcls_lib.runtime.kaggle import find_attached, run_folder

EXTRA, TEST = -1, -2  # in place of a fold, of rows that no model is validated on


@dataclass(frozen=True)
class Job:
    """A run whose inputs were all found and checked."""

    config: RunConfig  # with the backbone's recipe filled in
    folder: RunFolder
    rows: pd.DataFrame  # from `loading.read_rows`, as the test rows
    test_rows: pd.DataFrame
    folds: np.ndarray  # (N,) the fold in which each training row is validated
    data_sha256: dict[str, str]  # of the train and the test file, and of the extra rows' where there are any
    extra_rows: pd.DataFrame | None  # more rows to train on, never validated on
    started_at: float  # `time.time()` of this session
    backbone: Backbone | None = None  # its tokenizer checked; None for a run without a network
    wrote_prior: bool = False  # the submission in the folder is the prior's, written by `open_folder` just now

    @cached_property
    def all_rows(self) -> pd.DataFrame:
        """The training rows, the extra rows (fold EXTRA), then the test rows (fold TEST, label -1).

        `source` is 0 of training and test rows, k of those of the k-th extra file.
        """
        rows = self.rows.assign(fold=self.folds, **{SOURCE: 0})
        test = self.test_rows.assign(fold=TEST, label=-1, **{SOURCE: 0})
        return pd.concat([rows, self.extra_rows, test], ignore_index=True)

    @property
    def baseline_name(self) -> str:
        """The baseline that the network starts from; with start_from=none the one that it is compared with."""
        return ENSEMBLE if self.config.start_from in ("none", None) else self.config.start_from

    @property
    def validated(self) -> np.ndarray:
        """(N,) bool: rows that some model of this run is validated on."""
        return np.isin(self.folds, self.config.folds)


def read_job(config: RunConfig) -> Job:
    """Read both files and plan the folds; nothing is written yet. An earlier session's plan of the folds is taken."""
    started_at = time.time()
    paths = {kind: locate_csv(getattr(config, kind), kind) for kind in ("train", "test")}
    rows = take_rows(read_rows(paths["train"], labelled=True), config.max_train_rows, config.fold_seed)
    test_rows = read_rows(paths["test"], labelled=False)
    extra = [find_attached(name.strip()) for name in (config.extra_train or "").split(",") if name.strip()]
    extra_rows = read_extra_rows(extra, rows) if extra else None
    hashes = {kind: sha256(path) for kind, path in paths.items()}
    if extra:
        hashes["extra_train"] = ",".join(map(sha256, extra))
    folder = RunFolder(run_folder(config.out, config.init_from or config.backbone))
    plan = folder / "checkpoint" / "folds.npy"
    if plan.is_file() and (folder / "config.json").is_file():  # `open_folder` refuses that of another run
        with reading(plan, "Delete it, and run the same command again."):
            folds = np.load(plan, allow_pickle=False)
    else:
        folds = assign_folds(rows, config.num_folds, config.fold_seed, paths["train"])
    return Job(config, folder, rows, test_rows, folds, hashes, extra_rows, started_at)


def read_extra_rows(paths: list[Path], train_rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of all extra files, with the number of their file, 1 for the first; says how many are known already."""
    tables = [read_rows(path, labelled=True).assign(fold=EXTRA, **{SOURCE: k}) for k, path in enumerate(paths, 1)]
    rows, seen = pd.concat(tables, ignore_index=True), set(row_keys(train_rows))
    if known := sum(key in seen for key in row_keys(rows)):
        print(f"extra_train: {known:,} of {len(rows):,} rows are training rows, too. `prefcls convert --against` "
              "leaves them out.", flush=True)  # fmt: skip
    return rows


def open_folder(job: Job) -> Job:
    """Take the run folder for this job; where it holds no submission yet, write the training prior's."""
    config = job.config.with_recipe(job.backbone.recipe if job.backbone else {})
    job.folder.open(config, job.data_sha256)
    if not job.folder.complete:
        write_whole(job.folder / "checkpoint" / "folds.npy", lambda temporary: np.save(temporary, job.folds))
    submission = job.folder / "submission.csv"
    if wrote_prior := not submission.exists():
        prior = np.tile(class_shares(job.rows["label"]), (len(job.test_rows), 1))
        write_submission(submission, list(job.test_rows[ID]), prior)
    return replace(job, config=config, wrote_prior=wrote_prior)


@dataclass(frozen=True)
class TrainingData:
    """All that training reads of a run, in whatever process; `started_at`: `time.time()` of this session."""

    config: RunConfig
    folder: RunFolder
    backbone: Backbone
    encoded: Examples  # of all rows
    table: pd.DataFrame  # of all rows: id, fold, label, group, source, see `Job.all_rows`
    started_at: float


def prepare_rows(job: Job) -> TrainingData:
    """Write what networks read of the rows into checkpoint/, unless an earlier session has."""
    place = job.folder / "checkpoint" / "rows"

    def write(folder: Path) -> None:
        texts = (job.config.max_length, job.config.text_cleaning, job.config.architecture)
        encoded = encode_rows(job.all_rows, job.backbone.tokenizer, *texts)
        lengths = np.array([len(ids) for ids in encoded.token_ids])
        arrays = {"lengths": lengths, "sides": encoded.sides, "full_lengths": encoded.full_lengths}
        folder.mkdir()
        np.save(folder / "tokens.npy", np.concatenate(encoded.token_ids))
        save_file(arrays, folder / "sides.safetensors")
        write_table(folder / "table.csv", job.all_rows[[ID, "fold", "label", "group", SOURCE]])

    if not place.is_dir():
        write_whole(place, write)
    return load_training_data(job.folder, job.started_at, job.backbone)


def load_training_data(folder: RunFolder, started_at: float, backbone: Backbone | None = None) -> TrainingData:
    """Read what `prepare_rows` wrote; the token ids are mapped."""
    config, place = folder.read_config(), folder / "checkpoint" / "rows"
    backbone = backbone or load_backbone(config.init_from or config.backbone, config.max_length)
    with reading(place, "Delete it, and run the same command again."):
        arrays, table = load_file(place / "sides.safetensors"), read_table(place / "table.csv")
        tokens = np.load(place / "tokens.npy", mmap_mode="r").view(np.ndarray)
        token_ids = np.split(tokens, np.cumsum(arrays["lengths"])[:-1])
        encoded = Examples(token_ids, arrays["sides"], full_lengths=arrays["full_lengths"])
    return TrainingData(config, folder, backbone, encoded, table, started_at)


def fit_baselines(job: Job) -> pd.DataFrame:
    """Fit the baseline of each fold of the run, but for those that an earlier session has fitted.

    Where the run folder holds only the prior's submission, the baseline's takes its place.

    Returns:
        The content of oof_baselines.csv: predictions as in oof.csv, with the baseline's name (`model`) and the seconds
        in which those of the fold were fitted.
    """
    places = {fold: job.folder / "checkpoint" / f"baseline-fold{fold}" for fold in job.config.folds}
    if left := {fold: place for fold, place in places.items() if not place.is_dir()}:
        inputs = read_inputs(job.all_rows)
        for fold, place in left.items():
            _fit_fold(job, inputs, fold, place)
    predictions = pd.concat([read_table(place / "baselines.csv") for place in places.values()], ignore_index=True)
    write_table(job.folder / "oof_baselines.csv", predictions)
    if job.wrote_prior:
        job.folder.write_mean(list(job.test_rows[ID]), [place / "model" for place in places.values()])
    return predictions


def load_baseline(folder: RunFolder, fold: int) -> tuple[BaselineMean, np.ndarray]:
    """A fold's baseline that `fit_baselines` left, and its offsets (N, 3) of all rows."""
    place = folder / "checkpoint" / f"baseline-fold{fold}"
    with reading(place, "Delete it, and the baseline is fitted again."):
        return BaselineMean.load(place / "model"), np.load(place / "offsets.npy", allow_pickle=False)


def _fit_fold(job: Job, inputs: BaselineInputs, fold: int, place: Path) -> None:
    started, name, rows = time.perf_counter(), job.baseline_name, job.all_rows
    folds, groups, labels = (rows[column].to_numpy() for column in ("fold", "group", "label"))
    left_out = (folds == EXTRA) & np.isin(groups, groups[folds == fold])
    if extra := int((folds == EXTRA).sum()):
        shared = int(left_out.sum())
        print(f"fold{fold}: {extra - shared:,} extra rows; {shared:,} share a prompt with validation rows", flush=True)
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

    def write(temporary: Path) -> None:
        baseline.save(temporary / "model")
        np.save(temporary / "offsets.npy", offsets)
        all_tables = [table.assign(model=one, seconds=seconds) for one, table in tables.items()]
        write_table(temporary / "baselines.csv", pd.concat(all_tables))
        record = {"fold": fold, "valid_rows": len(valid), "seconds": seconds}
        write_model_tables(temporary / "model", record, pd.DataFrame(columns=["fold"]), tables[name], test)

    write_whole(place, write)
