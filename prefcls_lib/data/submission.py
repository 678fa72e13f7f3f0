"""submission.csv: written whole, read back, checked."""

from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.data.loading import read_csv
from prefcls_lib.data.schema import ID, LABEL_COLUMNS, check_probs
from prefcls_lib.runtime.files import UserError, reading, shown, write_whole

SMALLEST = 1e-6  # probabilities are kept this far from 0 and 1


def write_submission(path: str | Path, ids: list[str], probs: np.ndarray) -> None:
    """Write a submission; the file appears under `path` only after it was read back and checked.

    `ids`: N ids, as in test.csv and in its order; `probs`: (N, 3) in LABEL_COLUMNS order.
    """
    check_probs(probs, f"{path}: not written", ends=True)  # clipping would hide it
    probs = np.clip(probs, SMALLEST, 1 - SMALLEST)
    probs = probs / probs.sum(axis=1, keepdims=True)
    table = pd.DataFrame({ID: ids, **{name: probs[:, i] for i, name in enumerate(LABEL_COLUMNS)}})
    with write_whole(path) as temporary:
        table.to_csv(temporary, index=False)
        check_submission(temporary, ids)


def check_submission(path: str | Path, ids: list[str]) -> pd.DataFrame:
    """Read a submission, ids as text; check its columns, its ids (test.csv's, in their order) and its probabilities."""
    table, columns = pd.DataFrame(read_csv(Path(path))), [ID, *LABEL_COLUMNS]
    if list(table) != columns:
        raise UserError(f"{path}: columns are {', '.join(table)[:300]}; expected {', '.join(columns)}.")
    if len(table) != len(ids):
        raise UserError(f"{path}: {len(table)} rows, but the test file has {len(ids)}. Predict each test row once.")
    for number, (found, wanted) in enumerate(zip(table[ID], ids, strict=True), 1):
        if found != wanted:
            raise UserError(
                f"{path}: row {number} has id {shown(found)}; the test file has {shown(wanted)} there. Keep the order."
            )
    with reading(path, "Each probability must be a number."):
        # Python's float reads back every bit in every version of pandas; an empty cell is NaN, refused below
        for name in LABEL_COLUMNS:
            table[name] = [float(cell or "nan") for cell in table[name]]
    check_probs(table[list(LABEL_COLUMNS)].to_numpy(), str(path))
    return table
