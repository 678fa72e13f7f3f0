"""What a user can get wrong: one message that says where and what to do, exit code 2, and nothing half-written."""

import csv
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TWO_FOLDS, make_row, read_tree, run_arguments
from test_cases import put, zipped

from prefcls_lib import cli
from prefcls_lib.data import loading
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.data.submission import check_submission, write_submission
from prefcls_lib.runtime import files
from prefcls_lib.runtime.files import UserError

TRAIN_ROWS = [make_row(number, number % 3) for number in range(12)]
TEST_ROWS = [make_row(100 + number) for number in range(3)]
SHORT = ("folds=[0]", "num_folds=2", "max_train_rows=20", "start_from=structure_logistic")
HEADER = "id,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\r\n"
ROW = '7,"[""p""]","[""a""]","[""b""]",1,0,0\r\n'
GOOD = (HEADER + ROW).encode()


@pytest.fixture
def refuse(prefcls):
    """refuse(arguments) -> the one message with which the command line refuses them."""

    def run(arguments: list[str]) -> str:
        code, _, error = prefcls(*arguments)
        assert (code, error.count("prefcls: "), "Traceback" in error) == (2, 1, False)
        return error[error.index("prefcls: ") :]

    return run


@pytest.fixture
def out(tmp_path) -> Path:
    """An output folder that holds an older submission and a foreign file."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "submission.csv").write_bytes(b"older")
    (folder / "notes.txt").write_bytes(b"foreign")
    return folder


@pytest.fixture
def refuse_run(refuse, write_csv, out, tiny):
    """refuse_run(train=..., test=..., settings...) -> the message; the output folder is as it was before."""

    def run(*settings: str, train: Path | None = None, test: Path | None = None) -> str:
        train = train or write_csv("good_train.csv", TRAIN_ROWS)
        test = test or write_csv("good_test.csv", TEST_ROWS)
        arguments = ["run", "--train", str(train), "--test", str(test), "--out", str(out)]
        for setting in (f"backbone={tiny}", "num_folds=2", "max_length=32", *settings):
            arguments += ["--set", setting]
        before = read_tree(out)
        message = refuse(arguments)
        assert read_tree(out) == before
        return message

    return run


def refused(read, *arguments) -> str:
    """The message of the UserError that it raises."""
    with pytest.raises(UserError) as error:
        read(*arguments)
    return str(error.value)


# cells of row 3 of the training file, words that the message must have
BAD_CELLS = [
    ({"prompt": "hello"}, "row 3, column 'prompt': not a JSON list of texts: 'hello'"),
    ({"prompt": ""}, "row 3, column 'prompt': not a JSON list"),
    ({"response_a": '"text"'}, "row 3, column 'response_a': not a JSON list"),
    ({"response_b": '{"a": 1}'}, "row 3, column 'response_b': not a JSON list"),
    ({"response_b": '["cut off'}, "row 3, column 'response_b': not a JSON list"),
    ({"response_b": "[" * 100_000}, "row 3, column 'response_b': not a JSON list"),
    ({"response_b": "['a', 'b']"}, "This one looks like Python's: apply json.dumps"),
    ({"response_a": '["a", 1]'}, "row 3, column 'response_a': the list holds 1, which is neither text nor null"),
    ({"response_a": "[true]"}, "row 3, column 'response_a': the list holds true"),
    ({"prompt": '[["nested"]]'}, "row 3, column 'prompt': the list holds [\"nested\"]"),
    ({"prompt": "[NaN]"}, "row 3, column 'prompt': the list holds NaN"),
    ({"winner_tie": "2"}, "row 3, column 'winner_tie': '2' is not 0 or 1"),
    ({"winner_model_a": ""}, "row 3, column 'winner_model_a': '' is not 0 or 1"),
    ({"winner_model_b": "yes"}, "row 3, column 'winner_model_b': 'yes' is not 0 or 1"),
    ({"winner_model_b": "nan"}, "row 3, column 'winner_model_b': 'nan' is not 0 or 1"),
    ({"winner_tie": 0}, "row 3: 0 of the columns winner_model_a, winner_model_b, winner_tie are 1"),
    ({"winner_model_a": 1}, "row 3: 2 of the columns winner_model_a, winner_model_b, winner_tie are 1"),
    ({"id": "1000"}, "id '1000' is in rows 1 and 3, column 'id'"),
    ({"id": " "}, "row 3, column 'id': empty"),
    ({"prompt": "\x1b[2J\x07"}, "not a JSON list of texts: '\\x1b[2J\\x07'"),
]


@pytest.mark.parametrize(("cells", "words"), BAD_CELLS)
def test_bad_cell_is_named_by_file_row_and_column(write_csv, cells, words):
    """Row 1 is the first row under the header; what was found is shown, but not all of it."""
    rows = [dict(row) for row in TRAIN_ROWS]
    rows[2] |= cells
    path = write_csv("train.csv", rows)
    message = refused(loading.read_rows, path, True)
    assert message.startswith(f"{path}: ") and words in message
    assert len(message) < 600


# name, bytes, words that the message must have
BAD_FILES = {
    "empty.csv": (b"", "the file holds no rows"),
    "header.csv": (HEADER.encode(), "the file holds no rows"),
    "blank.csv": (b"\r\n\r\n", "the file holds no rows"),
    "empty.csv.gz": (b"", "the file holds no rows"),
    "cut_in_text.csv": (GOOD + b'8,"[""p""]","[""a', "EOF inside string starting at row 2"),
    "cut_between.csv": (GOOD + b'8,"[""p""]","[""a""]"', "row 2, column 'response_b': not a JSON list of texts: ''"),
    "cut_in_labels.csv": (GOOD + ROW[:-5].replace("7", "8").encode(), "row 2, column 'winner_model_b': '' is not 0"),
    "too_many.csv": (GOOD + ROW.replace(",1,0,0", ",1,0,0,0").encode(), "Expected 7 fields in line 3, saw 8"),
    "shifted.csv": ((HEADER + ROW.replace(",1,0", ",1,0,0")).encode(), "Expected 7 fields in line 2, saw 8"),
    "no_tie.csv": (GOOD.replace(b"winner_tie", b"tie"), "column 'winner_tie' is missing. Columns found: id, prompt, r"),
    "no_prompt.csv": (GOOD.replace(b"prompt", b"text"), "Needed: id, prompt, response_a, response_b, winner_model_a"),
    "doubled.csv": (GOOD.replace(b"response_b", b"prompt"), "column 'prompt' is there more than once"),
    "latin1.csv": (GOOD.replace(b'p"', b'caf\xe9"'), "not UTF-8 text near b'"),
    "utf16.csv": (GOOD.decode().encode("utf-16"), "not UTF-8 text: it holds zero bytes"),
    "utf16_without_mark.csv": (GOOD.decode().encode("utf-16-le"), "not UTF-8 text: it holds zero bytes"),
    "hole.csv": (GOOD.replace(b"a", b"\0", 1), "it holds zero bytes"),
    "cut.csv.gz": (gzip.compress(GOOD * 50)[:-30], "cannot be read (EOFError: Compressed file ended"),
    "broken.csv.gz": (gzip.compress(GOOD)[:12] + b"\xff" * 30, "cannot be read ("),
    "cut_inside.csv.gz": (gzip.compress(GOOD + b'8,"[""p""'), "EOF inside string starting at row 2"),
    "two.zip": (zipped(train_csv="x", test_csv="y"), "is a zip archive of 'train.csv, test.csv'. Unzip it"),
    "sheet.xlsx": (zipped(workbook="x"), "is a zip archive of 'workbook'"),
    "cut.zip": (zipped(train_csv=GOOD.decode())[:-30], "cannot be read (BadZipFile: File is not a zip file"),
    "rows.parquet": (b"PAR1...", "is a Parquet file. `prefcls convert` reads those of the public arena sets"),
    "rows.csv.xz": (b"\xfd7zXZ\0", "is an xz archive. Unpack it: xz -d"),
    "rows.csv.bz2": (b"BZh91AY", "is a bzip2 archive"),
    "rows.json": (b' [{"id": "1"}]', "is JSON"),
    "login.csv": (b"<!DOCTYPE html>", "is a web page. Download the file again, signed in"),
    "pointer.csv": (b"version https://git-lfs.github.com/spec/v1", "is a pointer to a file of Git LFS"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named(tmp_path, name):
    """Cut off, damaged, of another encoding, of another form, or without a column."""
    content, words = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    message = refused(loading.read_rows, path, True)
    assert message.startswith(f"{path}: ") and words in message


def test_path_that_is_no_file_is_named(tmp_path):
    """Missing, a folder, below a file, and a name that no file can have."""
    (tmp_path / "file").write_bytes(b"")
    for path, words in {
        tmp_path / "none.csv": "no such file. Check the path, or name the shipped rows: sample.",
        tmp_path: "is a folder. Name the CSV file in it.",
        tmp_path / "file" / "train.csv": "cannot be read (Not a directory)",
        tmp_path / ("x" * 300): "cannot be read (File name too long)",
    }.items():
        assert f"{path}: {words}" in refused(loading.read_rows, path, True)


def test_damaged_files_are_refused_whatever_they_raise(tmp_path):
    """Any byte of a gzip or zip archive flipped: rows as they were, or one message."""
    rows = loading.read_csv(put(tmp_path / "good.csv", GOOD * 3 + GOOD))
    for number, content in enumerate((gzip.compress(GOOD * 3 + GOOD), zipped(train_csv=(GOOD * 3 + GOOD).decode()))):
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 0xFF
            try:
                found = loading.read_csv(put(tmp_path / f"{number}.csv", bytes(damaged)))
            except UserError as error:
                assert f"{number}.csv: " in str(error)
            else:
                assert found == rows


def test_command_refuses_bad_rows_before_it_writes(refuse_run, write_csv, tmp_path):
    """Training file and test file alike; a test file needs no winner columns; ids are there once."""
    path = put(tmp_path / "bad.csv", BAD_FILES["cut_between.csv"][0])
    for message in (refuse_run(train=path), refuse_run(test=path)):
        assert f"{path}: row 2, column 'response_b': not a JSON list" in message
    path = write_csv("test.csv", [{k: v for k, v in row.items() if k != "response_b"} for row in TEST_ROWS])
    message = refuse_run(test=path)
    assert f"{path}: column 'response_b' is missing" in message and "winner" not in message
    path = write_csv("test.csv", [*TEST_ROWS, TEST_ROWS[1]])
    assert f"{path}: id '1101' is in rows 2 and 4, column 'id'" in refuse_run(test=path)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("num_folds=5", "too few for num_folds=5: 12 rows, 12 different prompts, 4 rows of the rarest class"),
        ("learning_rate", "--set 'learning_rate': expected KEY=VALUE"),
        ("mixed_precision=fp16", "setting mixed_precision='fp16': needs a CUDA GPU. Use auto, bf16 or no."),
        ("max_length=65", "takes at most 64 tokens"),
    ],
)
def test_bad_setting_is_named(refuse_run, setting, words, monkeypatch):
    """Before anything is written; fp16 is refused where there is no GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert words in refuse_run(setting)


