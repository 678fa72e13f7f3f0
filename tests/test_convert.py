"""Public arena files in each published form to the competition's columns; numbers and rows worked out by hand."""

import json
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import make_row

from prefcls_lib import cli
from prefcls_lib.data import convert
from prefcls_lib.data.loading import read_rows
from prefcls_lib.runtime.files import UserError


def talk(*turns: object) -> list[dict]:
    """A conversation as the arena files have it: user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def arena_row(number: int, winner: str, prompt: str, a: object, b: object, **more: object) -> dict:
    sides = {"conversation_a": talk(prompt, a), "conversation_b": talk(prompt, b)}
    return {"question_id": f"q{number}", "model_a": "m", "model_b": "n", "winner": winner, "turn": 1, **sides, **more}


def as_csv(write_csv, name: str, rows: list[dict]):
    """Conversations as JSON text."""
    return write_csv(name, [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows])


def run(capsys, *arguments: object) -> str:
    code = cli.main(["convert", *map(str, arguments)])
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out


def test_conversations_of_several_turns(write_csv, tmp_path, capsys):
    """33k and 100k: all four verdicts, turns in order, null as the empty text; the file's name in the id."""
    first = {"conversation_a": talk("p1", "a1", "p2\né", "a2"), "conversation_b": talk("p1", "b1", "p2\né", None)}
    rows = [arena_row(number, winner, f"p{number}", f"a{number}", f"b{number}")
            for number, winner in enumerate(("model_b", "tie", "tie (bothbad)"), 2)]  # fmt: skip
    path = as_csv(write_csv, "arena33k.csv", [arena_row(1, "model_a", "", "", "") | first, *rows])
    shown = run(capsys, path, "--out", tmp_path / "extra.csv")
    assert "4 rows of text, 4 written, 0 known" in shown
    found = read_rows(tmp_path / "extra.csv", labelled=True)
    assert found["label"].tolist() == [0, 1, 2, 2]
    assert found["id"].tolist() == [f"arena33k-q{number}" for number in (1, 2, 3, 4)]
    one = found.iloc[0]
    assert (one["prompt"], one["response_a"], one["response_b"]) == (["p1", "p2\né"], ["a1", "a2"], ["b1", ""])
    assert set(found["model_a"]) == {"m"}


def test_typed_parts(write_csv, tmp_path, capsys):
    """140k: parts of text are joined, a row with an image is left out, both_bad is a tie."""
    text = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]
    image = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "what is this?"}]
    rows = [arena_row(1, "both_bad", "p", text, "n"), arena_row(2, "model_a", image, "m", "n")]
    for row in rows:
        row["id"] = row.pop("question_id")
    run(capsys, as_csv(write_csv, "arena140k.csv", rows), "--out", tmp_path / "extra.csv")
    found = read_rows(tmp_path / "extra.csv", labelled=True)
    assert found[["id", "label"]].to_numpy().tolist() == [["arena140k-q1", 2]]
    assert found["response_a"].tolist() == [["a\nb"]]


def test_plain_texts(write_csv, tmp_path, capsys):
    """WSDM: one turn each, beside rows of another form in the same file."""
    plain = {"prompt": '["not JSON"', "response_a": "yes", "response_b": "", "language": "English"}
    wsdm = write_csv("wsdm.csv", [{"id": "w1", **plain, "winner": "model_b", "model_a": "m", "model_b": "n"}])
    other = as_csv(write_csv, "arena.csv", [arena_row(1, "tie", "p", "a", "b")])
    run(capsys, wsdm, other, "--out", tmp_path / "extra.csv")
    found = read_rows(tmp_path / "extra.csv", labelled=True)
    assert found[["prompt", "response_a", "response_b"]].iloc[0].tolist() == [['["not JSON"'], ["yes"], [""]]
    assert found["label"].tolist() == [1, 2]


