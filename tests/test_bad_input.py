"""What a user can get wrong: one message that says where and what to do, exit code 2, and nothing half-written."""

import gzip
import io
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
from test_cases import as_csv, put, zipped

from prefcls_lib import cli
from prefcls_lib.data import loading
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.data.submission import check_submission, write_submission
from prefcls_lib.pipeline.folder import read_table
from prefcls_lib.runtime import files
from prefcls_lib.runtime.files import UserError

SHORT = ("folds=[0]", "num_folds=2", "max_train_rows=20", "start_from=structure_logistic")


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
    put(tmp_path / "out" / "notes.txt", b"foreign")
    return put(tmp_path / "out" / "submission.csv", b"older").parent


@pytest.fixture
def refuse_run(refuse, home, out):
    """refuse_run(further arguments of a run) -> the message; the output folder is as it was before."""

    def run(*arguments: object) -> str:
        before = read_tree(out)
        message = refuse([*run_arguments(home, out, "num_folds=2"), *map(str, arguments)])
        assert read_tree(out) == before
        return message

    return run


def refused(read, *arguments) -> str:
    """The message of the UserError that it raises."""
    with pytest.raises(UserError) as error:
        read(*arguments)
    return str(error.value)


# --- files


def rows_with(**cells: object) -> bytes:
    """Three training rows, the last with these raw cells."""
    return as_csv([make_row(0, 0), make_row(1, 1), make_row(2, 2, **cells)])


def submission(*lines: str, header: str = ",".join(("id", *LABEL_COLUMNS))) -> bytes:
    return "".join(f"{line}\n" for line in (header, *lines)).encode()