@pytest.mark.parametrize(("kind", "words"), [("roberta", "64 tokens"), ("electra", "64 t"), ("deberta-v2", "fp16")])
def test_max_length_over_what_the_backbone_takes_is_refused(refuse_run, backbone_folders, kind, words):
    """RoBERTa's 66 positions hold 64 tokens; DeBERTa's are relative, so it gets past this check to the next."""
    folder = backbone_folders[kind]
    assert words in refuse_run(f"backbone={folder}", "max_length=65", "mixed_precision=fp16")
    assert "mixed_precision" in refuse_run(f"backbone={folder}", "max_length=64", "mixed_precision=fp16")


def test_place_that_cannot_be_written_is_refused(refuse, finished_run, home, tmp_path):
    """A regular file stands where the folder should be, or above it, or a folder where the file; so for root."""
    file, folder = put(tmp_path / "file", b"a file"), tmp_path / "folder"
    folder.mkdir()
    put(folder / "kept.txt", b"kept")
    before = read_tree(tmp_path)
    for out in (file, file / "run", file / "deep" / "run"):
        message = refuse(run_arguments(home, out, *SHORT))
        assert f"{out}" in message and "--out" in message
        assert ("is a file" if out == file else "cannot be written") in message
    os.mkfifo(tmp_path / "pipe")  # as /dev/null, which root could replace
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    loop = tmp_path / "loop" / "s.csv"
    for out in (file / "submission.csv", folder, tmp_path / "pipe", loop, tmp_path / ("x" * 300)):
        arguments = ["predict", "--run", str(finished_run), "--test", str(home / "test.csv"), "--out", str(out)]
        message = refuse(arguments)
        assert str(out) in message and ("cannot be written (" in message or "name too long" in message)
    assert read_tree(tmp_path) == before


