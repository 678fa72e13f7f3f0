"""`prefcls convert`: public arena files as they are published, in the competition's columns, for `extra_train`.

A file is told by its columns, see FORMS. Whatever form it has, a row's texts become lists of turns, and "both bad" is a
tie. Rows that the training file has are left out, and of rows that are there twice one is kept: the same prompt and the
same answers, in either order, but for white space. Rows that show more than text are left out, too.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from prefcls_lib.data.loading import read_csv, read_rows, write_rows
from prefcls_lib.data.schema import ID, LABEL_COLUMNS, MODEL_COLUMNS, PROMPT, TEXT_COLUMNS
from prefcls_lib.runtime.files import UserError

CONVERSATIONS = ("conversation_a", "conversation_b")  # lists of {role, content}; content: a text, or a list of parts
WINNER = "winner"
WINNERS = {"model_a": 0, "model_b": 1, "tie": 2, "tie (bothbad)": 2, "both_bad": 2}
IDS = (ID, "question_id")
FORMS = {
    "55k": (ID, *TEXT_COLUMNS, *LABEL_COLUMNS),
    "33k, 100k, 140k": (*CONVERSATIONS, WINNER),
    "WSDM": (*TEXT_COLUMNS, WINNER),  # plain texts of one turn; no ties
}
USED = {*CONVERSATIONS, *TEXT_COLUMNS, *MODEL_COLUMNS, *IDS, WINNER}
LICENCES = """licences, as the data sets' pages have them:
  33k   lmsys/chatbot_arena_conversations         prompts CC-BY-4.0, answers CC-BY-NC-4.0
  55k   lmarena-ai/arena-human-preference-55k     Apache-2.0; the competition's own training rows
  100k  lmarena-ai/arena-human-preference-100k    prompts CC-BY-4.0, answers under their providers' terms
  140k  lmarena-ai/arena-human-preference-140k    prompts CC-BY-4.0, answers under their providers' terms
  WSDM  wsdm-cup-multilingual-chatbot-arena       the rules of that Kaggle competition"""


def convert_files(paths: Sequence[Path], out: Path, against: Path | None = None) -> list[str]:
    """Write the rows of arena files to the CSV `out`.

    Args:
        paths: files in one of FORMS, Parquet or CSV.
        out: id (the file's name before it), models, texts, winner columns.
        against: the training file, whose rows are left out.

    Returns:
        For each file a line that says how many rows it has and how many were written.

    Raises:
        UserError: a file cannot be read, or is in none of the forms; no row is left.
    """
    seen = set() if against is None else set(_row_keys(read_rows(against, labelled=True)))
    tables, lines = [], []
    for path in paths:
        rows = _read_arena_rows(path)
        keys = pd.Series(_row_keys(rows), index=rows.index)
        tables.append(rows[~(keys.isin(seen) | keys.duplicated())])
        seen |= set(keys)
        new = len(tables[-1])
        lines.append(f"{path}: {len(rows):,} rows of text, {new:,} written, {len(rows) - new:,} known")
    table = pd.concat(tables, ignore_index=True)
    if table.empty:
        raise UserError(f"{', '.join(map(str, paths))}: every row is known already; {out} was not written.")
    write_rows(out, table)
    return lines


def _read_arena_rows(path: Path) -> pd.DataFrame:
    """The rows of one file as `loading.read_rows` gives them."""
    table = _read_table(path)
    form = next((form for form, needed in FORMS.items() if set(needed) <= table.keys()), None)
    if form is None:
        known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FORMS.items())
        raise UserError(f"{path}: in none of the known forms. Columns found: {', '.join(table)}. Known are {known}.")
    if form == "55k":
        rows = read_rows(path, labelled=True)
    else:
        cells = zip(*(table[name] for name in FORMS[form] if name != WINNER), strict=True)
        read = [_read_texts(path, number, row) for number, row in enumerate(cells, 1)]
        rows = pd.DataFrame(read, columns=TEXT_COLUMNS)
        rows["label"] = [WINNERS.get(cell, -1) for cell in table[WINNER]]
        rows = rows.assign(**{name: table.get(name, "") for name in MODEL_COLUMNS})
        rows[ID] = next((table[name] for name in IDS if name in table), rows.index)
        if (rows["label"] < 0).any():
            number = int(rows["label"].argmin())
            cell = table[WINNER][number]
            raise UserError(f"{path}: row {number + 1}, column {WINNER!r}: {cell!r} is none of {', '.join(WINNERS)}.")
    rows[ID] = [f"{path.stem}-{row_id}" for row_id in rows[ID]]
    return rows[rows[PROMPT].notna()]


def _read_table(path: Path) -> dict[str, Sequence]:
    """Columns by name: of a CSV all of them, as texts; of a Parquet file those that are used."""
    if path.suffix != ".parquet":
        header, records = read_csv(path)
        return dict(zip(header, zip(*records, strict=True), strict=True))
    try:
        from pyarrow import parquet

        names = parquet.read_schema(path).names
        table = pd.read_parquet(path, columns=[name for name in names if name in USED])
    except ImportError:
        raise UserError(f"{path}: Parquet is read by pyarrow, which Kaggle has. Run `pip install pyarrow`.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error}). Download the file again.") from error
    return {name: table[name].tolist() if name in table else () for name in names if name not in LABEL_COLUMNS}


def _read_texts(path: Path, number: int, cells: Sequence) -> tuple[list[str] | None, ...]:
    """Prompt and answers of a row, a text each turn, from three plain texts or from two conversations.

    None where a conversation shows more than text.
    """
    if len(cells) > len(CONVERSATIONS):
        return tuple([cell or ""] for cell in cells)
    sides = []
    for name, cell in zip(CONVERSATIONS, cells, strict=True):
        turns: dict[str, list[str]] = {"user": [], "assistant": []}
        try:
            for message in json.loads(cell) if isinstance(cell, str) else cell:
                content = message["content"]
                parts = [{"type": "text", "text": content}] if content is None or isinstance(content, str) else content
                if any(part["type"] != "text" for part in parts):
                    return (None,) * len(TEXT_COLUMNS)
                turns.setdefault(message["role"], []).append("\n".join(part["text"] or "" for part in parts))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: row {number}, column {name!r}: no list of messages with role and content "
                f"({type(error).__name__}: {error}). Download the file again."
            ) from None
        sides.append(turns)
    return sides[0]["user"], *(turns["assistant"] for turns in sides)


def _row_keys(rows: pd.DataFrame) -> list[bytes]:
    """What is the same for the same prompt and answers, in either order and with any white space."""
    keys = []
    for prompt, *answers in zip(*(rows[name] for name in TEXT_COLUMNS), strict=True):
        words = [[" ".join(turn.split()) for turn in turns] for turns in (prompt, *answers)]
        text = json.dumps([words[0], *sorted(words[1:])])
        keys.append(hashlib.blake2b(text.encode(), digest_size=16).digest())
    return keys
