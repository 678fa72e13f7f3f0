"""`prefcls convert`: public arena files as they are published, in the competition's columns, for `extra_train`.

Its columns tell the form of a file, see FORMS. Whatever form it has, its cells become those of the competition, which
`loading.parse_rows` reads as a training file's; "both bad" is a tie. Rows that the training file has are left out, as
are repeated rows (see `loading.row_keys`), and rows that are no conversation of texts; all of them are counted.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from prefcls_lib.data.loading import parse_rows, read_csv, read_rows, row_keys, write_rows
from prefcls_lib.data.schema import ID, LABEL_COLUMNS, MODEL_COLUMNS, TEXT_COLUMNS
from prefcls_lib.runtime.files import UserError, reading, shown

CONVERSATIONS = ("conversation_a", "conversation_b")  # lists of {role, content}; content: a text, or a list of parts
WINNER = "winner"
WINNERS = {"model_a": 0, "model_b": 1, "tie": 2, "tie (bothbad)": 2, "both_bad": 2}
IDS = (ID, "question_id")
ORDER = "evaluation_order"  # of the votes of a session: a later one is on a turn whose context the row lacks
FORMS = {
    "55k": (*TEXT_COLUMNS, *LABEL_COLUMNS),  # the competition's own
    "33k, 100k, 140k": (*CONVERSATIONS, WINNER),
    "WSDM": (*TEXT_COLUMNS, WINNER),  # plain texts of one turn; no ties
}
USED = {*CONVERSATIONS, *TEXT_COLUMNS, *LABEL_COLUMNS, *MODEL_COLUMNS, *IDS, WINNER, ORDER}
LICENCES = """licences, as the data sets' pages have them:
  33k   lmsys/chatbot_arena_conversations         prompts CC-BY-4.0, answers CC-BY-NC-4.0
  55k   lmarena-ai/arena-human-preference-55k     Apache-2.0; the competition's own training rows
  100k  lmarena-ai/arena-human-preference-100k    prompts CC-BY-4.0, answers under their providers' terms
  140k  lmarena-ai/arena-human-preference-140k    prompts CC-BY-4.0, answers under their providers' terms
  WSDM  wsdm-cup-multilingual-chatbot-arena       the rules of that Kaggle competition"""


class LeftOut(Exception):
    """Why a row is not taken."""


def convert_files(paths: Sequence[Path], out: Path, against: Path | None = None) -> list[str]:
    """Write the rows of arena files, Parquet or CSV, to the CSV `out`, but for those of the training file `against`.

    `out` has the columns id (the file's name before it), models, texts, winners.

    Returns:
        For each file a line that says how many rows it has, how many were written, and why others were not.
    """
    seen = set() if against is None else set(row_keys(read_rows(against, labelled=True)))
    tables, lines = [], []
    for path in paths:
        rows, left_out = _read_arena_rows(path)
        keys = pd.Series(row_keys(rows), index=rows.index, dtype=object)
        tables.append(rows[~(keys.isin(seen) | keys.duplicated())])
        seen |= set(keys)
        new, reasons = len(tables[-1]), "; ".join(f"{count:,} {why}" for why, count in left_out.items())
        others = f", {left_out.total():,} left out ({reasons})" if reasons else ""
        lines.append(f"{path}: {len(rows):,} rows of text, {new:,} written, {len(rows) - new:,} duplicates{others}")
    table = pd.concat(tables, ignore_index=True)
    if table.empty:
        raise UserError("\n".join([*lines, f"no rows are left, so {out} was not written."]))
    repeated = table[ID].duplicated(keep=False)  # in files of the same name, as train.parquet
    ids = [f"{row_id}-{key.hex()[:8]}" for row_id, key in zip(table[ID], row_keys(table), strict=True)]
    table[ID] = table[ID].where(~repeated, ids)
    write_rows(out, table)
    return lines


def _read_arena_rows(path: Path) -> tuple[pd.DataFrame, Counter]:
    """The rows of one file as `loading.read_rows` gives them, and how many were left out for which reason."""
    names, rows = _read_table(path)
    form = next((form for form, columns in FORMS.items() if set(columns) <= set(names)), None)
    if form is None:
        found, known = ", ".join(names)[:300], "; ".join(f"{name}: {', '.join(form)}" for name, form in FORMS.items())
        raise UserError(f"{path}: no known data set has these columns: {found}. Columns of the known ones: {known}.")
    left_out, taken = Counter(), []
    with reading(path):
        for number, row in enumerate(rows, 1):
            row_id = next((row[name] for name in IDS if name in row), number)
            models = [str(row.get(name) or "") for name in MODEL_COLUMNS]
            try:
                taken.append([f"{path.stem}-{row_id}", *models, *_read_row(f"{path}: row {number}", form, row)])
            except LeftOut as why:
                left_out[str(why)] += 1
        cells = pd.DataFrame(taken, columns=(ID, *MODEL_COLUMNS, *TEXT_COLUMNS, *LABEL_COLUMNS)).to_dict("list")
        return parse_rows(path, cells, labelled=True), left_out


def _read_row(place: str, form: str, row: dict) -> list:
    """A row in a form as the competition's cells, texts as JSON or lists; Parquet cells may be numbers or null."""
    if form == "55k":
        texts = [[None] if row[name] is None else row[name] for name in TEXT_COLUMNS]
        winners = [row[name] for name in LABEL_COLUMNS]
        return texts + [cell if isinstance(cell, str) else str(int(cell or 0)) for cell in winners]
    if row[WINNER] not in WINNERS:
        raise UserError(f"{place}, column {WINNER!r}: {shown(row[WINNER])} is none of {', '.join(WINNERS)}.")
    if float(row.get(ORDER) or 1) > 1:  # with a cell missing, pandas writes 1.0
        raise LeftOut("later votes of a session")
    texts = [row[name] for name in FORMS[form][:-1]]
    sides = [[text or ""] for text in texts] if form == "WSDM" else _read_conversations(*texts)
    if not any(turn.strip() for turns in sides for turn in turns):
        raise LeftOut("without text")
    return [*sides, *("1" if WINNERS[row[WINNER]] == label else "0" for label in range(3))]


def _read_conversations(*cells: object) -> list[list[str]]:
    """Prompts, answers of A and answers of B, a text each turn; a last prompt without any answer is dropped."""
    (prompts, a), (others, b) = map(_read_conversation, cells)
    if any(one != other for one, other in zip(prompts, others, strict=False)):
        raise LeftOut("with different prompts for A and B")
    turns = max(len(a), len(b))
    return [max(prompts, others, key=len)[:turns], a, b]


def _read_conversation(cell: object) -> tuple[list[str], list[str]]:
    """Prompts and answers of one side."""
    try:
        messages = [m for m in (json.loads(cell) if isinstance(cell, str) else cell) if m["role"] != "system"]
        roles, contents = [m["role"] for m in messages], [m["content"] for m in messages]
        parts = [[{"type": "text", "text": c}] if c is None or isinstance(c, str) else c for c in contents]
        if any(part["type"] != "text" for content in parts for part in content):
            raise LeftOut("with more than text")
        texts = ["\n".join(part["text"] or "" for part in content) for content in parts]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise LeftOut("without a list of messages with role and content") from None
    if len(roles) < 2 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise LeftOut("without user and assistant in turn")
    return texts[::2], texts[1::2]


def _read_table(path: Path) -> tuple[list[str], list[dict]]:
    """Columns and rows: of a CSV as texts, of a Parquet file the columns that are used, as Python has them."""
    with reading(path, "Is the file complete? Parquet needs pyarrow: pip install pyarrow."), path.open("rb") as file:
        if file.read(4) != b"PAR1":
            table = read_csv(path)
            return list(table), [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]
        from pyarrow import parquet

        names = parquet.read_schema(path).names
        return names, parquet.read_table(path, columns=[name for name in names if name in USED]).to_pylist()