@pytest.mark.parametrize("name", ["acme/no-such-model", "no-such-folder/", "/no/such/folder", "roberta-base"])
def test_unknown_backbone_lists_what_was_tried(refuse_run, tmp_path, monkeypatch, name):
    """Folder, Kaggle inputs, hub cache, hub; and what to do."""
    monkeypatch.setenv("PREFCLS_INPUT_ROOT", str(tmp_path / "input"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    message = refuse_run(f"backbone={name}")
    assert f"backbone '{name}' was not found. Tried:\n  folder {name}\n" in message
    assert f"Kaggle input {tmp_path / 'input'}" in message
    assert "Give the path of a folder with config.json, weights and tokenizer" in message
    hub = {"acme/no-such-model": "acme/no-such-model", "roberta-base": "FacebookAI/roberta-base"}.get(name)
    assert hub is None or (f"local hub cache {hub} (" in message and f"\n  hub {hub} (" in message)


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# how the backbone folder is broken, words that the message must have
BROKEN_BACKBONES = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "weights cannot be loaded (Error no file named"),
    "weights cut off": (lambda f: cut(f / "model.safetensors"), "weights cannot be loaded ("),
    "layer missing": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=3),
        "weights do not match the architecture in config.json; missing or of another shape: encoder.layer.2.",
    ),
    "other shape": (
        lambda f: edit_json(f / "config.json", intermediate_size=64),
        "missing or of another shape: encoder.layer.0.intermediate.dense.bias",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: cannot be read ("),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: cannot be read ("),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read ("),
    "unsupported type": (
        lambda f: edit_json(f / "config.json", model_type="gpt2"),
        "model type 'gpt2' is not supported. Supported: deberta-v2, roberta, electra, bert, modernbert",
    ),
    "unknown activation": (
        lambda f: edit_json(f / "config.json", hidden_act="x"),
        "weights cannot be loaded (KeyError",
    ),
    "length that is none": (
        lambda f: edit_json(f / "tokenizer_config.json", model_max_length="x"),
        "tokenizer.json: cannot be read (",
    ),
    "small vocabulary": (lambda f: edit_json(f / "config.json", vocab_size=50), "but its encoder only 50"),
}


@pytest.mark.parametrize("case", BROKEN_BACKBONES)
def test_broken_backbone_folder_is_refused(refuse_run, home, tmp_path, case):
    """The message names the folder; nothing is written."""
    damage, words = BROKEN_BACKBONES[case]
    folder = tmp_path / "backbone"
    shutil.copytree(home / "backbone", folder)
    damage(folder)
    message = refuse_run(f"backbone={folder}")
    assert words in message and str(folder) in message


def test_folder_of_another_run_is_refused_by_name(refuse, finished_run, home, tmp_path):
    """Other settings, other data: the value then and now; a copy of the data under another name does no harm."""
    before, arguments = read_tree(finished_run), run_arguments(home, finished_run, *TWO_FOLDS)
    message = refuse([*arguments, "--set", "seed=7"])
    assert f"{finished_run}: holds a run with seed=42, this one has seed=7" in message
    for kind in ("train", "test"):
        path, changed = tmp_path / f"{kind}.csv", list(arguments)
        changed[changed.index(f"--{kind}") + 1] = str(shutil.copy(home / f"{kind}.csv", path))
        assert cli.main(changed) == 0
        put(path, path.read_bytes().rsplit(b"\r\n", 2)[0])
        message = refuse(changed)
        assert f"{finished_run}: holds a run on another {kind} file ({path}" in message
        assert "prefcls predict --run" in message
    assert read_tree(finished_run) == before


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_foreign_config_in_the_output_folder_is_refused(refuse, home, out, content):
    """A config.json that no run wrote is never overwritten."""
    (out / "config.json").write_text(content, encoding="utf-8")
    before = read_tree(out)
    assert str(out / "config.json") in refuse(run_arguments(home, out, *SHORT))
    assert read_tree(out) == before


def test_full_disk_leaves_nothing_half_written(refuse, home, out):
    """No file may be larger than so many bytes: one message, no half file, no half model; without limit it resumes."""
    arguments, free = run_arguments(home, out, *SHORT), resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (300, 800, 10_000, 20_000, 200_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, free[1]))
        try:
            message = refuse(arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, free)
        assert message.startswith(f"prefcls: {out}") and "cannot be written (" in message
        tree = read_tree(out)
        assert not list(out.rglob(".tmp-*")) and "result.json" not in tree
        assert not [name for name in tree if name.startswith("model/")]
        assert tree["notes.txt"] == b"foreign" and tree["submission.csv"] == b"older"
    assert cli.main(arguments) == 0
    assert cli.main(["check-submission", str(out / "submission.csv"), "--test", str(home / "test.csv")]) == 0


