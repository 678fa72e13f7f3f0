"""Odd, damaged and hostile inputs from public bug reports: the command of a user, and what must come of it."""

import csv
import gzip
import io
import itertools
import json
import os
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill.cli
import pytest
from conftest import TWO_FOLDS, make_row, read_tree, run_arguments, run_small

from prefcls_lib.config import RunConfig
from prefcls_lib.data.loading import read_rows
from prefcls_lib.pipeline import folds, job, steps
from prefcls_lib.runtime.files import UserError

ROOT = Path(__file__).parents[1]
TEXTS = ["prompt", "response_a", "response_b"]


def talk(*turns: object, roles: tuple = ("user", "assistant")) -> list[dict]:
    """A conversation as the arena files have it: user and assistant in turn."""
    return [{"role": roles[i % len(roles)], "content": turn} for i, turn in enumerate(turns)]


def arena_row(row_id: object, winner: str, a: object, b: object, **more: object) -> dict:
    """One row of an arena file."""
    sides = {"conversation_a": a, "conversation_b": b}
    return {"question_id": f"q{row_id}", "model_a": "m", "model_b": "n", "winner": winner, **sides, **more}


def as_csv(rows: list[dict]) -> bytes:
    """Rows as a CSV file; lists are JSON."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0])
    writer.writeheader()
    writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return buffer.getvalue().encode()


def zipped(**members: str) -> bytes:
    """A zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name.replace("_csv", ".csv"), text)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> Path:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# --- test rows


def test_line_breaks_cost_nothing(prefcls, finished_run, tmp_path):
    """An answer of 20,000 line breaks takes less than a second more than an ordinary row."""
    seconds = []
    for answer in ("a", "\n" * 20_000):
        path = put(tmp_path / "newlines.csv", as_csv([make_row(1, response_a=[answer])]))
        started = time.perf_counter()
        assert prefcls("predict", "--run", finished_run, "--test", path, "--out", tmp_path / "s.csv")[0] == 0
        seconds.append(time.perf_counter() - started)
    assert seconds[1] < seconds[0] + 1


GOOD = as_csv([make_row(number) for number in range(8)])
TEST_FILES = {
    "train.csv.zip": (zipped(train_csv=GOOD.decode()), 0, "(8 rows)"),
    "semicolon.csv": (GOOD.replace(b",", b";"), 2, "has semicolons between its columns. Save it with commas"),
    "tab.csv": (GOOD.replace(b",", b"\t"), 2, "has tabs between its columns"),
    "rows.jsonl": (b'{"id": "1"}\n{"id": "2"}', 2, "is JSON. Write CSV: one column a field, each text a JSON list"),
}


@pytest.mark.parametrize("name", TEST_FILES)
def test_file_of_another_form_is_read_or_named(prefcls, finished_run, tmp_path, name):
    """A zip archive of one CSV is read; of others the message says what the file is and what to do."""
    content, code, words = TEST_FILES[name]
    path, out = put(tmp_path / name, content), tmp_path / "s.csv"
    found = prefcls("predict", "--run", finished_run, "--test", path, "--out", out)
    assert found[0] == code and words in found[1 if code == 0 else 2]
    assert out.exists() == (code == 0) and (code == 0 or str(path) in found[2])


# --- runs that are refused before anything is written