GOOD = rows_with()
ONE, TWO, THREE = THIRDS = ("5,0.2,0.3,0.5", "6,0.25,0.25,0.5", "7,0.6,0.3,0.1")
IDS = [line[0] for line in THIRDS]
# training files: their bytes, words that the message must have
TRAIN = {
    "text.csv": (rows_with(prompt="hello"), "row 3, column 'prompt': not a JSON list of texts: 'hello'. Each cell"),
    "object.csv": (rows_with(response_b='{"a": 1}'), "row 3, column 'response_b': not a JSON list of texts: '{"),
    "deep.csv": (rows_with(response_b="[" * 100_000), "row 3, column 'response_b': not a JSON list"),
    "number.csv": (rows_with(response_a='["a", 1]'), "column 'response_a': not a JSON list of texts: '[\"a\", 1]'"),
    "control.csv": (rows_with(prompt="\x1b[2J\x07"), "not a JSON list of texts: '\\x1b[2J\\x07'"),
    "two.csv": (rows_with(winner_tie="2"), "row 3, columns winner_model_a, winner_model_b, winner_tie: ['0', '0', '2"),
    "no_label.csv": (rows_with(winner_model_a=""), "['', '0', '1']; exactly one must be 1 and the others 0 (rows l"),
    "no_winner.csv": (rows_with(winner_tie=0), "['0', '0', '0']; exactly one"),
    "two_winners.csv": (rows_with(winner_model_a=1), "['1', '0', '1']; exactly one"),
    "double_id.csv": (rows_with(id="1000"), "row 3, column 'id': '1000' is in rows 1 and 3. Give each row"),
    "no_id.csv": (rows_with(id=" "), "row 3, column 'id': ' ' is empty"),
    "empty.csv": (b"", "the file has no rows. Is it a complete CSV file in UTF-8? Download it again"),
    "header.csv": (GOOD.partition(b"\n")[0], "the file has no rows"),
    "cut_in_text.csv": (GOOD + b'8,"[""p""]","[""a', "EOF inside string starting at row 4"),
    "cut_between.csv": (GOOD + b'8,"[""p""]","[""a""]"', "row 4, column 'response_b': not a JSON list of texts: ''"),
    "cut_in_labels.csv": (GOOD[:-4], "['0', '0', '']; exactly one must be 1 and the others 0 (rows like this: 1). Is"),
    "surplus.csv": (GOOD.replace(b",1,0\r", b",1,0,0\r"), "Expected 7 fields in line 3, saw 8"),
    "no_tie.csv": (GOOD.replace(b"winner_tie", b"tie"), "column 'winner_tie' is missing. Columns found: id, prompt, r"),
    "doubled.csv": (GOOD.replace(b"response_b", b"prompt"), "there are 2 columns 'prompt'. Keep one of them"),
    "latin1.csv": (GOOD.replace(b"question", b"caf\xe9"), "cannot be read (UnicodeDecodeError: "),
    "utf16.csv": (GOOD.decode().encode("utf-16"), "is a file in UTF-16. Save it as CSV UTF-8"),
    "utf16le.csv": (GOOD.decode().encode("utf-16-le"), "is a file in UTF-16. Save it as CSV UTF-8"),
    "cut.csv.gz": (gzip.compress(GOOD * 50)[:-30], "cannot be read (EOFError: Compressed file ended"),
    "flipped_bit.csv.gz": (gzip.compress(GOOD)[:-8] + bytes(8), "cannot be read (CRC check failed"),
    "two.zip": (zipped(train_csv="x", test_csv="y"), "Multiple files found in ZIP file. Only one file per ZIP: ['tra"),
    "cut.zip": (zipped(train_csv=GOOD.decode())[:-30], "cannot be read (BadZipFile: File is not a zip file"),
    "rows.parquet": (b"PAR1\x15\x00\xff", "is a Parquet file. Save it as CSV; for a public arena data set use `pref"),
    "rows.csv.bz2": (b"BZh91AY\xff", "is an archive that is neither gzip nor zip. Unpack it"),
    "rows.jsonl": (b' {"id": "1"}\n{"id": "2"}', "is JSON. Save it as CSV, where each text is a JSON list like"),
    "login.csv": (b"<!DOCTYPE html>\n<html>", "is a web page. Sign in at the web site, and download"),
    "pointer.csv": (b"version https://git-lfs\nsize 1", "is a Git LFS pointer, not the file itself. Run: git lfs pull"),
    "semicolon.csv": (GOOD.replace(b",", b";"), "has semicolons between its columns. Save it with commas"),
    "tab.csv": (GOOD.replace(b",", b"\t"), "has tabs between its columns"),
}
# submissions for the test rows IDS, in the same way
SUBMISSIONS = {
    "other_columns.csv": (submission(*THIRDS, header="id,a,b,tie"), "columns are id, a, b, tie; expected id, winner"),
    "missing.csv": (submission(ONE, TWO), "2 rows, but the test file has 3. Predict each test row once."),
    "other_id.csv": (submission(ONE, TWO, "8,0.6,0.3,0.1"), "row 3 has id '8'; the test file has '7' there"),
    "spelling.csv": (submission("05,0.2,0.3,0.5", TWO, THREE), "row 1 has id '05'"),
    "order.csv": (submission(TWO, ONE, THREE), "row 1 has id '6'; the test file has '5' there. Keep the order"),
    "no_number.csv": (submission(ONE, "6,,0.5,0.5", THREE), "row 2: [nan, 0.5, 0.5] are not"),
    "cut_off.csv": (submission(ONE, TWO, "7,0.6"), "row 3: [0.6, nan, nan] are not"),
    "certain.csv": (submission("5,0,0,1", "6,0,1,0", THREE), "row 1: [0.0, 0.0, 1.0] are not three"),
    "negative.csv": (submission("5,-0.1,0.6,0.5", TWO, THREE), "row 1: [-0.1, 0.6, 0.5]"),
    "sum.csv": (submission(ONE, TWO, "7,0.6,0.3,0.10001"), "row 3: [0.6, 0.3, 0.10001] are not"),
    "word.csv": (submission("5,high,0.5,0.5", TWO, THREE), "(ValueError: could not convert string to float: 'high')."),
}


@pytest.mark.parametrize("name", [*TRAIN, *SUBMISSIONS])
def test_bad_file_is_named(tmp_path, name):
    """A bad cell by row (1 = first row under the header) and column; cut off, damaged, of another encoding or form."""
    content, words = (TRAIN | SUBMISSIONS)[name]
    reader = (check_submission, IDS) if name in SUBMISSIONS else (loading.read_rows, True)
    path = put(tmp_path / name, content)
    message = refused(reader[0], path, reader[1])
    assert message.startswith(f"{path}: ") and words in message and len(message) < 600


