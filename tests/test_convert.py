"""Public arena files in each published form to the competition's columns; numbers and rows worked out by hand."""

import sys

import pandas as pd
import pytest
from test_cases import TEXTS, arena_row, as_csv, put, talk

from prefcls_lib import cli
from prefcls_lib.data import convert
from prefcls_lib.data.loading import read_rows
from prefcls_lib.runtime.files import UserError


@pytest.fixture
def run(tmp_path, capsys):
    """run(files and options...) -> what `prefcls convert` prints, and the rows that it writes."""

    def call(*arguments: object):
        out = tmp_path / "extra.csv"
        code = cli.main(["convert", *map(str, arguments), "--out", str(out)])
        output = capsys.readouterr()
        assert code == 0, output.err
        return output.out, read_rows(out, labelled=True)

    return call


def test_conversations_of_several_turns(tmp_path, run):
    """33k and 100k: all four verdicts, turns in order, null as the empty text; the file's name in the id."""
    rows = [arena_row(1, "model_a", talk("p1", "a1", "p2\né", "a2"), talk("p1", "b1", "p2\né", None))]
    rows += [arena_row(number, winner, talk(f"p{number}", "a"), talk(f"p{number}", "b"))
             for number, winner in enumerate(("model_b", "tie", "tie (bothbad)"), 2)]  # fmt: skip
    shown, found = run(put(tmp_path / "arena33k.csv", as_csv(rows)))
    assert "4 rows of text, 4 written, 0 known\n" in shown
    assert found["label"].tolist() == [0, 1, 2, 2]
    assert found["id"].tolist() == [f"arena33k-q{number}" for number in (1, 2, 3, 4)]
    assert found.loc[0, TEXTS].tolist() == [["p1", "p2\né"], ["a1", "a2"], ["b1", ""]]
    assert set(found["model_a"]) == {"m"}


# conversations, the row's texts or why it is left out
CONVERSATIONS = {
    "one last answer": (talk("p", "a", "q", "c"), talk("p", "b", "q"), [["p", "q"], ["a", "c"], ["b", ""]]),
    "one side shorter": (talk("p", "a", "q", "c"), talk("p", "b"), [["p", "q"], ["a", "c"], ["b", ""]]),
    "other prompts": (talk("p", "a"), talk("q", "b"), "with other prompts on both sides"),
    "no text at all": (talk("", None), talk("", " "), "without any text"),
    "not JSON": ("[{'role': 1}]", talk("p", "b"), "without a list of messages with role and content"),
    "null": (None, talk("p", "b"), "without a list of messages with role and content"),
    "deep": ("[" * 100_000, talk("p", "b"), "without a list of messages with role and content"),
    "half a pair": (talk("p \ud83d", "a"), talk("p \ud83d", "b"), [["p \ufffd"], ["a"], ["b"]]),
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_conversation_is_read_or_left_out(tmp_path, run, case):
    """No empty row, no shifted turn; the row beside it is written."""
    a, b, expected = CONVERSATIONS[case]
    good = arena_row(1, "tie", talk("good", "a"), talk("good", "b"))
    shown, found = run(put(tmp_path / "arena.csv", as_csv([good, arena_row(2, "model_a", a, b)])))
    if isinstance(expected, str):
        assert f"1 written, 0 known, 1 left out (1 {expected})" in shown and len(found) == 1
    else:
        assert "2 written, 0 known\n" in shown and found.loc[1, TEXTS].tolist() == expected


def test_plain_texts_beside_another_form(tmp_path, run):
    """WSDM: one turn each, without ids here; in the same call a file of another form."""
    plain = {"prompt": '["not JSON"', "response_a": "yes", "response_b": "", "language": "English", "winner": "model_b"}
    other = put(tmp_path / "arena.csv", as_csv([arena_row(1, "tie", talk("p", "a"), talk("p", "b"))]))
    _, found = run(put(tmp_path / "wsdm.csv", as_csv([plain])), other)
    assert found.loc[0, TEXTS].tolist() == [['["not JSON"'], ["yes"], [""]]
    assert found[["id", "label"]].to_numpy().tolist() == [["wsdm-1", 1], ["arena-q1", 2]]


def test_parquet_itself(tmp_path, run):
    """The same with pyarrow, where it is installed."""
    pytest.importorskip("pyarrow")
    part = [{"type": "text", "text": "p"}]
    pd.DataFrame([arena_row(1, "tie", talk(part, part), talk(part, part))]).to_parquet(tmp_path / "arena.parquet")
    assert run(tmp_path / "arena.parquet")[1].loc[0, TEXTS].tolist() == [["p"]] * 3


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    """A form that is not known, a verdict that is none, nothing left, no file, no pyarrow: what, where, what to do."""
    out, good = tmp_path / "out.csv", arena_row(1, "tie", talk("p", "a"), talk("p", "b"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, content, words in (
        ("no.csv", as_csv([{"id": 1, "text": "x"}]), r"in none of the known forms\. Columns found: id, text\. .*WSDM"),
        ("verdict.csv", as_csv([good, good | {"winner": "c" * 200}]), r"row 2, column 'winner': 'c{76}\.\.\. is"),
        ("broken.csv", as_csv([good | {"conversation_b": "x"}]), r"1 without a list.*\n.*known already or left"),
        ("x.parquet", b"PAR1", "Parquet is read by pyarrow, .*pip install pyarrow"),
        ("missing.csv", None, "no such file"),
    ):
        path = tmp_path / name if content is None else put(tmp_path / name, content)
        with pytest.raises(UserError, match=f"{name}: .*{words}"):
            convert.convert_files([path], out)
    assert not out.exists()


def test_help_names_the_licences(capsys):
    """Each set with its own."""
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("CC-BY-NC-4.0", "Apache-2.0", "chatbot_arena_conversations", "140k"))
