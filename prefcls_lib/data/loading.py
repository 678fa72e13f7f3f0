"""CSV to rows: cells parsed into turns, labels and prompt groups.

Irregular cells, which the competition's files have, are treated alike in training and test rows:

- a `null` turn or an empty answer is the empty text (`""`); the structure features flag it;
- a lone surrogate (half of a UTF-16 pair) becomes U+FFFD, since no tokenizer accepts it;
- where the three cells of a row differ in their number of turns, the shorter ones are filled with `""`.

Any other deviation from the competition's format is an error that names file, row and column.
"""

import atexit
import gzip
import hashlib
import io
import json
import re
import zipfile
from contextlib import ExitStack
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.data.schema import ID, LABEL_COLUMNS, MODEL_COLUMNS, PROMPT, RESPONSES, TEXT_COLUMNS, class_shares
from prefcls_lib.runtime.files import UserError, reading, shown, write_whole
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
    """Read a CSV (plain, in gzip, or alone in a zip archive) in the competition's columns.

    Args:
        path: the file.
        labelled: True for training rows, which have the three winner columns.

    Returns:
        One row a comparison: `id` (str, exactly as in the file), `prompt`, `response_a`, `response_b` (lists
        of str, one a turn, of equal length), `group` (str, the prompt group); where labelled also `label`
        (int: 0 A wins, 1 B wins, 2 tie); `model_a`, `model_b` where the file has them. What is wrong with the file is
        told with its row (1 = first row under the header) and column.
    """
    return parse_rows(path, read_csv(Path(path)), labelled)


def parse_rows(path: str | Path, table: dict[str, list[str]], labelled: bool) -> pd.DataFrame:
    """Rows as `read_rows` gives them, of cells by column; `path` is for messages."""
    needed = (ID, *TEXT_COLUMNS, *(LABEL_COLUMNS if labelled else ()))
    for name in needed:
        if name not in table:
            found = ", ".join(table)[:300]
            raise UserError(f"{path}: column {name!r} is missing. Columns found: {found}. Needed: {', '.join(needed)}.")
    _check_ids(path, table[ID])
    rows = pd.DataFrame({ID: pd.Series(table[ID], dtype=object)})
    for name in TEXT_COLUMNS:  # each column of cells is dropped at once: the file fits into a small machine's memory
        cells = enumerate(table.pop(name), 1)
        rows[name] = pd.Series([_parse_turns(path, number, name, cell) for number, cell in cells], dtype=object)
    _fill_missing_turns(rows)
    if labelled:
        rows["label"] = _parse_labels(path, table)
        for name in MODEL_COLUMNS:
            if name in table:
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


def row_keys(rows: pd.DataFrame) -> list[bytes]:
    """What is the same for the same prompts and answers, A and B in either order, with any white space.

    Last turns in which both answers are empty do not count: one file has them, another leaves them out.
    """
    keys = []
    for cells in zip(*(rows[name] for name in TEXT_COLUMNS), strict=True):
        prompt, a, b = ([" ".join(turn.split()) for turn in turns] for turns in cells)
        turns = max((number for number, answers in enumerate(zip(a, b, strict=True), 1) if any(answers)), default=1)
        text = json.dumps([prompt[:turns], *sorted((a[:turns], b[:turns]))])
        keys.append(hashlib.blake2b(text.encode(), digest_size=16).digest())
    return keys


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


# first bytes of files that are no CSV, what they are, and what to do
_FOREIGN = {
    b"PAR1": "a Parquet file. `prefcls convert` reads those of the public arena sets",
    b"\xfd7zXZ": "an xz archive. Unpack it: xz -d",
    b"BZh": "a bzip2 archive. Unpack it: bzip2 -d",
    b"(\xb5/\xfd": "a zstd archive. Unpack it: zstd -d",
    b"7z\xbc\xaf": "a 7z archive. Unpack it",
    b"\xd0\xcf\x11\xe0": "an Excel file. Save it as CSV UTF-8",
    b"version https://git-lfs": "a pointer to a file of Git LFS. Run: git lfs pull",
    b"<": "a web page. Download the file again, signed in",
    b"{": 'JSON. Write CSV: one column a field, each text a JSON list like ["first turn", "second turn"]',
    b"[": 'JSON. Write CSV: one column a field, each text a JSON list like ["first turn", "second turn"]',
}