def test_path_that_is_no_file_is_named(refuse, tmp_path):
    """Missing, a folder, below a file, a name that no file can have; `competition` outside Kaggle."""
    put(tmp_path / "file", b"")
    for path, words in {
        tmp_path / "none.csv": "no such file. Check the path.",
        tmp_path: "cannot be read (Is a directory). Is it a complete",
        tmp_path / "file" / "train.csv": "cannot be read (Not a directory)",
        tmp_path / ("x" * 300): "cannot be read (File name too long)",
    }.items():
        assert f"{path}: {words}" in refused(loading.read_rows, path, True)
    message = refuse(["run", "--test", "sample", "--out", str(tmp_path / "run")])
    assert "the competition's train.csv was not found. Tried:" in message
    assert "elsewhere give --train FILE.csv, or --train sample for the shipped rows" in message


def test_damaged_files_are_refused_whatever_they_raise(tmp_path):
    """Any byte of a gzip or zip archive flipped: rows as they were, or one message."""
    rows = loading.read_csv(put(tmp_path / "good.csv", GOOD))
    for number, content in enumerate((gzip.compress(GOOD), zipped(train_csv=GOOD.decode()))):
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 0xFF
            try:
                found = loading.read_csv(put(tmp_path / f"{number}.csv", bytes(damaged)))
            except UserError as error:
                assert f"{number}.csv: " in str(error)
            else:
                assert found == rows


def test_command_refuses_bad_rows_before_it_writes(refuse_run, tmp_path):
    """Training file and test file alike."""
    path = put(tmp_path / "bad.csv", TRAIN["cut_between.csv"][0])
    for kind in ("--train", "--test"):
        assert f"{path}: row 4, column 'response_b': not a JSON list" in refuse_run(kind, path)


def test_command_checks_a_submission(prefcls, tmp_path):
    """Sums may be off by less than 1e-6; what is no file is named."""
    test = put(tmp_path / "ids.csv", as_csv([make_row(0, id=row_id) for row_id in IDS]))
    path = put(tmp_path / "submission.csv", submission(ONE, TWO, "7,0.6,0.3,0.1000005"))
    assert prefcls("check-submission", path, "--test", test)[:2] == (0, f"{path}: a valid submission for 3 test rows\n")
    code, _, error = prefcls("check-submission", tmp_path / "none.csv", "--test", test)
    assert code == 2 and f"{tmp_path / 'none.csv'}: " in error


@pytest.mark.parametrize("bad", [[np.nan, 0.5, 0.5], [np.inf, 0.1, 0.1], [-0.5, 0.75, 0.75], [0.4] * 3, [1.1, -0.1, 0]])
def test_probabilities_that_are_none_never_become_a_submission(tmp_path, bad):
    """The older file stays, and no temporary one is left."""
    path = put(tmp_path / "submission.csv", b"older")
    with pytest.raises(UserError, match=r"not written: row 2: .* not three probabilities .* \(rows like this: 1\)"):
        write_submission(path, ["1", "2"], np.array([[0.2, 0.3, 0.5], bad]))
    assert read_tree(tmp_path) == {"submission.csv": b"older"}


@pytest.mark.parametrize("row_id", ["NA", "nan", "null", "007", "1e5", "1.0", "9" * 23, " 5", "é", '5,"6"'])
def test_odd_ids_come_through_unchanged(tmp_path, row_id):
    """An id is text in the test file, the submission and a table that is read back; certain rows stay in (0, 1)."""
    ids = loading.read_rows(put(tmp_path / "test.csv", as_csv([make_row(0, id=row_id), make_row(2)])), False)["id"]
    path = tmp_path / "submission.csv"
    write_submission(path, list(ids), np.array([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]))
    assert list(ids) == list(check_submission(path, [row_id, "1002"])["id"]) == [row_id, "1002"]
    assert list(read_table(path)["id"]) == [row_id, "1002"]


# --- settings

