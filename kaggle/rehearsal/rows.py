"""Test rows as irregular as the hidden ones may be: the shipped rows, and cells with unusual texts."""

import csv
import json
import random
from pathlib import Path

from prefcls_lib.data.loading import read_rows, sample_path
from prefcls_lib.data.schema import ID, PROMPT, RESPONSES, TEXT_COLUMNS

LARGEST_ID = 2**32  # larger than any id of the training rows
A, B = RESPONSES
TEXTS = {
    "cyrillic": "Привет, как дела? ",
    "chinese": "请问最近的火车站在哪里？",
    "arabic": "أين أقرب محطة قطار من فضلك؟ ",
    "mixed directions": "abc \u202eשלום\u202c def \u200f123 ",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈👍🏽",
    "combining": "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘ ",
    "special tokens": "</s> [SEP] <mask> [CLS] <s> [PAD] ",
    "control": "\u0000\u0001\u0008\t\r\n\u2028\ufeff",
    "one long word": "x" * 50,
    "lone surrogate": "half \ud83d of a pair \udc00",
    "markup": '<script>alert("1")</script> \\n \\" %s {0} ',
}
CELLS = {
    "null answer": {A: [None]},
    "all empty": {PROMPT: [""], A: [""], B: [""]},
    "no turn": {B: []},
    "many turns": {PROMPT: ["why?"] * 36, A: ["so"] * 36, B: ["thus"] * 36},
    "long answer": {B: ["and so on " * 5_000]},
    "long prompt": {PROMPT: ["why " * 12_500]},
    "identical answers": {A: ["the same"], B: ["the same"]},
    "blank answer": {A: [" \n\t "]},
}
KINDS = [{B: [text * repeats]} for text in TEXTS.values() for repeats in (1, 400)] + list(CELLS.values())


def make_rows(count: int, seed: int = 0) -> list[dict[str, object]]:
    """`count` rows: id and the three text columns as lists of turns, None for null; equal seeds give equal rows.

    The first ones have the irregular cells; no two prompts are equal.
    """
    chance = random.Random(seed)
    real = read_rows(sample_path("train"), labelled=True)[list(TEXT_COLUMNS)].to_dict("records")
    ids = [*chance.sample(range(LARGEST_ID), count - 1), LARGEST_ID]
    rows = [{ID: number, **chance.choice(real)} for number in ids]
    rows = [{**row, PROMPT: [f"{row[ID]}: {row[PROMPT][0]}", *row[PROMPT][1:]]} for row in rows]
    return [{**row, **cells} for row, cells in zip(rows, KINDS, strict=False)] + rows[len(KINDS) :]


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows as the competition does: JSON lists in pure ASCII, slashes escaped."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((ID, *TEXT_COLUMNS))
        for row in rows:
            writer.writerow([row[ID], *(json.dumps(row[name]).replace("/", "\\/") for name in TEXT_COLUMNS)])
