"""CSV to rows: cells parsed into turns, labels and prompt groups.

Irregular cells, which the competition's files have, are treated alike in training and test rows:

- a `null` turn or an empty answer is the empty text (`""`); the structure features flag it;
- a lone surrogate (half of a UTF-16 pair) becomes U+FFFD, since no tokenizer accepts it;
- where the three cells of a row differ in their number of turns, the shorter ones are filled with `""`.

Any other deviation from the competition's format is an error that names file, row and column.
"""

import atexit
import hashlib
import json
import re
from contextlib import ExitStack, suppress
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd

from prefcls_lib.data.features import empty_answers, identical_answers
from prefcls_lib.data.schema import ID, LABEL_COLUMNS, MODEL_COLUMNS, PROMPT, RESPONSES, TEXT_COLUMNS, class_shares
from prefcls_lib.runtime.files import UserError, reading, shown, write_whole
from prefcls_lib.runtime.kaggle import find_competition_file, is_competition_rerun

_SURROGATES = re.compile("[\ud800-\udfff]")
_unzipped = ExitStack()  # keeps the sample files of a library that is imported from a wheel until the process ends
atexit.register(_unzipped.close)


def sample_path(kind: str) -> Path:
    """Path of the shipped rows: kind "train" (770 rows) or "test" (the competition's three)."""
    files = (resources.files("prefcls_lib") / "sample").iterdir()
    found = next(file for file in files if file.name.startswith(f"{kind}.csv"))  # Kaggle unpacks train.csv.gz
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

    `labelled`: training rows, which have the three winner columns.

    Returns:
        One row a comparison: `id` (str, exactly as in the file), `prompt`, `response_a`, `response_b` (lists
        of str, one a turn, of equal length), `group` (str, the prompt group); where labelled also `label`
        (int: 0 A wins, 1 B wins, 2 tie); `model_a`, `model_b` where the file has them. What is wrong with the file is
        told with its row (1 = first row under the header) and column.
    """
    table, seen = read_csv(Path(path)), {}
    for number, row_id in enumerate(table.get(ID, ()), 1):
        first = seen.setdefault(row_id, number)
        if first != number or not row_id.strip():
            what = f"is in rows {first} and {number}" if first != number else "is empty"
            _refuse(f"{path}: row {number}, column {ID!r}: {shown(row_id)} {what}. Give each row an id of its own.")
    return parse_rows(path, table, labelled)


def parse_rows(path: str | Path, table: dict[str, list], labelled: bool) -> pd.DataFrame:
    """Rows as `read_rows` gives them, of cells by column (texts are JSON or lists); `path` is for messages."""
    needed = (ID, *TEXT_COLUMNS, *(LABEL_COLUMNS if labelled else ()))
    for name in needed:
        if name not in table:
            found = ", ".join(table)[:300]
            raise UserError(f"{path}: column {name!r} is missing. Columns found: {found}. Needed: {', '.join(needed)}.")
    rows = pd.DataFrame({ID: pd.Series(table[ID], dtype=object)})
    for name in TEXT_COLUMNS:  # each column of cells is dropped at once: the file fits into a small machine's memory
        cells = enumerate(table.pop(name), 1)
        rows[name] = pd.Series([_parse_turns(path, number, name, cell) for number, cell in cells], dtype=object)
    for cells in zip(*(rows[name] for name in TEXT_COLUMNS), strict=True):
        most = max(1, *map(len, cells))
        for turns in cells:
            turns.extend([""] * (most - len(turns)))
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
    with write_whole(path) as temporary:
        pd.DataFrame(table).to_csv(temporary, index=False)


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
    turns, chars = rows[PROMPT].map(len), [rows[name].map("\n".join).map(len) for name in RESPONSES]
    facts = {
        "rows": len(rows),
        "different prompts": rows["group"].nunique(),
        "multi-turn rows": f"{(turns > 1).mean():.1%}",
        "most turns": int(turns.max()),
        "rows with an empty or null answer": f"{empty_answers(rows).any(axis=1).mean():.2%}",
        "identical answers": f"{identical_answers(rows).mean():.2%}",
        "median characters of an answer": int(np.median(chars)),
    }
    if "label" in rows:
        facts["A wins / B wins / tie"] = " / ".join(f"{share:.1%}" for share in class_shares(rows["label"]))
    return pd.DataFrame({"value": facts}, dtype=object)


def format_row(row: pd.Series, max_chars: int = 3000) -> str:
    """One comparison as text: each turn's prompt, answer A, answer B, and the vote."""
    lines = [f"id {row[ID]}, {len(row[PROMPT])} turn(s)"]
    for number, (prompt, a, b) in enumerate(zip(*(row[name] for name in TEXT_COLUMNS), strict=True), 1):
        for title, text in (("PROMPT", prompt), ("ANSWER A", a), ("ANSWER B", b)):
            end = f" ... ({len(text):,} characters)" if len(text) > max_chars else ""
            lines += ["", f"--- {title}, turn {number} " + "-" * 40, text[:max_chars] + end or "(empty)"]
    if "label" in row:
        models = f"  (A: {row[MODEL_COLUMNS[0]]}, B: {row[MODEL_COLUMNS[1]]})" if MODEL_COLUMNS[0] in row else ""
        lines += ["", f"=== {('A wins', 'B wins', 'tie')[row['label']]}{models}"]
    return "\n".join(lines)