def break_backbone(folder: Path, home: Path, **values: object) -> Path:
    """A copy of the backbone whose config.json has other values, and whose code would leave a file."""
    shutil.copytree(home / "backbone", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | values
    put(folder / "config.json", json.dumps(config).encode())
    put(folder / "code.py", f"import pathlib\npathlib.Path({str(folder / 'CODE_RAN')!r}).touch()\n".encode())
    return folder


FOREIGN_CODE = {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
# what the command gets, made in a folder; words that the message must have
REFUSED_RUNS = {
    "flipped_bit.csv.gz": (
        lambda folder, home: ["--train", put(folder / "t.csv.gz", gzip.compress(GOOD)[:-8] + bytes(8))],
        "t.csv.gz: cannot be read (CRC check failed",
    ),
    "deep.yaml": (
        lambda folder, home: ["--config", put(folder / "deep.yaml", b"folds: " + b"[" * 700)],
        "deep.yaml: cannot be read (RecursionError",
    ),
    "roberta_without_pad": (
        lambda folder, home: ["--set", f"backbone={break_backbone(folder / 'b', home, pad_token_id=None)}"],
        "config.json: pad_token_id is 'None', expected a whole number",
    ),
    "remote_code as backbone": (
        lambda folder, home: ["--set", f"backbone={break_backbone(folder / 'b', home, **FOREIGN_CODE)}"],
        "b/config.json: cannot be read (",
    ),
    "remote_code as init_from": (
        lambda folder, home: ["--set", f"init_from={break_backbone(folder / 'b', home, **FOREIGN_CODE)}"],
        "b/config.json: cannot be read (",
    ),
    "time": (lambda folder, home: ["--set", "time_budget_hours=8:30"], "time_budget_hours='8:30': expected a number"),
}


@pytest.mark.parametrize("case", REFUSED_RUNS)
def test_run_is_refused_before_anything_is_written(prefcls, home, tmp_path, monkeypatch, case):
    """One short message, exit code 2; foreign code does not run, though the standard input says yes."""
    make, words = REFUSED_RUNS[case]
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    code, _, error = prefcls(*run_arguments(home, tmp_path / "run"), *make(tmp_path, home))
    assert (code, error.count("prefcls: "), words in error, "Traceback" in error) == (2, 1, True, False)
    assert len(error) < 600
    assert not (tmp_path / "run").exists() and not list(tmp_path.rglob("CODE_RAN"))


def test_one_call_loads_what_transformers_reads():
    """`from_pretrained` is called in one place, which forbids code; the model card's example in a message is text."""
    calls = []
    for place in ("prefcls_lib", "kaggle", "report", "notebooks", "figs"):
        for path in sorted((ROOT / place).rglob("*.py")):
            lines = path.read_text(encoding="utf-8").splitlines()
            calls += [(path.name, line) for line in lines if ".from_pretrained(" in line.replace("(...)", "")]
    [(name, line)] = calls
    assert (name, "trust_remote_code=False" in line) == ("backbones.py", True)


# --- settings

MEANT = {"max_length": ("0256", 256), "seed": ("010", 10), "out": ("2024", "2024"), "folds": ("0,1", (0, 1)),
         "mixed_precision": ("no", "no")}  # fmt: skip


def test_settings_are_read_as_a_person_means_them(prefcls, tmp_path, monkeypatch):
    """The same with --set, in a YAML file, and as papermill translates -p and -f into a notebook's cell."""
    seen = []

    def run(config: RunConfig, network: bool) -> None:
        seen.append(config)
        raise UserError("enough")

    monkeypatch.setattr(steps, "run", run)
    expected = RunConfig(**{name: value for name, (_, value) in MEANT.items()})
    prefcls("run", *[part for name, (text, _) in MEANT.items() for part in ("--set", f"{name}={text}")])
    lines = [f"{name}: {text}" for name, (text, _) in MEANT.items()]
    prefcls("run", "--config", put(tmp_path / "all.yaml", "\n".join(lines).encode()))
    # papermill reads a file by YAML 1.1, in which 0256 is 174 and 010 is 8: only the text `no` is of concern there
    put(tmp_path / "no.yaml", b"mixed_precision: no")
    arguments = [part for name, (text, _) in MEANT.items() if text != "no" for part in ("-p", name, text)]
    notebooks = [str(ROOT / "notebooks" / "01_deberta_v3_xsmall.ipynb"), str(tmp_path / "out.ipynb")]
    papermill.cli.papermill.main(
        [*notebooks, "--prepare-only", *arguments, "-f", str(tmp_path / "no.yaml")], standalone_mode=False
    )
    namespace: dict[str, object] = {}
    for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells:
        if {"parameters", "injected-parameters"} & set(cell.metadata.get("tags", [])):
            exec(cell.source, namespace)
    namespace["backbone"] = expected.backbone
    del namespace["__builtins__"]
    assert [*seen, RunConfig.from_namespace(namespace)] == [expected] * 3


def test_largest_seed_and_a_batch_above_the_rows(home, tmp_path):
    """The last seed that numpy takes, with a fold and a second seed above it; one step holds all rows."""
    settings = ("seed=4294967295", "folds=[1]", "num_seeds=2", "batch_size=65536")
    found = run_small(home, tmp_path / "run", *settings)["folds"]
    assert [(model["seed"], model["steps"]) for model in found] == [(2**32 - 1, 1), (0, 1)]


# --- signals


def test_stopped_outside_training(prefcls, home, finished_run, tmp_path, monkeypatch):
    """While rows are read, while baselines are fitted, and after the last step, by Ctrl-C and by SIGTERM, ten times
    each: exit code 130 or 143, how to go on, nothing half-written. At last the bytes of a run that nobody stopped."""
    arguments, out = run_arguments(home, tmp_path / "run", *TWO_FOLDS), tmp_path / "run"
    places = (job, "read_rows"), (steps.fold_baseline, "fit_out_of_fold"), (folds, "write_model_tables")
    for (owner, name), number in itertools.product(places, (signal.SIGINT, signal.SIGTERM)):
        real = getattr(owner, name)

        def stop(*given: object, real: Callable = real, number: int = number, **settings: object) -> object:
            try:
                os.kill(os.getpid(), number)
            finally:
                for _ in range(9):
                    os.kill(os.getpid(), number)
            return real(*given, **settings)  # a model that is being saved is saved, then SIGTERM counts

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            code, _, error = prefcls(*arguments)
        assert (code, "run the same command to resume" in error) == ({2: 130, 15: 143}[number], True)
        assert not list(tmp_path.rglob(".tmp-*")) and not (out / "result.json").exists()
    assert [path.name for path in sorted((out / "model").iterdir())] == ["fold0"]
    assert prefcls(*arguments)[0] == 0
    assert (out / "submission.csv").read_bytes() == (finished_run / "submission.csv").read_bytes()


# --- public arena files


@pytest.fixture
def as_parquet(monkeypatch):
    """as_parquet(path, rows) -> a file whose cells are as pyarrow gives them, which is a stand-in."""
    tables: dict[Path, list[dict]] = {}

    def read_table(path: Path, columns: list[str]) -> SimpleNamespace:
        return SimpleNamespace(to_pydict=lambda: {name: [row[name] for row in tables[path]] for name in columns})

    def write(path: Path, rows: list[dict]) -> Path:
        tables[path] = rows
        return put(path, b"PAR1")

    parquet = SimpleNamespace(read_schema=lambda path: SimpleNamespace(names=list(tables[path][0])))
    parquet.read_table = read_table
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=parquet))
    return write


