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

TEXTS = ["prompt", "response_a", "response_b"]


def talk(*turns: object, roles: tuple = ("user", "assistant")) -> list[dict]:
    """A conversation as the arena files have it: user and assistant in turn."""
    return [{"role": roles[i % len(roles)], "content": turn} for i, turn in enumerate(turns)]


def arena_row(number: int, winner: str, a: list, b: list, **more: object) -> dict:
    sides = {"conversation_a": a, "conversation_b": b}
    return {"question_id": f"q{number}", "model_a": "m", "model_b": "n", "winner": winner, **sides, **more}


def as_csv(write_csv, name: str, rows: list[dict]):
    """Conversations as JSON text."""
    return write_csv(name, [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows])


@pytest.fixture
def as_parquet(monkeypatch, tmp_path):
    """as_parquet(name, rows) -> a file whose cells are as pyarrow gives them, which is a stand-in."""
    tables = {}

    def read_table(path, columns):
        rows = tables.pop(path)
        return SimpleNamespace(to_pydict=lambda: {name: [row[name] for row in rows] for name in columns})

    def write(name: str, rows: list[dict]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"PAR1")
        tables[path] = rows
        return path

    schema = lambda path: SimpleNamespace(names=list(tables[path][0]))  # noqa: E731
    parquet = SimpleNamespace(read_schema=schema, read_table=read_table)
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet))
    return write


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


def test_conversations_of_several_turns(write_csv, run):
    """33k and 100k: all four verdicts, turns in order, null as the empty text; the file's name in the id."""
    rows = [arena_row(1, "model_a", talk("p1", "a1", "p2\né", "a2"), talk("p1", "b1", "p2\né", None))]
    rows += [arena_row(number, winner, talk(f"p{number}", "a"), talk(f"p{number}", "b"))
             for number, winner in enumerate(("model_b", "tie", "tie (bothbad)"), 2)]  # fmt: skip
    shown, found = run(as_csv(write_csv, "arena33k.csv", rows))
    assert "4 rows of text, 4 written, 0 known\n" in shown
    assert found["label"].tolist() == [0, 1, 2, 2]
    assert found["id"].tolist() == [f"arena33k-q{number}" for number in (1, 2, 3, 4)]
    assert found.loc[0, TEXTS].tolist() == [["p1", "p2\né"], ["a1", "a2"], ["b1", ""]]
    assert set(found["model_a"]) == {"m"}


def test_typed_parts_and_later_votes(write_csv, run):
    """140k: parts of text are joined; a row with an image, and a later vote of a session, are left out and counted."""
    text = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]
    image = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "what is this?"}]
    rows = [arena_row(1, "both_bad", talk("p", text), talk("p", "n"), evaluation_order="1"),
            arena_row(2, "model_a", talk(image, "m"), talk(image, "n"), evaluation_order="1"),
            arena_row(3, "model_a", talk("shorter!", "m"), talk("shorter!", "n"), evaluation_order="2")]  # fmt: skip
    shown, found = run(as_csv(write_csv, "arena140k.csv", rows))
    assert "1 rows of text, 1 written, 0 known, 2 left out (1 with more than text; 1 later votes of a session)" in shown
    assert found[["id", "label"]].to_numpy().tolist() == [["arena140k-q1", 2]]
    assert found.loc[0, "response_a"] == ["a\nb"]