# first bytes of files that are no CSV, what they are, and what to do
_FOREIGN = {
    (b"PAR1",): "a Parquet file. Save it as CSV; for a public arena data set use `prefcls convert`",
    (b"\xfd7zXZ", b"BZh", b"(\xb5/\xfd", b"7z\xbc\xaf"): "an archive that is neither gzip nor zip. Unpack it",
    (b"\xd0\xcf\x11\xe0",): "an Excel file. Save it as CSV UTF-8",
    (b"version https://git-lfs",): "a Git LFS pointer, not the file itself. Run: git lfs pull",
    (b"i\0d\0", b"\xff\xfe"): "a file in UTF-16. Save it as CSV UTF-8",
    (b"<",): "a web page. Sign in at the web site, and download the file again",
    (b"{", b"["): 'JSON. Save it as CSV, where each text is a JSON list like ["first turn", "second turn"]',
}


def _refuse_foreign(path: Path, head: bytes) -> None:
    """A UserError where the first bytes of a file say that it is no CSV."""
    line = head.partition(b"\n")[0]
    for starts, what in _FOREIGN.items():
        if head.startswith(starts):
            raise UserError(f"{path}: is {what}.")
    for mark, name in {b";": "semicolons", b"\t": "tabs", b"|": "vertical bars"}.items():
        if mark in line and b"," not in line:
            raise UserError(f"{path}: has {name} between its columns. Save it with commas.")


def read_csv(path: Path) -> dict[str, list[str]]:
    """The cells of a CSV file by column, as texts; it may be in gzip, or alone in a zip archive."""
    remedy = "Is it a complete CSV file in UTF-8? Download it again, or save it as CSV UTF-8."
    table = pd.DataFrame()
    # the header is read as a row: else pandas renames doubled columns and makes an index of surplus cells
    exact = {"header": None, "dtype": object, "na_filter": False, "encoding": "utf-8-sig"}
    with reading(path, remedy, "Check the path."), path.open("rb") as file, suppress(pd.errors.EmptyDataError):
        head = file.read(1000)
        file.seek(0)
        packed = {b"\x1f\x8b": "gzip", b"PK": "zip"}.get(head[:2])  # whatever its name: Kaggle unpacks some files
        if packed is None:
            _refuse_foreign(path, head.removeprefix(b"\xef\xbb\xbf").lstrip())
        table = pd.concat(pd.read_csv(file, compression=packed, chunksize=4096, **exact))  # in one piece: 150 MB more
    if len(table) < 2:
        raise UserError(f"{path}: the file has no rows. {remedy}")
    header = table.iloc[0].tolist()
    if doubled := [name for name in header if header.count(name) > 1]:
        raise UserError(f"{path}: there are {header.count(doubled[0])} columns {shown(doubled[0])}. Keep one of them.")
    return {name: table[column].tolist()[1:] for column, name in enumerate(header)}


def _refuse(message: str) -> None:
    """Raise; but in a competition rerun, which nobody could correct, print: a broken cell is then read as one text."""
    if not is_competition_rerun():
        raise UserError(message)
    print(message, flush=True)


def _parse_turns(path: str | Path, number: int, column: str, cell: str | list) -> list[str]:
    """One cell to its turns; `null` is the empty text."""
    try:
        turns = cell if isinstance(cell, list) else json.loads(cell)
    except (ValueError, RecursionError):
        turns = None
    if not isinstance(turns, list) or not all(turn is None or isinstance(turn, str) for turn in turns):
        _refuse(
            f"{path}: row {number}, column {column!r}: not a JSON list of texts: {shown(cell)}. "
            'Each cell must look like ["first turn", "second turn"], as json.dumps writes it.'
        )
        turns = [cell]
    return [_SURROGATES.sub("\ufffd", turn) if turn else "" for turn in turns]


def _parse_labels(path: str | Path, table: dict[str, list]) -> np.ndarray:
    """(N,) labels 0, 1, 2 from the three winner columns, exactly one of which is 1."""
    known = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
    winners = np.array([[known.get(cell.strip(), np.nan) for cell in table[name]] for name in LABEL_COLUMNS])
    wrong = np.flatnonzero(winners.sum(axis=0) != 1)
    if len(wrong):
        cells = [table[name][wrong[0]] for name in LABEL_COLUMNS]
        raise UserError(
            f"{path}: row {wrong[0] + 1}, columns {', '.join(LABEL_COLUMNS)}: {shown(cells)}; exactly one must be 1 "
            f"and the others 0 (rows like this: {len(wrong)}). Is the file complete? Download it again."
        )
    return winners.argmax(axis=0)
