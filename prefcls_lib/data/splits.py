"""The rows that are used, and the folds of all models: by content and seed, whatever the order of the rows."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.data.schema import ID, LABEL_COLUMNS, NUM_CLASSES
from prefcls_lib.runtime.files import UserError


def take_rows(rows: pd.DataFrame, max_rows: int, seed: int) -> pd.DataFrame:
    """At most `max_rows` rows (0: all), chosen by a hash of seed and id, in file order."""
    if max_rows == 0 or len(rows) <= max_rows:
        return rows
    order = np.argsort([_content_hash(seed, row_id) for row_id in rows[ID]], kind="stable")
    return rows.iloc[np.sort(order[:max_rows])].reset_index(drop=True)


def assign_folds(rows: pd.DataFrame, num_folds: int, seed: int, source: str | Path = "training rows") -> np.ndarray:
    """(N,) int: the fold in which each row is validated; stratified by label, no prompt group in two folds.

    The plan depends on the rows' content and on `seed`, not on the order of the rows. `source` is for messages.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # late, as in `trees.fit_trees`

    labels = rows["label"].to_numpy()
    prompts = np.array([rows["group"][labels == label].nunique() for label in range(NUM_CLASSES)])
    if prompts.min() <= num_folds:  # with more prompts than folds, no fold had all of a class in 2,000 random plans
        raise UserError(
            f"{source}: too few rows for num_folds={num_folds}: among {len(rows)} rows, those with "
            f"{LABEL_COLUMNS[prompts.argmin()]}=1 have {prompts.min()} different prompts; more than {num_folds} are "
            "needed. Use more rows (see max_train_rows), or set num_folds lower."
        )
    groups = np.array([_content_hash(seed, group) for group in rows["group"]])
    order = np.argsort(groups, kind="stable")
    folds = np.empty(len(rows), dtype=np.int64)
    splitter = StratifiedGroupKFold(n_splits=num_folds, shuffle=False)
    for fold, (_, valid) in enumerate(splitter.split(order, labels[order], groups[order])):
        folds[order[valid]] = fold
        if len(np.unique(groups[order[valid]])) < 2:  # the score would have no interval
            what = f"fold {fold} has only one prompt, that of {len(valid)} of {len(rows)} rows"
            raise UserError(f"{source}: {what}. Set num_folds lower, or leave out some of these rows.")
    return folds


def _content_hash(seed: int, text: str) -> str:
    return hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=8).hexdigest()