# further arguments of a run, made in a folder; words that the message must have
SETTINGS = {
    "no value": (lambda _: ["--set", "learning_rate"], "'learning_rate': unknown argument. If it is a setting, write"),
    "no --set": (lambda _: ["--num-folds", "4"], "write --set num_folds=4. See `prefcls run --help`."),
    "fp16": (lambda _: ["--set", "mixed_precision=fp16"], "'fp16': needs a CUDA GPU. Use auto, bf16 or no."),
    "time": (lambda _: ["--set", "time_budget_hours=8:30"], "time_budget_hours='8:30': expected a number"),
    "deep": (lambda folder: ["--config", put(folder / "deep.yaml", b"folds: " + b"[" * 700)],
             "deep.yaml: cannot be read (RecursionError"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_bad_setting_is_named(refuse_run, tmp_path, monkeypatch, case):
    """Before anything is written; fp16 is refused where there is no GPU."""
    make, words = SETTINGS[case]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = refuse_run(*make(tmp_path))
    assert words in message and len(message) < 600


# --- folders


@pytest.mark.parametrize("setting", ["backbone=acme/no-such-model", "init_from=/no/such", "backbone=roberta-base"])
def test_unknown_backbone_lists_what_was_tried(refuse_run, tmp_path, monkeypatch, setting):
    """Folder, Kaggle inputs, hub cache, hub; and what to do."""
    name = setting.partition("=")[2]
    monkeypatch.setenv("PREFCLS_INPUT_ROOT", str(tmp_path / "input"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    message = refuse_run("--set", setting)
    assert f"pretrained model '{name}' was not found. Tried:\n  folder {name}\n" in message
    assert f"Kaggle input {tmp_path / 'input'}" in message
    assert "Set backbone (or init_from, if it named this model) to a folder with config.json, weights" in message
    hub = {"acme/no-such-model": "acme/no-such-model", "roberta-base": "FacebookAI/roberta-base"}.get(name)
    assert hub is None or (f"local hub cache {hub} (" in message and f"\n  hub {hub} (" in message)


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def configured(**values: object):
    return lambda folder: edit_json(folder / "config.json", **values)


FOREIGN_CODE = {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
# how the backbone folder is broken, words that the message must have
BROKEN_BACKBONES = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "weights cannot be loaded (Error no file named"),
    "weights cut off": (lambda f: cut(f / "model.safetensors"), "weights cannot be loaded ("),
    "layer missing": (configured(num_hidden_layers=3), "in config.json; missing or of another shape: encoder.layer.2."),
    "other shape": (configured(intermediate_size=64), "of another shape: encoder.layer.0.intermediate.dense.bias"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: cannot be read ("),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: cannot be read ("),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read ("),
    "unsupported": (configured(model_type="gpt2"), "type 'gpt2' is not supported. Supported: deberta-v2, roberta, el"),
    "unknown activation": (configured(hidden_act="x"), "weights cannot be loaded (KeyError"),
    "no length": (lambda f: edit_json(f / "tokenizer_config.json", model_max_length="x"), "tokenizer.json: cannot be"),
    "small vocabulary": (configured(vocab_size=50), "but the encoder only 50"),
    "no padding": (configured(pad_token_id=None), "config.json: pad_token_id is 'None', expected a whole number"),
    "foreign code": (configured(**FOREIGN_CODE), "config.json: cannot be read ("),
    "foreign code, init_from": (configured(**FOREIGN_CODE), "config.json: cannot be read ("),
}


@pytest.mark.parametrize("case", BROKEN_BACKBONES)
def test_broken_backbone_folder_is_refused(refuse_run, home, tmp_path, monkeypatch, case):
    """The message names the folder; foreign code does not run, though the standard input says yes."""
    damage, words = BROKEN_BACKBONES[case]
    folder = tmp_path / "backbone"
    shutil.copytree(home / "backbone", folder)
    put(folder / "code.py", f"import pathlib\npathlib.Path({str(folder / 'CODE_RAN')!r}).touch()\n".encode())
    damage(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    message = refuse_run("--set", f"{'init_from' if 'init_from' in case else 'backbone'}={folder}")
    assert words in message and str(folder) in message and not (folder / "CODE_RAN").exists()


# how a finished run is broken, words that the message must have
BROKEN_RUNS = {
    "gone": (shutil.rmtree, ""),
    "no config": (lambda run: (run / "config.json").unlink(), "config.json"),
    "no settings": (lambda run: (run / "config.json").write_text("{}"), "config.json: cannot be read (KeyError"),
    "no model": (lambda run: shutil.rmtree(run / "model" / "fold1"), "not finished, fold1 is missing in model/. Run"),
    "edited": (lambda run: edit_json(run / "model" / "fold0" / "preference.json", x=1), "missing, damaged or changed"),
    "no baseline": (lambda run: shutil.rmtree(run / "model" / "fold0" / "baseline"), "/model/fold0"),
    "text": (lambda run: (shutil.rmtree(run), run.write_text("# text")), ": `prefcls blend` did not write this. Na"),
    "no blend": (lambda run: (shutil.rmtree(run), run.write_text('{"a": 1}')), "did not write this. Name a blend.json"),
}
for one in ("preference.json", *(f"{name}.safetensors" for name in ("head", "model", "baseline/baseline"))):
    BROKEN_RUNS[f"{one} cut"] = (lambda run, one=one: cut(run / "model" / "fold1" / one), "/model/fold1")
    BROKEN_RUNS[f"no {one}"] = (lambda run, one=one: (run / "model" / "fold1" / one).unlink(), "/model/fold1")


@pytest.mark.parametrize("case", BROKEN_RUNS)
def test_broken_run_does_not_predict(refuse, finished_run, home, out, tmp_path, case):
    """The message names the folder, and an older submission stays as it was."""
    damage, words = BROKEN_RUNS[case]
    run, before = tmp_path / "run", read_tree(out)
    shutil.copytree(finished_run, run)
    damage(run)
    test = str(home / "test.csv")
    message = refuse(["predict", "--run", str(run), "--test", test, "--out", str(out / "submission.csv")])
    assert str(run) in message and words in message and read_tree(out) == before


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


@pytest.mark.parametrize("name", ["config.json", "README.md", "oof.csv", "checkpoint/mine"])
def test_foreign_files_in_the_output_folder_are_refused(refuse_run, out, name):
    """What no run wrote is never overwritten, and not deleted."""
    for content in (b"{", b"[]", b'{"a": 1}'):
        put(out / name, content)
        assert f"{out}" in (message := refuse_run()) and name.partition("/")[0] in message
        assert (out / name).read_bytes() == content


def test_place_that_cannot_be_written_is_refused(refuse, finished_run, home, tmp_path):
    """A regular file stands where the folder should be, or above it, or a folder where the file; so for root."""
    file, folder = put(tmp_path / "file", b"a file"), put(tmp_path / "folder" / "kept.txt", b"kept").parent
    before = read_tree(tmp_path)
    for out in (file, file / "run", file / "deep" / "run"):
        message = refuse(run_arguments(home, out, *SHORT))
        assert str(out) in message and "--out" in message and "cannot be written (" in message
    os.mkfifo(tmp_path / "pipe")  # as /dev/null, which root could replace
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    loop = tmp_path / "loop" / "s.csv"
    for out in (file / "submission.csv", folder, tmp_path / "pipe", loop, tmp_path / ("x" * 300)):
        arguments = ["predict", "--run", str(finished_run), "--test", str(home / "test.csv"), "--out", str(out)]
        message = refuse(arguments)
        assert str(out) in message and ("cannot be written (" in message or "name too long" in message)
    assert read_tree(tmp_path) == before


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
        assert tree["notes.txt"] == b"foreign" and tree["submission.csv"]
    assert cli.main(arguments) == 0
    assert cli.main(["check-submission", str(out / "submission.csv"), "--test", str(home / "test.csv")]) == 0


def test_every_error_of_a_writer_is_one_message(tmp_path):
    """Libraries raise what they like on a full disk; the older file stays. Ctrl-C is no error."""
    path = put(tmp_path / "file", b"older")
    ends = (OSError(28, "No space left on device"), Exception("os error 28"), ValueError("x"), MemoryError())
    for error in (*ends, KeyboardInterrupt()):
        expected, words = (UserError, "file: cannot be written ") if error in ends else (KeyboardInterrupt, None)
        with pytest.raises(expected, match=words), files.write_whole(path) as temporary:
            temporary.write_bytes(b"half")
            raise error
    assert read_tree(tmp_path) == {"file": b"older"}


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    """Of this file or folder at its next writing."""
    for name in (".tmp-a", ".tmp-b/deep/file"):
        put(tmp_path / name, b"")
    files.write_text(tmp_path / "a", "new")
    with files.write_whole(tmp_path / "b") as temporary:
        temporary.mkdir()
    assert set(read_tree(tmp_path)) == {"a"} and not list((tmp_path / "b").iterdir())


def test_folder_in_use_is_refused(tmp_path):
    """The lock goes with the process, and leaves no file."""
    code = "import sys; from pathlib import Path; from prefcls_lib.runtime.files import lock_folder; "
    code += "lock_folder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
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