def vote(number: int, **cells: object) -> dict:
    """One row as WSDM has it."""
    return {"prompt": f"p{number}", "response_a": "a", "response_b": "b", "winner": "model_a"} | cells


SYSTEM = {"role": "system", "content": "Be kind"}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]
IMAGE = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "what is this?"}]
# files with their rows; what is printed; each row that is written: start of the id, label, texts
ARENA_FILES = {
    "wsdm_null": (
        {"wsdm.parquet": [vote(1, id="7", response_a=None), vote(2, id="8", winner="model_b", language="English")]},
        "2 rows of text, 2 written, 0 known\n",
        [("wsdm-7", 0, ["p1"], [""], ["b"]), ("wsdm-8", 1, ["p2"], ["a"], ["b"])],
    ),
    "arena55k": (
        {"55k.parquet": [{"id": 7, "prompt": '["q"]', "response_a": ["a"], "response_b": "[null]", "model_a": None,
                          "winner_model_a": 0, "winner_model_b": 1, "winner_tie": None}]},
        "1 rows of text, 1 written, 0 known\n",
        [("55k-7", 1, ["q"], ["a"], [""])],
    ),
    "arena140k": (
        {"140k.parquet": [
            arena_row(1, "both_bad", talk("p", PARTS), talk("p", "n"), evaluation_order=1),
            arena_row(2, "model_a", talk(IMAGE, "m"), talk(IMAGE, "n"), evaluation_order=1),
            arena_row(3, "model_a", talk("shorter!", "m"), talk("shorter!", "n"), evaluation_order=2),
        ]},
        "1 rows of text, 1 written, 0 known, 2 left out (1 with more than text; 1 later votes of a session)",
        [("140k-q1", 2, ["p"], ["a\nb"], ["n"])],
    ),
    "double_ids": (
        {"d1/train.parquet": [vote(0), vote(1)], "d2/train.parquet": [vote(2)]},
        "1 rows of text, 1 written, 0 known\n",
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
        "2 rows of text, 2 written, 0 known, 4 left out (4 whose messages are not of user and assistant in turn)",
        [("roles-q1", 0, ["P"], ["A"], ["B"]), ("roles-q4", 2, ["p"], ["a"], ["b"])],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ARENA_FILES)
def test_arena_file_is_converted(prefcls, as_parquet, tmp_path, case):
    """No empty row, no shifted turn, null is the empty text, ids differ; what is left out is counted."""
    tables, words, expected = ARENA_FILES[case]
    paths = [as_parquet(tmp_path / name, rows) for name, rows in tables.items()]
    code, out, error = prefcls("convert", *paths, "--out", tmp_path / "extra.csv")
    assert (code, words in out) == (0, True), out + error
    rows = read_rows(tmp_path / "extra.csv", labelled=True)
    found = rows[["id", "label", *TEXTS]].to_numpy().tolist()
    assert [line[1:] for line in found] == [list(line[1:]) for line in expected]
    assert all(line[0].startswith(start) for line, (start, *_) in zip(found, expected, strict=True))
    assert rows["id"].is_unique


def test_rows_that_are_known_are_left_out(prefcls, tmp_path):
    """In any form: with A and B exchanged, other white space, half a surrogate pair, a last answer or a last turn that
    one of the files leaves out; and a row that is there twice."""
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
    assert "5 rows of text, 2 written, 3 known" in out and "3 rows of text, 0 written, 3 known" in out
    assert read_rows(tmp_path / "extra.csv", labelled=True)["id"].tolist() == ["55k-1006", "55k-1007"]
    code, _, error = prefcls("convert", other, "--against", train, "--out", tmp_path / "none.csv")
    assert (code, "every row is known already" in error) == (2, True)
    assert not (tmp_path / "none.csv").exists()


def test_output_over_an_input_is_refused(prefcls, finished_run, tmp_path):
    """convert, blend and predict: over what they read, by whatever path; nothing changes."""
    train = put(tmp_path / "train.csv", as_csv([make_row(number, number % 3) for number in range(12)]))
    arena, test = put(tmp_path / "arena.csv", as_csv([make_row(90, 0)])), put(tmp_path / "test.csv", GOOD)
    (tmp_path / "no").mkdir()
    before = read_tree(tmp_path) | read_tree(finished_run)
    run = ["--run", finished_run, "--test", test]
    for arguments in (
        ["convert", arena, "--out", arena],
        ["convert", arena, "--against", train, "--out", train],
        ["convert", arena, "--against", train, "--out", tmp_path / "." / "no" / ".." / "train.csv"],
        ["blend", "--runs", finished_run, "--out", finished_run / "result.json"],
        ["predict", *run, "--out", test],
        ["predict", *run, "--out", finished_run / "oof.csv"],
    ):
        code, _, error = prefcls(*arguments)
        assert (code, f"--out {arguments[-1]}: would overwrite what is read from " in error) == (2, True)
    assert read_tree(tmp_path) | read_tree(finished_run) == before