def test_every_error_of_a_writer_is_one_message(tmp_path):
    """Libraries raise what they like on a full disk; the older file stays. Ctrl-C is no error."""
    path = put(tmp_path / "file", b"older")
    for error in (OSError(28, "No space left on device"), Exception("os error 28"), ValueError("x"), MemoryError()):

        def fail(temporary: Path, error: Exception = error) -> None:
            temporary.write_bytes(b"half")
            raise error

        assert f"{path}: cannot be written (" in refused(files.write_whole, path, fail)

    def stop(temporary: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_whole(path, stop)
    assert read_tree(tmp_path) == {"file": b"older"}


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    """Of this file or folder at its next writing."""
    for name in (".tmp-a", ".tmp-b/deep/file"):
        put(tmp_path / name, b"")
    files.write_text(tmp_path / "a", "new")
    files.write_whole(tmp_path / "b", Path.mkdir)
    assert set(read_tree(tmp_path)) == {"a"} and not list((tmp_path / "b").iterdir())


def test_folder_in_use_is_refused(tmp_path):
    """The lock goes with the process, and leaves no file."""
    code = "import sys; from pathlib import Path; from prefcls_lib.runtime.files import lock_folder; "
    code += "lock_folder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert refused(files.lock_folder, tmp_path / "run").startswith(f"{tmp_path / 'run'}: in use by another process. ")
    holder.communicate()
    os.close(files.lock_folder(tmp_path / "run"))
    assert read_tree(tmp_path) == {}


def test_values_in_messages_are_short_and_harmless(refuse):
    """80 characters of any value, also of one whose text would be huge; no control character reaches the terminal."""
    bomb: list = ["x" * 1000] * 1000
    for _ in range(9):
        bomb = [bomb] * 9
    for value in ("x" * 10**6, bomb, {"a": bomb}, b"y" * 1000, 10**4000):
        assert len(files.shown(value)) <= 80
    assert str(UserError("a\x1b[31m\udc80\tb\nc")) == "a\\x1b[31m\\udc80\\tb\nc"
    assert "\\ud800" in refuse(["predict", "--run", "x", "--test", "sample", "--out", "a\ud800"])


# how a finished run is broken, words that the message must have
BROKEN_RUNS = {
    "empty": (lambda run: shutil.rmtree(run) or run.mkdir(), ""),
    "gone": (shutil.rmtree, ""),
    "no config": (lambda run: (run / "config.json").unlink(), "config.json"),
    "no settings": (lambda run: (run / "config.json").write_text("{}"), "config.json: cannot be read (KeyError"),
    "a model is missing": (
        lambda run: shutil.rmtree(run / "model" / "fold1"),
        ": the run is not finished, fold1 is missing in model/. Run the same",
    ),
    "edited": (lambda run: edit_json(run / "model" / "fold0" / "preference.json", x=1), "is damaged or was changed"),
}
for one in ("preference.json", "head.safetensors", "model.safetensors", "config.json", "tokenizer.json"):
    BROKEN_RUNS[f"{one} cut"] = (lambda run, one=one: cut(run / "model" / "fold1" / one), "/model/fold1")
    BROKEN_RUNS[f"no {one}"] = (lambda run, one=one: (run / "model" / "fold1" / one).unlink(), "/model/fold1")


@pytest.mark.parametrize("case", BROKEN_RUNS)
def test_broken_run_does_not_predict(refuse, finished_run, home, tmp_path, case):
    """The message names the folder, and no submission appears."""
    damage, words = BROKEN_RUNS[case]
    run, submission = tmp_path / "run", tmp_path / "s.csv"
    shutil.copytree(finished_run, run)
    damage(run)
    message = refuse(["predict", "--run", str(run), "--test", str(home / "test.csv"), "--out", str(submission)])
    assert str(run) in message and words in message
    assert not submission.exists()


IDS = ["5", "6", "7"]
COLUMNS = ",".join(("id", *LABEL_COLUMNS))
THIRDS = ["5,0.2,0.3,0.5", "6,0.25,0.25,0.5", "7,0.6,0.3,0.1"]
# lines of the submission, words that the message must have
BAD_SUBMISSIONS = {
    "columns in another order": ([COLUMNS.replace("model_a", "x"), *THIRDS], "columns are id, winner_x"),
    "column missing": (["id,winner_model_a,winner_model_b", "5,0.5,0.5"], "expected id, winner_model_a, winner"),
    "column too many": ([COLUMNS + ",x", *(line + ",1" for line in THIRDS)], "columns are id,"),
    "no header": (THIRDS, "columns are 5, 0.2"),
    "row missing": ([COLUMNS, *THIRDS[:2]], "2 rows, but the test file has 3. Predict every test row once."),
    "row doubled": ([COLUMNS, *THIRDS, THIRDS[2]], "4 rows, but the test file has 3"),
    "other id": ([COLUMNS, *THIRDS[:2], "8,0.6,0.3,0.1"], "row 3 has id '8'; the test file has '7' there"),
    "other spelling of an id": ([COLUMNS, "05,0.2,0.3,0.5", *THIRDS[1:]], "row 1 has id '05'"),
    "other order": ([COLUMNS, THIRDS[1], THIRDS[0], THIRDS[2]], "row 1 has id '6'; the test file has '5' there. Keep"),
    "empty cell": ([COLUMNS, THIRDS[0], "6,,0.5,0.5", THIRDS[2]], "row 2 (id 6): [nan, 0.5, 0.5] are not"),
    "cut off": ([COLUMNS, *THIRDS[:2], "7,0.6"], "row 3 (id 7): [0.6, nan, nan] are not"),
    "NaN": ([COLUMNS, "5,nan,0.5,0.5", *THIRDS[1:]], "row 1 (id 5): [nan, 0.5, 0.5] are not"),
    "infinite": ([COLUMNS, "5,inf,0.5,0.5", *THIRDS[1:]], "row 1 (id 5): [inf, 0.5, 0.5] are not"),
    "zero and one": ([COLUMNS, "5,0,0,1", "6,0,1,0", THIRDS[2]], "row 1 (id 5): [0.0, 0.0, 1.0] are not three"),
    "negative": ([COLUMNS, "5,-0.1,0.6,0.5", *THIRDS[1:]], "row 1 (id 5): [-0.1, 0.6, 0.5]"),
    "sum over one": ([COLUMNS, *THIRDS[:2], "7,0.6,0.3,0.10001"], "row 3 (id 7): [0.6, 0.3, 0.10001] are not"),
    "text": ([COLUMNS, "5,high,0.5,0.5", *THIRDS[1:]], "a probability is not a number"),
    "empty": ([], "the file holds no rows"),
}


@pytest.mark.parametrize("case", BAD_SUBMISSIONS)
def test_bad_submission_is_refused(tmp_path, case):
    """The first row that is wrong, with its id."""
    lines, words = BAD_SUBMISSIONS[case]
    path = put(tmp_path / "submission.csv", "".join(line + "\n" for line in lines).encode())
    message = refused(check_submission, path, IDS)
    assert message.startswith(f"{path}: ") and words in message


def test_command_checks_a_submission(refuse, write_csv, tmp_path, capsys):
    """Sums may be off by less than 1e-6; what is no file is named."""
    arguments = ["--test", str(write_csv("ids.csv", [make_row(0, id=row_id) for row_id in IDS]))]
    path = put(tmp_path / "submission.csv", "\n".join([COLUMNS, *THIRDS[:2], "7,0.6,0.3,0.1000005"]).encode())
    assert cli.main(["check-submission", str(path), *arguments]) == 0
    assert capsys.readouterr().out == f"{path}: a valid submission for 3 test rows\n"
    for path in (tmp_path / "none.csv", tmp_path):
        assert f"{path}: " in refuse(["check-submission", str(path), *arguments])


@pytest.mark.parametrize("bad", [[np.nan, 0.5, 0.5], [np.inf, 0.1, 0.1], [-0.5, 0.75, 0.75], [0.4, 0.4, 0.4]])
def test_probabilities_that_are_none_never_become_a_submission(tmp_path, bad):
    """The older file stays, and no temporary one is left."""
    path = tmp_path / "submission.csv"
    path.write_bytes(b"older")
    with pytest.raises(UserError, match=r"id 2 is .* not three probabilities \(1 such rows\)"):
        write_submission(path, ["1", "2"], np.array([[0.2, 0.3, 0.5], bad]))
    assert read_tree(tmp_path) == {"submission.csv": b"older"}


@pytest.mark.parametrize("row_id", ["NA", "007", "1e5", "a,b", 'say "x"', "null"])
def test_odd_ids_come_through_unchanged(tmp_path, row_id):
    """An id is text in the test file, in the submission and when it is read back; certain rows stay in (0, 1)."""
    path = tmp_path / "submission.csv"
    write_submission(path, [row_id, "2"], np.array([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]))
    with path.open(encoding="utf-8", newline="") as file:
        _, first, _ = csv.reader(file)
    assert first[0] == row_id
    assert all(0 < float(cell) < 1 for cell in first[1:])


def test_reading_the_sample_names_no_place(refuse, tmp_path):
    """`competition` outside Kaggle: the places that were tried, and what to name instead."""
    message = refuse(["run", "--test", "sample", "--out", str(tmp_path / "run")])
    assert "the competition's train.csv was not found. Tried:" in message
    assert "elsewhere name a CSV file, or sample for the shipped rows" in message
    assert loading.sample_path("train").is_file()
    assert read_tree(tmp_path) == {}
