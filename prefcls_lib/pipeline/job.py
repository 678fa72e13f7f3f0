"""A job: inputs found and checked, folds planned, run folder opened."""

import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.baselines.estimators import ENSEMBLE
from prefcls_lib.config import RunConfig
from prefcls_lib.data.loading import locate_csv, read_rows, row_keys
from prefcls_lib.data.schema import ID, SOURCE, class_shares
from prefcls_lib.data.splits import assign_folds, take_rows
from prefcls_lib.data.submission import write_submission
from prefcls_lib.models.backbones import Backbone
from prefcls_lib.pipeline.folder import RunFolder
from prefcls_lib.runtime.files import reading, sha256, write_whole
from prefcls_lib.runtime.kaggle import find_attached, run_folder


@dataclass(frozen=True)
class Job:
    """A run whose inputs were all found and checked."""

    config: RunConfig  # with the backbone's recipe filled in
    folder: RunFolder
    rows: pd.DataFrame  # from `loading.read_rows`, as the test rows
    test_rows: pd.DataFrame
    folds: np.ndarray  # (N,) the fold in which each training row is validated
    data_sha256: dict[str, str]  # of the train and the test file, and of the extra rows' where there are any
    extra_rows: pd.DataFrame | None  # more rows to train on, never validated on, with the number of their file
    started_at: float  # `time.time()` of this session
    backbone: Backbone | None = None  # its tokenizer checked; None for a run without a network
    wrote_prior: bool = False  # the submission in the folder is the prior's, written by `open_folder` just now

    @cached_property
    def all_rows(self) -> pd.DataFrame:
        """All rows to train on: the training rows, then the extra rows."""
        if self.extra_rows is None:
            return self.rows
        return pd.concat([self.rows.assign(**{SOURCE: 0}), self.extra_rows], ignore_index=True)

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
    plan = folder.checkpoint("folds.npy")
    if plan.is_file() and (folder / "config.json").is_file():  # `open_folder` refuses that of another run
        with reading(plan, "Delete it, and run the same command again."):
            folds = np.load(plan, allow_pickle=False)
    else:
        folds = assign_folds(rows, config.num_folds, config.fold_seed, paths["train"])
    return Job(config, folder, rows, test_rows, folds, hashes, extra_rows, started_at)


def read_extra_rows(paths: list[Path], train_rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of all extra files, with the number of their file, 1 for the first; says how many are known already."""
    tables = [read_rows(path, labelled=True).assign(**{SOURCE: number}) for number, path in enumerate(paths, 1)]
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
        write_whole(job.folder.checkpoint("folds.npy"), lambda temporary: np.save(temporary, job.folds))
    submission = job.folder / "submission.csv"
    if wrote_prior := not submission.exists():
        prior = np.tile(class_shares(job.rows["label"]), (len(job.test_rows), 1))
        write_submission(submission, list(job.test_rows[ID]), prior)
    return replace(job, config=config, wrote_prior=wrote_prior)
