"""CSV to rows: cells parsed into turns, labels and prompt groups.

Irregular cells, which the competition's files have, are treated alike in training and test rows:

- a `null` turn or an empty answer is the empty text (`""`); the structure features flag it;
- a lone surrogate (half of a UTF-16 pair) becomes U+FFFD, since no tokenizer accepts it;
- where the three cells of a row differ in their number of turns, the shorter ones are filled with `""`.

Any other deviation from the competition's format is an error that names file, row and column.
"""

import atexit
import csv
import gzip
import hashlib
import io
import json
import re
import sys
from contextlib import ExitStack
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.data.schema import (
    ID,
    LABEL_COLUMNS,
    MODEL_COLUMNS,
    NUM_CLASSES,
    PROMPT,
    RESPONSES,
    TEXT_COLUMNS,
    class_shares,
)
from prefcls_lib.runtime.files import UserError, write_whole
from prefcls_lib.runtime.kaggle import find_competition_file, is_competition_rerun

_SURROGATES = re.compile("[\ud800-\udfff]")
_SAMPLES = {"train": ("train.csv.gz", "train.csv"), "test": ("test.csv",)}  # Kaggle unpacks archives
_unzipped = ExitStack()  # keeps the sample files of a library that is imported from a wheel until the process ends
atexit.register(_unzipped.close)


def sample_path(kind: str) -> Path:
    """Path of the shipped rows: kind "train" (770 rows) or "test" (the competition's three)."""
    folder = resources.files("prefcls_lib") / "sample"
    found = next((folder / name for name in _SAMPLES[kind] if (folder / name).is_file()), folder / _SAMPLES[kind][0])
    return _unzipped.enter_context(resources.as_file(found))


def locate_csv(name: str, kind: str) -> Path:
    """The file behind `--train` or `--test`: a path, "sample", or "competition"; kind is "train" or "test"."""
    if name == "sample":
        return sample_path(kind)
    if name == "competition":
        return find_competition_file(f"{kind}.csv")
    return Path(name)


def read_rows(path: str | Path, labelled: bool) -> pd.DataFrame:
    """Read a CSV (or .csv.gz) in the competition's columns.

    Args:
        path: the file.
        labelled: True for training rows, which have the three winner columns.

    Returns:
        One row a comparison: `id` (str, exactly as in the file), `prompt`, `response_a`, `response_b` (lists
        of str, one a turn, of equal length), `group` (str, the prompt group); where labelled also `label`
        (int: 0 A wins, 1 B wins, 2 tie); `model_a`, `model_b` where the file has them.

    Raises:
        UserError: anything wrong with the file, naming file, row (1 = first row under the header), column.
    """
    path = Path(path)
    header, records = read_csv(path)
    needed = (ID, *TEXT_COLUMNS, *(LABEL_COLUMNS if labelled else ()))
    for name in needed:
        if header.count(name) != 1:
            state = "missing" if name not in header else "there more than once"
            raise UserError(
                f"{path}: column {name!r} is {state}. Columns found: {', '.join(header)}. Needed: {', '.join(needed)}."
            )
    table = dict(zip(header, map(list, zip(*records, strict=True)), strict=True))
    del records  # as each column of cells below, so that the file fits into the memory of a small machine
    rows = pd.DataFrame({ID: pd.Series(table[ID], dtype=object)})
    _check_ids(path, table[ID])
    for name in TEXT_COLUMNS:
        rows[name] = pd.Series(
            [_parse_turns(path, number, name, cell) for number, cell in enumerate(table.pop(name), 1)],
            dtype=object,
        )
    _fill_missing_turns(rows)
    if labelled:
        rows["label"] = _parse_labels(path, table)
        for name in MODEL_COLUMNS:
            if header.count(name) == 1:
                rows[name] = table[name]
    rows["group"] = [prompt_group(turns[0]) for turns in rows[PROMPT]]
    return rows


def write_rows(path: str | Path, rows: pd.DataFrame) -> None:
    """Write rows as `read_rows` reads them: id, the texts (a JSON list each), and models and labels where they are."""
    table = {name: rows[name] for name in (ID, *MODEL_COLUMNS) if name in rows}
    table |= {name: [json.dumps(turns) for turns in rows[name]] for name in TEXT_COLUMNS}
    if "label" in rows:
        table |= {name: (rows["label"] == label).astype(int) for label, name in enumerate(LABEL_COLUMNS)}
    write_whole(path, lambda temporary: pd.DataFrame(table).to_csv(temporary, index=False))


def prompt_group(first_turn: str) -> str:
    """The group that keeps rows with the same prompt in one fold: a hash of the normalised first turn."""
    normalised = " ".join(first_turn.casefold().split())
    return hashlib.blake2b(normalised.encode("utf-8"), digest_size=8).hexdigest()