SYSTEM = {"role": "system", "content": "Be kind"}
IN_TURN = "whose messages are not of user and assistant in turn"
# conversations, the row's texts or why it is left out
CONVERSATIONS = {
    "system": ([SYSTEM, *talk("p", "a")], [SYSTEM, *talk("p", "b")], [["p"], ["a"], ["b"]]),
    "last prompt unanswered": (talk("p", "a", "q"), talk("p", "b", "q"), [["p"], ["a"], ["b"]]),
    "one last answer": (talk("p", "a", "q", "c"), talk("p", "b", "q"), [["p", "q"], ["a", "c"], ["b", ""]]),
    "one side shorter": (talk("p", "a", "q", "c"), talk("p", "b"), [["p", "q"], ["a", "c"], ["b", ""]]),
    "greeting first": (talk("Hello!", "p", "a", roles=("assistant", "user")), talk("p", "b"), IN_TURN),
    "two prompts in a row": (talk("p", "q", "a", roles=("user", "user", "assistant")), talk("p", "b"), IN_TURN),
    "other roles": (talk("p", "a", roles=("human", "gpt")), talk("p", "b", roles=("human", "gpt")), IN_TURN),
    "no messages": ([], [], IN_TURN),
    "other prompts": (talk("p", "a"), talk("q", "b"), "with other prompts on both sides"),
    "no text at all": (talk("", None), talk("", " "), "without any text"),
    "not JSON": ("[{'role': 1}]", talk("p", "b"), "without a list of messages with role and content"),
    "null": (None, talk("p", "b"), "without a list of messages with role and content"),
    "deep": ("[" * 100_000, talk("p", "b"), "without a list of messages with role and content"),
    "half a pair": (talk("p \ud83d", "a"), talk("p \ud83d", "b"), [["p \ufffd"], ["a"], ["b"]]),
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_conversation_is_read_or_left_out(write_csv, run, case):
    """No empty row, no shifted turn; the row beside it is written."""
    a, b, expected = CONVERSATIONS[case]
    good = arena_row(1, "tie", talk("good", "a"), talk("good", "b"))
    shown, found = run(as_csv(write_csv, "arena.csv", [good, arena_row(2, "model_a", a, b)]))
    if isinstance(expected, str):
        assert f"1 written, 0 known, 1 left out (1 {expected})" in shown and len(found) == 1
    else:
        assert "2 written, 0 known\n" in shown and found.loc[1, TEXTS].tolist() == expected


def test_plain_texts_beside_another_form(write_csv, run):
    """WSDM: one turn each, without ids here; in the same call a file of another form."""
    plain = {"prompt": '["not JSON"', "response_a": "yes", "response_b": "", "language": "English", "winner": "model_b"}
    other = as_csv(write_csv, "arena.csv", [arena_row(1, "tie", talk("p", "a"), talk("p", "b"))])
    _, found = run(write_csv("wsdm.csv", [plain]), other)
    assert found.loc[0, TEXTS].tolist() == [['["not JSON"'], ["yes"], [""]]
    assert found[["id", "label"]].to_numpy().tolist() == [["wsdm-1", 1], ["arena-q1", 2]]


def test_parquet_of_each_form_and_ids_of_two_files(as_parquet, run):
    """Null is the empty text, numbers and lists are taken; two files of one name get ids that differ; extra columns
    are not read."""
    votes = [{"prompt": f"p{n}", "response_a": None, "response_b": "b", "winner": "model_a", "x": 0} for n in range(3)]
    row = {"id": 7, "prompt": '["q"]', "response_a": ["a"], "response_b": '[null]', "model_a": None,
           "winner_model_a": 0, "winner_model_b": 1, "winner_tie": None}  # fmt: skip
    files = [as_parquet("d1/train.parquet", votes[:2]), as_parquet("d2/train.parquet", votes[2:])]
    _, found = run(*files, as_parquet("arena55k.parquet", [row]))
    assert found["response_a"].tolist() == [[""], [""], [""], ["a"]] and found.loc[3, "response_b"] == [""]
    assert found["label"].tolist() == [0, 0, 0, 1] and found.loc[3, "id"] == "arena55k-7"
    assert found["id"].is_unique and found["id"].str.match(r"train-1-[0-9a-f]{8}$").tolist() == [
        True,
        False,
        True,
        False,
    ]


def test_parquet_itself(tmp_path, run):
    """The same with pyarrow, where it is installed."""
    pytest.importorskip("pyarrow")
    part = [{"type": "text", "text": "p"}]
    pd.DataFrame([arena_row(1, "tie", talk(part, part), talk(part, part))]).to_parquet(tmp_path / "arena.parquet")
    assert run(tmp_path / "arena.parquet")[1].loc[0, TEXTS].tolist() == [["p"]] * 3


def test_rows_that_are_known_are_left_out(write_csv, run, capsys):
    """In any form: with A and B exchanged, other white space, half a surrogate pair, a last answer or a last turn that
    one of the files leaves out; and a row that is there twice."""
    train = write_csv("train.csv", [
        make_row(1, 0), make_row(2, 1), make_row(3, 0, prompt=r'["hi \ud83d"]'),
        make_row(4, 1, prompt='["p", "q"]', response_a='["a1", "a2"]', response_b='["b1"]'),
        make_row(5, 1, prompt='["r", "s"]', response_a='["c"]', response_b='["d", null]'),
    ])  # fmt: skip
    two = make_row(2, 1)
    two["response_a"], two["response_b"] = two["response_b"], two["response_a"]
    spaced = make_row(6, 2, prompt=json.dumps(["  question\n6? "]), id="x")
    same = write_csv("arena55k.csv", [make_row(1, 0), two, make_row(6, 2), spaced, make_row(7, 0)])
    texts = [json.loads(make_row(3, 0)[name])[0] for name in TEXTS[1:]]
    other = as_csv(write_csv, "arena.csv", [
        arena_row(1, "model_a", talk("hi \ud83d", texts[0]), talk("hi \ud83d", texts[1])),
        arena_row(2, "model_b", talk("p", "a1", "q", "a2"), talk("p", "b1", "q")),
        arena_row(3, "model_b", talk("r", "d", "s"), talk("r", "c")),
    ])  # fmt: skip
    shown, found = run(same, other, "--against", train)
    assert "5 rows of text, 2 written, 3 known" in shown and "3 rows of text, 0 written, 3 known" in shown
    assert found["id"].tolist() == ["arena55k-1006", "arena55k-1007"]
    assert cli.main(["convert", str(other), "--out", f"{train}.no", "--against", str(train)]) == 2
    assert "every row is known already" in capsys.readouterr().err


def test_what_cannot_be_read_is_named(write_csv, tmp_path, monkeypatch):
    """A form that is not known, a verdict that is none, nothing left, no file, no pyarrow: what, where, what to do."""
    out, good = tmp_path / "out.csv", arena_row(1, "tie", talk("p", "a"), talk("p", "b"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    for path, words in {
        write_csv(
            "other.csv", [{"id": "1", "text": "x"}]
        ): r"in none of the known forms\. Columns found: id, text\. .*WSDM",
        as_csv(
            write_csv, "verdict.csv", [good, {**good, "winner": "c" * 200}]
        ): r"row 2, column 'winner': 'c{76}\.\.\. is",
        as_csv(
            write_csv, "broken.csv", [{**good, "conversation_b": "x"}]
        ): r"1 without a list.*\n.*known already or left",
        tmp_path / "missing.csv": "no such file",
        tmp_path / "x.parquet": "Parquet is read by pyarrow, .*pip install pyarrow",
    }.items():
        with pytest.raises(UserError, match=f"{path.name}: .*{words}"):
            convert.convert_files([path], out)
    assert not out.exists()


def test_help_names_the_licences(capsys):
    """Each set with its own."""
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("CC-BY-NC-4.0", "Apache-2.0", "chatbot_arena_conversations", "140k"))