def test_rows_that_are_known_are_left_out(write_csv, tmp_path, capsys):
    """Of five: one stands in the training file, one there with A and B exchanged, one twice but for white space."""
    train = write_csv("train.csv", [make_row(1, 0), make_row(2, 1)])
    one, two = make_row(1, 0), make_row(2, 1)
    two["response_a"], two["response_b"] = two["response_b"], two["response_a"]
    spaced = make_row(3, 2, prompt=json.dumps(["  question\n3? "]))
    path = write_csv("arena55k.csv", [one, two, make_row(3, 2), {**spaced, "id": "x"}, make_row(4, 0)])
    assert "5 rows of text, 2 written, 3 known" in run(capsys, path, "--out", tmp_path / "e.csv", "--against", train)
    assert read_rows(tmp_path / "e.csv", labelled=True)["id"].tolist() == ["arena55k-1003", "arena55k-1004"]
    assert cli.main(["convert", str(train), "--out", str(tmp_path / "no.csv"), "--against", str(train)]) == 2
    assert "every row is known already" in capsys.readouterr().err
    assert not (tmp_path / "no.csv").exists()


def test_what_cannot_be_read_is_named(write_csv, tmp_path):
    """A form that is not known, a verdict that is none, a broken conversation, no pyarrow: what, where, what to do."""
    out, good = tmp_path / "out.csv", arena_row(1, "tie", "p", "a", "b")
    path = write_csv("other.csv", [{"id": "1", "text": "x"}])
    with pytest.raises(UserError, match=r"other\.csv: in none of the known forms\. Columns found: id, text\. .*WSDM"):
        convert.convert_files([path], out)
    path = as_csv(write_csv, "verdict.csv", [good, {**good, "winner": "model_c"}])
    with pytest.raises(UserError, match=r"row 2, column 'winner': 'model_c' is none of model_a"):
        convert.convert_files([path], out)
    path = as_csv(write_csv, "broken.csv", [{**good, "conversation_b": "[{'role': 1}]"}])
    with pytest.raises(UserError, match=r"1 without a list of messages with role and content.*\n.*every row is known"):
        convert.convert_files([path], out)
    with pytest.raises(UserError, match=r"missing\.csv: no such file"):
        convert.convert_files([tmp_path / "missing.csv"], out)
    assert not out.exists()


def test_parquet_without_pyarrow(monkeypatch, tmp_path):
    """Says what to install."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"x\.parquet: Parquet is read by pyarrow, .*pip install pyarrow"):
        convert.convert_files([tmp_path / "x.parquet"], tmp_path / "out.csv")


def test_parquet_reads_only_what_is_used(monkeypatch, tmp_path):
    """Cells as pyarrow gives them; it is a stand-in, which tests do not require."""
    row = arena_row(1, "model_b", "p", "a", "b", embedding=[0.1] * 100)
    read = []

    def read_table(path, columns):
        read.extend(columns)
        return SimpleNamespace(to_pydict=lambda: {name: [row[name]] for name in columns})

    parquet = SimpleNamespace(read_schema=lambda path: SimpleNamespace(names=list(row)), read_table=read_table)
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet))
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    convert.convert_files([tmp_path / "x.parquet"], tmp_path / "out.csv")
    assert set(read) == {"question_id", "model_a", "model_b", "winner", "conversation_a", "conversation_b"}
    assert read_rows(tmp_path / "out.csv", labelled=True)["response_b"].tolist() == [["b"]]


def test_parquet_itself(tmp_path):
    """The same with pyarrow, where it is installed."""
    pytest.importorskip("pyarrow")
    rows = [arena_row(1, "tie (bothbad)", "p", [{"type": "text", "text": "a"}], [{"type": "text", "text": "b"}])]
    rows[0]["conversation_a"][0]["content"] = rows[0]["conversation_b"][0]["content"] = [{"type": "text", "text": "p"}]
    pd.DataFrame(rows).to_parquet(tmp_path / "arena.parquet")
    convert.convert_files([tmp_path / "arena.parquet"], tmp_path / "out.csv")
    assert read_rows(tmp_path / "out.csv", labelled=True)["response_a"].tolist() == [["a"]]


def test_help_names_the_licences(capsys):
    """Each set with its own."""
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    shown = capsys.readouterr().out
    for words in ("CC-BY-NC-4.0", "Apache-2.0", "chatbot_arena_conversations", "140k"):
        assert words in shown