def describe_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Counts and shares that describe the rows, one line each."""
    texts = {name: rows[name].map("\n".join) for name in TEXT_COLUMNS}
    turns = rows[PROMPT].map(len)
    empty = np.column_stack([rows[name].map(lambda t: any(x == "" for x in t)) for name in RESPONSES])
    facts = {
        "rows": len(rows),
        "different prompts": rows["group"].nunique(),
        "multi-turn rows": f"{(turns > 1).mean():.1%}",
        "most turns": int(turns.max()),
        "rows with an empty or null answer": f"{empty.any(axis=1).mean():.2%}",
        "identical answers": f"{(texts[RESPONSES[0]] == texts[RESPONSES[1]]).mean():.2%}",
        "median characters of an answer": int(np.median(np.concatenate([texts[n].str.len() for n in RESPONSES]))),
    }
    if "label" in rows:
        shares = class_shares(rows["label"])
        facts["A wins / B wins / tie"] = " / ".join(f"{share:.1%}" for share in shares)
    return pd.DataFrame({"value": facts}, dtype=object)


def format_row(row: pd.Series, max_chars: int = 3000) -> str:
    """One comparison as text: each turn's prompt, answer A, answer B, and the vote."""
    lines = [f"id {row[ID]}, {len(row[PROMPT])} turn(s)"]
    for number, (prompt, a, b) in enumerate(zip(*(row[name] for name in TEXT_COLUMNS), strict=True), 1):
        for title, text in (("PROMPT", prompt), ("ANSWER A", a), ("ANSWER B", b)):
            shown = text if len(text) <= max_chars else f"{text[:max_chars]} ... ({len(text):,} characters)"
            lines += ["", f"--- {title}, turn {number} " + "-" * 40, shown or "(empty)"]
    if "label" in row:
        models = f"  (A: {row[MODEL_COLUMNS[0]]}, B: {row[MODEL_COLUMNS[1]]})" if MODEL_COLUMNS[0] in row else ""
        lines += ["", f"=== {('A wins', 'B wins', 'tie')[row['label']]}{models}"]
    return "\n".join(lines)


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and records of a CSV file, each record as long as the header."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder. Name the CSV file in it.")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Check the path, or name the shipped rows: sample.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}. Save the file as UTF-8.") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Download the file again.") from error
    if "\0" in text:  # UTF-16 without a byte order mark passes as UTF-8; the cells escape what is not ASCII
        raise UserError(f"{path}: not UTF-8 text: it holds zero bytes, as UTF-16 does. Save the file as UTF-8.")
    del text  # StringIO would hold it with four bytes a character
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8-sig", newline=""), strict=True)
    records: list[list[str]] = []
    try:
        header = next(reader, None)
        for record in reader:
            if not record:
                continue  # a blank line
            if len(record) != len(header):
                raise UserError(
                    f"{path}: row {len(records) + 1} (line {reader.line_num}) has {len(record)} of "
                    f"{len(header)} columns. Is the file cut off? Download it again."
                )
            records.append(record)
    except csv.Error as error:
        raise UserError(
            f"{path}: row {len(records) + 1} (line {reader.line_num}) is broken ({error}). "
            "Is the file cut off? Download it again."
        ) from None
    if not header or not records:
        raise UserError(f"{path}: the file holds no rows.")
    return header, records


def _refuse(message: str) -> None:
    """Raise; but in a competition rerun, which nobody could correct, print: a broken cell is then read as one text."""
    if not is_competition_rerun():
        raise UserError(message)
    print(message, flush=True)


def _check_ids(path: Path, ids: list[str]) -> None:
    seen: dict[str, int] = {}
    for number, row_id in enumerate(ids, 1):
        if not row_id.strip():
            _refuse(f"{path}: row {number}, column {ID!r}: empty. Every row needs an id.")
        if row_id in seen:
            _refuse(
                f"{path}: id {row_id} is in rows {seen[row_id]} and {number}, column {ID!r}. "
                "Ids must be unique: remove the double rows."
            )
        seen[row_id] = number


def _parse_turns(path: Path, number: int, column: str, cell: str) -> list[str]:
    """One cell to its turns; `null` is the empty text."""
    try:
        turns = json.loads(cell)
    except (ValueError, RecursionError):
        turns = None
    if not isinstance(turns, list):
        _refuse(
            f"{path}: row {number}, column {column!r}: not a JSON list of texts: {cell[:60]!r}. "
            'Each cell must look like ["first turn", "second turn"].'
        )
        turns = [cell]
    for turn in turns:
        if turn is not None and not isinstance(turn, str):
            _refuse(
                f"{path}: row {number}, column {column!r}: the list holds {json.dumps(turn)[:40]}, "
                "which is neither text nor null. Each turn must be a quoted text."
            )
            turns = [cell]
            break
    return [_SURROGATES.sub("\ufffd", turn) if turn else "" for turn in turns]


def _fill_missing_turns(rows: pd.DataFrame) -> None:
    for cells in zip(*(rows[name] for name in TEXT_COLUMNS), strict=True):
        most = max(1, *map(len, cells))
        for turns in cells:
            turns.extend([""] * (most - len(turns)))


def _parse_labels(path: Path, table: dict[str, list[str]]) -> np.ndarray:
    """(N,) labels 0, 1, 2 from the three winner columns, exactly one of which is 1."""
    values = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
    winners = np.zeros((len(table[ID]), NUM_CLASSES), dtype=np.int64)
    for column, name in enumerate(LABEL_COLUMNS):
        for number, cell in enumerate(table[name], 1):
            if cell.strip() not in values:
                raise UserError(f"{path}: row {number}, column {name!r}: {cell!r} is not 0 or 1.")
            winners[number - 1, column] = values[cell.strip()]
    wrong = np.flatnonzero(winners.sum(axis=1) != 1)
    if len(wrong):
        raise UserError(
            f"{path}: row {wrong[0] + 1}: {winners[wrong[0]].sum()} of the columns {', '.join(LABEL_COLUMNS)} "
            f"are 1; exactly one must be ({len(wrong)} such rows)."
        )
    return winners.argmax(axis=1)