def read_csv(path: Path) -> dict[str, list[str]]:
    """The cells of a CSV file by column, as texts; it may be in gzip, or alone in a zip archive."""
    with reading(path, "Is it cut off? Download it again.", "Check the path, or name the shipped rows: sample."):
        if path.is_dir():
            raise UserError(f"{path}: is a folder. Name the CSV file in it.")
        raw = _unpack(path, path.read_bytes())
        head = raw[:100].removeprefix(b"\xef\xbb\xbf").lstrip()
        for start, what in _FOREIGN.items():
            if head.startswith(start):
                raise UserError(f"{path}: is {what}.")
        line = raw[:1000].partition(b"\n")[0].decode("utf-8", "replace")
        for mark, name in {";": "semicolons", "\t": "tabs", "|": "bars"}.items():
            if mark in line and "," not in line:
                raise UserError(f"{path}: has {name} between its columns. Save it with commas.")
        if b"\0" in raw:  # UTF-16 without a byte order mark passes as UTF-8; pandas would end the cell there
            raise UserError(f"{path}: not UTF-8 text: it holds zero bytes, as UTF-16 does. Save the file as UTF-8.")
        try:  # the header is read as a row: else pandas renames doubled columns and makes an index of surplus cells
            exact = {"header": None, "dtype": object, "na_filter": False, "encoding": "utf-8-sig"}
            table = pd.concat(pd.read_csv(io.BytesIO(raw), chunksize=4096, **exact))  # in one piece: 150 MB more
        except UnicodeDecodeError as error:
            near = shown(error.object[max(error.start - 20, 0) : error.start + 20])
            raise UserError(f"{path}: not UTF-8 text near {near}. Save the file as UTF-8.") from None
        except pd.errors.EmptyDataError:
            table = pd.DataFrame()
    if len(table) < 2:
        raise UserError(f"{path}: the file holds no rows.")
    header = table.iloc[0].tolist()
    for name in header:
        if header.count(name) > 1:
            raise UserError(f"{path}: column {shown(name)} is there more than once. Remove one of them.")
    return {name: table[column].tolist()[1:] for column, name in enumerate(header)}


def _unpack(path: Path, raw: bytes) -> bytes:
    """The bytes of the CSV file itself."""
    if raw.startswith(b"\x1f\x8b"):
        return gzip.decompress(raw)
    if not raw.startswith(b"PK\x03\x04"):
        return raw
    archive = zipfile.ZipFile(io.BytesIO(raw))
    names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    if len(names) != 1 or not names[0].lower().endswith(".csv"):
        raise UserError(f"{path}: is a zip archive of {shown(', '.join(names))}. Unzip it and name the CSV file.")
    return archive.read(names[0])


def _refuse(message: str) -> None:
    """Raise; but in a competition rerun, which nobody could correct, print: a broken cell is then read as one text."""
    if not is_competition_rerun():
        raise UserError(message)
    print(message, flush=True)


def _check_ids(path: str | Path, ids: list[str]) -> None:
    seen: dict[str, int] = {}
    for number, row_id in enumerate(ids, 1):
        if not row_id.strip():
            _refuse(f"{path}: row {number}, column {ID!r}: empty. Every row needs an id.")
        first = seen.setdefault(row_id, number)
        if first != number:
            _refuse(
                f"{path}: id {shown(row_id)} is in rows {first} and {number}, column {ID!r}. "
                "Ids must be unique: remove the double rows."
            )


def _parse_turns(path: str | Path, number: int, column: str, cell: str) -> list[str]:
    """One cell to its turns; `null` is the empty text."""
    try:
        turns = json.loads(cell)
    except (ValueError, RecursionError):
        turns = None
    if not isinstance(turns, list):
        python = " This one looks like Python's: apply json.dumps to the column." if cell.startswith("['") else ""
        _refuse(
            f"{path}: row {number}, column {column!r}: not a JSON list of texts: {shown(cell)}. "
            f'Each cell must look like ["first turn", "second turn"].{python}'
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


def _parse_labels(path: str | Path, table: dict[str, list[str]]) -> np.ndarray:
    """(N,) labels 0, 1, 2 from the three winner columns, exactly one of which is 1."""
    winners = []
    for name in LABEL_COLUMNS:
        values = [{"0": 0, "1": 1, "0.0": 0, "1.0": 1}.get(cell.strip()) for cell in table[name]]
        if None in values:
            number = values.index(None)
            cell = shown(table[name][number])
            raise UserError(f"{path}: row {number + 1}, column {name!r}: {cell} is not 0 or 1. Is the file cut off?")
        winners.append(values)
    winners = np.array(winners)
    wrong = np.flatnonzero(winners.sum(axis=0) != 1)
    if len(wrong):
        raise UserError(
            f"{path}: row {wrong[0] + 1}: {winners[:, wrong[0]].sum()} of the columns {', '.join(LABEL_COLUMNS)} "
            f"are 1; exactly one must be ({len(wrong)} such rows)."
        )
    return winners.argmax(axis=0)
