"""Public arena files in each published form to the competition's columns; numbers and rows worked out by hand."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_row
from test_cases import as_csv, put

from prefcls_lib.data.loading import read_rows

TEXTS = ["prompt", "response_a", "response_b"]


def talk(*turns: object, roles: tuple = ("user", "assistant")) -> list[dict]:
    """A conversation as the arena files have it: user and assistant in turn."""
    return [{"role": roles[i % len(roles)], "content": turn} for i, turn in enumerate(turns)]


def arena_row(row_id: object, winner: str, a: object, b: object, **more: object) -> dict:
    """One row of an arena file."""
    sides = {"conversation_a": a, "conversation_b": b}
    return {"question_id": f"q{row_id}", "model_a": "m", "model_b": "n", "winner": winner, **sides, **more}


def vote(number: int, **cells: object) -> dict:
    """One row as WSDM has it."""
    return {"prompt": f"p{number}", "response_a": "a", "response_b": "b", "winner": "model_a"} | cells


@pytest.fixture
def as_parquet(monkeypatch):
    """as_parquet(path, rows) -> a file whose cells are as pyarrow gives them, which is a stand-in."""
    tables: dict[Path, list[dict]] = {}

    def read_table(path: Path, columns: list[str]) -> SimpleNamespace:
        return SimpleNamespace(to_pylist=lambda: [{name: row[name] for name in columns} for row in tables[path]])

    def write(path: Path, rows: list[dict]) -> Path:
        tables[path] = rows
        return put(path, b"PAR1")

    parquet = SimpleNamespace(read_schema=lambda path: SimpleNamespace(names=list(tables[path][0])))
    parquet.read_table = read_table
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet))
    return write


SYSTEM = {"role": "system", "content": "Be kind"}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]
IMAGE = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "what is this?"}]
# files with their rows; what is printed; each row that is written: start of the id, label, texts
ARENA_FILES = {
    "verdicts": (
        {"arena33k.csv": [
            arena_row(1, "model_a", talk("p1", "a1", "p2\né", "a2"), talk("p1", "b1", "p2\né", None)),
            arena_row(2, "model_b", talk("p2", "a"), talk("p2", "b")),
            arena_row(3, "tie", talk("p3", "a"), talk("p3", "b")),
            arena_row(4, "tie (bothbad)", talk("p4 \ud83d", "a"), talk("p4 \ud83d", "b")),
        ]},
        "4 rows of text, 4 written, 0 duplicates\n",
        [("arena33k-q1", 0, ["p1", "p2\né"], ["a1", "a2"], ["b1", ""]), ("arena33k-q2", 1, ["p2"], ["a"], ["b"]),
         ("arena33k-q3", 2, ["p3"], ["a"], ["b"]), ("arena33k-q4", 2, ["p4 \ufffd"], ["a"], ["b"])],
    ),
    "conversations": (
        {"arena.csv": [
            arena_row(1, "tie", talk("p", "a", "q", "c"), talk("p", "b", "q")),
            arena_row(2, "tie", talk("r", "a", "q", "c"), talk("r", "b")),
            arena_row(3, "tie", talk("p", "a"), talk("q", "b")),
            arena_row(4, "tie", talk("", None), talk("", " ")),
            arena_row(5, "tie", "[{'role': 1}]", talk("p", "b")),
            arena_row(6, "tie", None, talk("p", "b")),
            arena_row(7, "tie", "[" * 100_000, talk("p", "b")),
        ]},
        "2 rows of text, 2 written, 0 duplicates, 5 left out (1 with different prompts for A and B; 1 without text; "
        "3 without a list of messages with role and content)",
        [(f"arena-q{number}", 2, [first, "q"], ["a", "c"], ["b", ""]) for number, first in enumerate("pr", 1)],
    ),
    "wsdm": (
        {"wsdm.parquet": [vote(1, id="7", response_a=None), vote(2, id="8", winner="model_b", language="English")],
         "no_id.csv": [vote(3, prompt='["not JSON"', response_b="")]},
        "2 rows of text, 2 written, 0 duplicates\n",
        [("wsdm-7", 0, ["p1"], [""], ["b"]), ("wsdm-8", 1, ["p2"], ["a"], ["b"]),
         ("no_id-1", 0, ['["not JSON"'], ["a"], [""])],
    ),
    "arena55k": (
        {"55k.parquet": [{"id": 7, "prompt": '["q"]', "response_a": ["a"], "response_b": "[null]", "model_a": None,
                          "winner_model_a": 0, "winner_model_b": 1, "winner_tie": None}]},
        "1 rows of text, 1 written, 0 duplicates\n",
        [("55k-7", 1, ["q"], ["a"], [""])],
    ),
    "arena140k": (
        {"140k.parquet": [
            arena_row(1, "both_bad", talk("p", PARTS), talk("p", "n"), evaluation_order=1),
            arena_row(2, "model_a", talk(IMAGE, "m"), talk(IMAGE, "n"), evaluation_order=1),
            arena_row(3, "model_a", talk("shorter!", "m"), talk("shorter!", "n"), evaluation_order="2.0"),
        ]},
        "1 rows of text, 1 written, 0 duplicates, 2 left out (1 with more than text; 1 later votes of a session)",
        [("140k-q1", 2, ["p"], ["a\nb"], ["n"])],
    ),
    "double_ids": (
        {"d1/train.parquet": [vote(0), vote(1)], "d2/train.parquet": [vote(2)]},
        "1 rows of text, 1 written, 0 duplicates\n",
        [(name, 0, [f"p{number}"], ["a"], ["b"]) for number, name in enumerate(("train-1-", "train-2", "train-1-"))],
    ),
    "roles": (
        {"roles.parquet": [
            arena_row(1, "model_a", [SYSTEM, *talk("P", "A")], [SYSTEM, *talk("P", "B")]),
            arena_row(2, "model_a", *[talk("Hello!", "p", "a", roles=("assistant", "user"))] * 2),
            arena_row(3, "model_a", *[talk("p", "q", "a", roles=("user", "user", "assistant"))] * 2),
            arena_row(4, "tie", talk("p", "a", "q"), talk("p", "b", "q")),
            arena_row(5, "tie", *[talk("p", "a", roles=("human", "gpt"))] * 2),
            arena_row(6, "tie", [], []),
        ]},
        "2 rows of text, 2 written, 0 duplicates, 4 left out (4 without user and assistant in turn)",
        [("roles-q1", 0, ["P"], ["A"], ["B"]), ("roles-q4", 2, ["p"], ["a"], ["b"])],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ARENA_FILES)
def test_arena_file_is_converted(prefcls, as_parquet, tmp_path, case):
    """No empty row, no shifted turn, null is the empty text, ids differ; what is left out is counted."""
    tables, words, expected = ARENA_FILES[case]
    paths = [put(tmp_path / name, as_csv(rows)) if name.endswith("csv") else as_parquet(tmp_path / name, rows)
             for name, rows in tables.items()]  # fmt: skip
    code, out, error = prefcls("convert", *paths, "--out", tmp_path / "extra.csv")
    assert (code, words in out) == (0, True), out + error
    rows = read_rows(tmp_path / "extra.csv", labelled=True)
    found = rows[["id", "label", *TEXTS]].to_numpy().tolist()
    assert [line[1:] for line in found] == [list(line[1:]) for line in expected]
    assert all(line[0].startswith(start) for line, (start, *_) in zip(found, expected, strict=True))
    assert rows["id"].is_unique and set(rows["model_a"]) == {"m" if "conversation_a" in str(tables) else ""}


def test_rows_that_are_known_are_left_out(prefcls, tmp_path):
    """A and B exchanged, other white space, half a surrogate pair, a last answer or turn left out; a row twice."""
    train = put(tmp_path / "train.csv", as_csv([
        make_row(1, 0), make_row(2, 1), make_row(3, 0, prompt=r'["hi \ud83d"]'),
        make_row(4, 1, prompt='["p", "q"]', response_a='["a1", "a2"]', response_b='["b1"]'),
        make_row(5, 1, prompt='["r", "s"]', response_a='["c"]', response_b='["d", null]'),
    ]))  # fmt: skip
    two, texts = make_row(2, 1), [json.loads(make_row(3, 0)[name])[0] for name in TEXTS[1:]]
    two["response_a"], two["response_b"] = two["response_b"], two["response_a"]
    spaced = make_row(6, 2, prompt=json.dumps(["  question\n6? "]), id="x")
    same = put(tmp_path / "55k.csv", as_csv([make_row(1, 0), two, make_row(6, 2), spaced, make_row(7, 0)]))
    other = put(tmp_path / "arena.csv", as_csv([
        arena_row(1, "model_a", talk("hi \ud83d", texts[0]), talk("hi \ud83d", texts[1])),
        arena_row(2, "model_b", talk("p", "a1", "q", "a2"), talk("p", "b1", "q")),
        arena_row(3, "model_b", talk("r", "d", "s"), talk("r", "c")),
    ]))  # fmt: skip
    code, out, _ = prefcls("convert", same, other, "--against", train, "--out", tmp_path / "extra.csv")
    assert code == 0
    assert "5 rows of text, 2 written, 3 duplicates" in out and "3 rows of text, 0 written, 3 duplicates" in out
    assert read_rows(tmp_path / "extra.csv", labelled=True)["id"].tolist() == ["55k-1006", "55k-1007"]
    code, _, error = prefcls("convert", other, "--against", train, "--out", tmp_path / "none.csv")
    assert (code, "no rows are left, so" in error) == (2, True)
    assert not (tmp_path / "none.csv").exists()


ONE = arena_row(1, "tie", talk("p", "a"), talk("p", "b"))
# bytes (None: no file), words that the message must have
UNREADABLE = {
    "no.csv": (as_csv([{"id": 1, "text": "x"}]), ": no known data set has these columns: id, text. Columns of "),
    "verdict.csv": (as_csv([ONE, ONE | {"winner": "c" * 200}]), f": row 2, column 'winner': '{'c' * 76}... is none of"),
    "broken.csv": (as_csv([ONE | {"conversation_b": "x"}]), "1 without a list of messages with role and content)\nn"),
    "cut.csv": (as_csv([make_row(1, 0)])[:-3], ": row 1, columns winner_model_a, winner_model_b, winner_tie: ["),
    "x.parquet": (b"PAR1", "Is the file complete? Parquet needs pyarrow: pip install pyarrow."),
    "missing.csv": (None, ": no such file"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_named(prefcls, tmp_path, monkeypatch, name):
    """What, where, what to do; without pyarrow, too."""
    content, words = UNREADABLE[name]
    path = tmp_path / name if content is None else put(tmp_path / name, content)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, error = prefcls("convert", path, "--out", tmp_path / "out.csv")
    assert code == 2 and str(path) in error and words in error
    assert not (tmp_path / "out.csv").exists()
