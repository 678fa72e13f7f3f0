"""Test rows as ugly as the hidden ones may be: python kaggle/rehearsal/rows.py 25000 test.csv

Turns and lengths follow the shipped real rows, and every cell is cut from their text, at random places. Then single
cells are replaced by what has broken submissions before.
"""

import csv
import json
import random
import sys
from pathlib import Path

from prefcls_lib.data.loading import read_rows, sample_path
from prefcls_lib.data.schema import ID, PROMPT, RESPONSES, TEXT_COLUMNS

LARGEST_ID = 2**32  # larger than any id of the training rows
LENGTH_FACTOR = 1.2  # the shipped rows are shorter than all: their median answer has 846 characters, not 1,027
UGLY_SHARE = 0.05  # of the rows; at least one row of each kind
TALES = {
    "cyrillic": "Привет, как дела? ",
    "chinese": "请问最近的火车站在哪里？",
    "japanese": "一番近い駅はどこですか。",
    "arabic": "أين أقرب محطة قطار من فضلك؟ ",
    "hebrew": "איפה תחנת הרכבת הקרובה? ",
    "mixed directions": "abc \u202eשלום\u202c def \u200f123 ",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈👍🏽",
    "combining": "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘ ",
    "special tokens": "</s> [SEP] <mask> [CLS] <s> [PAD] ",
    "control": "\u0000\u0001\u0008\t\r\n\u2028\ufeff",
    "one long word": "x",
    "lone surrogate": "half \ud83d of a pair \udc00",
    "markup": '<script>alert("1")</script> \\n \\" %s {0} ',
}


def make_rows(count: int, seed: int = 0) -> list[dict[str, object]]:
    """`count` rows: id and the three text columns as lists of turns, None for null; equal seeds give equal rows."""
    chance = random.Random(seed)
    real = read_rows(sample_path("train"), labelled=True)
    text = "\n".join(turn for name in TEXT_COLUMNS for turns in real[name] for turn in turns)
    lengths = [
        [[int(LENGTH_FACTOR * len(turn)) for turn in row[name]] for name in TEXT_COLUMNS] for _, row in real.iterrows()
    ]
    rows = []
    for row_id in [*chance.sample(range(LARGEST_ID), count - 1), LARGEST_ID]:
        row: dict[str, object] = {ID: row_id}
        for name, cell in zip(TEXT_COLUMNS, chance.choice(lengths), strict=True):
            starts = [chance.randrange(max(1, len(text) - length)) for length in cell]
            row[name] = [text[start : start + length] for start, length in zip(starts, cell, strict=True)]
        rows.append(row)
    kinds = [*TALES, *_CHANGES]
    for number in range(max(len(kinds), int(count * UGLY_SHARE))):
        row, kind = rows[number * 17 % count], kinds[number % len(kinds)]
        if kind in TALES:
            name = chance.choice(TEXT_COLUMNS)
            row[name] = [TALES[kind] * chance.choice((1, 20, 400)) for _ in row[name]]
        else:
            _CHANGES[kind](row)
    return rows


def _null_answer(row: dict) -> None:
    row[RESPONSES[0]] = [None for _ in row[RESPONSES[0]]]


def _all_empty(row: dict) -> None:
    for name in TEXT_COLUMNS:
        row[name] = [""]


def _no_turn(row: dict) -> None:
    row[RESPONSES[1]] = []


def _many_turns(row: dict) -> None:
    for name in TEXT_COLUMNS:
        row[name] = (row[name] * 36)[:36]


def _long_answer(row: dict) -> None:
    row[RESPONSES[1]] = [(f"{row[RESPONSES[1]][0]} and so on " * 50_000)[:50_000]]


def _long_prompt(row: dict) -> None:
    row[PROMPT] = ["why " * 12_500]


def _identical_answers(row: dict) -> None:
    row[RESPONSES[1]] = list(row[RESPONSES[0]])


def _blank_answer(row: dict) -> None:
    row[RESPONSES[0]] = [" \n\t "]


_CHANGES = {
    change.__name__: change
    for change in (
        _null_answer, _all_empty, _no_turn, _many_turns, _long_answer, _long_prompt, _identical_answers, _blank_answer,
    )
}  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows as the competition does: JSON lists in pure ASCII, slashes escaped."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((ID, *TEXT_COLUMNS))
        for row in rows:
            writer.writerow([row[ID], *(json.dumps(row[name]).replace("/", "\\/") for name in TEXT_COLUMNS)])


if __name__ == "__main__":
    write_rows(Path(sys.argv[2]), make_rows(int(sys.argv[1])))
