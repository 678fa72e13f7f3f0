"""What a user can get wrong: one message that says where and what to do, exit code 2, and nothing half-written."""

import csv
import errno
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import KINDS, make_row, read_tree, run_arguments
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from prefcls_lib import cli
from prefcls_lib.data import loading
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.data.submission import write_submission
from prefcls_lib.models import saved
from prefcls_lib.runtime.files import UserError

TRAIN_ROWS = [make_row(number, number % 3) for number in range(12)]
TEST_ROWS = [make_row(100 + number) for number in range(3)]
SHORT = ("folds=[0]", "num_folds=2", "max_train_rows=20")


@pytest.fixture
def refuse(capsys):
    """refuse(arguments) -> the one message with which the command line refuses them."""

    def run(arguments: list[str]) -> str:
        capsys.readouterr()
        assert cli.main(arguments) == 2
        written = capsys.readouterr().err
        assert written.count("prefcls: ") == 1
        assert "Traceback" not in written
        return written[written.index("prefcls: ") :]

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


def changed(number: int, **cells: object) -> list[dict]:
    """The good training rows with other cells in row `number` (1 = first)."""
    rows = [dict(row) for row in TRAIN_ROWS]
    rows[number - 1] |= cells
    return rows


# cells of row 3, words that the message must have
BAD_CELLS = [
    ({"prompt": "hello"}, "row 3, column 'prompt': not a JSON list of texts: 'hello'"),
    ({"prompt": ""}, "row 3, column 'prompt': not a JSON list"),
    ({"response_a": '"text"'}, "row 3, column 'response_a': not a JSON list"),
    ({"response_b": '{"a": 1}'}, "row 3, column 'response_b': not a JSON list"),
    ({"response_b": '["cut off'}, "row 3, column 'response_b': not a JSON list"),
    ({"response_b": "[" * 100_000}, "row 3, column 'response_b': not a JSON list"),
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
    ({"id": "1000"}, "id 1000 is in rows 1 and 3, column 'id'"),
    ({"id": " "}, "row 3, column 'id': empty"),
]


@pytest.mark.parametrize(("cells", "words"), BAD_CELLS)
def test_bad_cell_is_named_by_file_row_and_column(refuse_run, write_csv, cells, words):
    """Row 1 is the first row under the header."""
    path = write_csv("train.csv", changed(3, **cells))
    message = refuse_run(train=path)
    assert f"{path}: {words}" in message
    assert len(message) < 1000


def test_missing_file_is_named(refuse_run, tmp_path):
    """Training and test file alike, with what to do."""
    path = tmp_path / "none.csv"
    for message in (refuse_run(train=path), refuse_run(test=path)):
        assert message == f"prefcls: {path}: no such file. Check the path, or name the shipped rows: sample.\n"


@pytest.mark.parametrize("missing", ["id", "prompt", "response_a", "response_b", "winner_tie"])
def test_missing_column_is_named(refuse_run, write_csv, missing):
    """With the columns that were found and those that are needed."""
    path = write_csv("train.csv", [{k: v for k, v in row.items() if k != missing} for row in TRAIN_ROWS])
    message = refuse_run(train=path)
    assert f"{path}: column '{missing}' is missing. Columns found:" in message
    assert "Needed: id, prompt, response_a, response_b, winner_model_a, winner_model_b, winner_tie" in message


def test_doubled_column_is_named(refuse_run, write_csv):
    """Two columns of one name: nobody knows which is meant."""
    path = write_csv("train.csv", TRAIN_ROWS)
    path.write_text(path.read_text(encoding="utf-8").replace("response_b", "prompt", 1), encoding="utf-8")
    assert f"{path}: column 'prompt' is there more than once" in refuse_run(train=path)


def test_empty_cells_where_the_test_file_has_no_answer_column(refuse_run, write_csv):
    """A test file needs no winner columns, but all texts."""
    path = write_csv("test.csv", [{k: v for k, v in row.items() if k != "response_b"} for row in TEST_ROWS])
    message = refuse_run(test=path)
    assert f"{path}: column 'response_b' is missing" in message
    assert "winner" not in message


GOOD = "id,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\r\n"
ROW = '7,"[""p""]","[""a""]","[""b""]",1,0,0\r\n'
# name, bytes, words that the message must have
BAD_FILES = {
    "empty.csv": (b"", "the file holds no rows"),
    "header.csv": (GOOD.encode(), "the file holds no rows"),
    "blank.csv": (b"\r\n\r\n", "the file holds no rows"),
    "cut_in_text.csv": ((GOOD + ROW + '8,"[""p""]","[""a').encode(), "row 2 (line 3) is broken"),
    "cut_between.csv": ((GOOD + ROW + '8,"[""p""]","[""a""]"').encode(), "row 2 (line 3) has 3 of 7 columns"),
    "cut_in_labels.csv": ((GOOD + ROW + ROW[:-5].replace("7", "8")).encode(), "row 2 (line 3) has 6 of 7 col"),
    "too_many.csv": ((GOOD + ROW + ROW.replace(",1,0,0", ",1,0,0,0")).encode(), "row 2 (line 3) has 8 of 7"),
    "latin1.csv": ((GOOD + ROW.replace("p", "caf\u00e9")).encode("latin-1"), "not UTF-8 text at byte 83"),
    "utf16.csv": ((GOOD + ROW).encode("utf-16"), "not UTF-8 text at byte 0. Save the file as UTF-8"),
    "utf16_without_mark.csv": ((GOOD + ROW).encode("utf-16-le"), "not UTF-8 text: it holds zero bytes"),
    "false.csv.gz": ((GOOD + ROW).encode(), "cannot be read (Not a gzipped file"),
    "cut.csv.gz": (gzip.compress((GOOD + ROW * 50).encode())[:-30], "cannot be read (Compressed file ended"),
    "broken.csv.gz": (gzip.compress(GOOD.encode())[:12] + b"\xff" * 30, "cannot be read ("),
    "cut_inside.csv.gz": (gzip.compress((GOOD + ROW + '8,"[""p""').encode()), "row 2 (line 3) is broken"),
    "empty.csv.gz": (b"", "the file holds no rows"),
    "zipped.csv": (gzip.compress((GOOD + ROW).encode()), "not UTF-8 text at byte 1"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named_with_row_and_line(refuse_run, tmp_path, name):
    """Cut off, of another encoding, or not what its name says; as training and as test file."""
    content, words = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    for message in (refuse_run(train=path), refuse_run(test=path)):
        assert f"{path}: {words}" in message


def test_folder_in_place_of_a_file_is_refused(refuse_run, tmp_path):
    """Also one whose name ends like a file's."""
    folder = tmp_path / "train.csv"
    folder.mkdir()
    assert f"{folder}: is a folder. Name the CSV file in it." in refuse_run(train=folder)


def test_one_class_only_is_refused(refuse_run, write_csv):
    """No ties at all, two rows only, and all ties under one prompt, so that some model would train without any."""
    rows = [make_row(number, number % 2) for number in range(12)]
    path = write_csv("train.csv", rows)
    assert f"{path}: no row has winner_tie=1" in refuse_run(train=path)
    two = write_csv("two.csv", [make_row(0, 0), make_row(1, 2)])
    assert f"{two}: no row has winner_model_b=1" in refuse_run(train=two)
    rows += [make_row(20 + number, 2, prompt='["the same"]') for number in range(4)]
    message = refuse_run(train=write_csv("train.csv", rows))
    assert f"{path}: all 4 rows with winner_tie=1 have the same prompt or fall into one fold" in message


def test_too_few_rows_for_the_folds_are_refused(refuse_run, write_csv):
    """12 rows, 4 of each class, 5 folds: the numbers and both ways out are in the message."""
    path = write_csv("few.csv", TRAIN_ROWS)
    message = refuse_run("num_folds=5", train=path)
    assert f"{path}: " in message
    assert "too few for num_folds=5: 12 rows, 12 different prompts, 4 rows of the rarest class" in message
    assert "Give more rows or set num_folds lower" in message


def test_doubled_test_ids_are_refused(refuse_run, write_csv):
    """A submission needs one row an id."""
    path = write_csv("test.csv", [*TEST_ROWS, TEST_ROWS[1]])
    assert f"{path}: id 1101 is in rows 2 and 4, column 'id'" in refuse_run(test=path)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("learning_rate=nan", "setting learning_rate=nan: expected a number from 0 to 1"),
        ("dropout=.inf", "setting dropout=inf"),
        ("folds=[2]", "setting folds=[2]: give different whole numbers from 0 to 1 (num_folds=2)"),
        ("lerning_rate=1", "unknown setting 'lerning_rate'. Did you mean 'learning_rate'?"),
        ("learning_rate", "--set 'learning_rate': expected KEY=VALUE"),
        ("mixed_precision=fp16", "setting mixed_precision='fp16': needs a CUDA GPU. Use auto, bf16 or no."),
    ],
)
def test_bad_setting_is_named(refuse_run, setting, words, monkeypatch):
    """Before anything is written; fp16 is refused where there is no GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert words in refuse_run(setting)


def test_nan_in_a_settings_file_is_named(refuse, tmp_path):
    """The same from YAML."""
    path = tmp_path / "run.yaml"
    path.write_text("weight_decay: .nan\n", encoding="utf-8")
    assert "setting weight_decay=nan: expected a number from 0 to 1" in refuse(["run", "--config", str(path)])


@pytest.mark.parametrize("kind", KINDS)
def test_max_length_over_what_the_backbone_takes_is_refused(refuse_run, backbone_folders, kind):
    """RoBERTa's 66 positions hold 64 tokens; DeBERTa's are relative, so it gets past this check to the next."""
    folder = backbone_folders[kind]
    if kind == "deberta-v2":
        message = refuse_run(f"backbone={folder}", "max_length=65", "mixed_precision=fp16")
        assert "mixed_precision" in message
    else:
        message = refuse_run(f"backbone={folder}", "max_length=65")
        assert f"setting max_length=65: backbone '{folder}' takes at most 64 tokens" in message
        assert "mixed_precision" in refuse_run(f"backbone={folder}", "max_length=64", "mixed_precision=fp16")


def test_output_folder_that_cannot_be_written_is_refused(refuse, home, tmp_path):
    """A regular file stands where the folder should be, or above it; root meets this too."""
    file = tmp_path / "file"
    file.write_bytes(b"a file")
    for out in (file, file / "run", file / "deep" / "run"):
        message = refuse(run_arguments(home, out, *SHORT))
        assert f"{out}" in message
        assert ("is a file" if out == file else "cannot be written") in message
        assert "--out" in message
    assert read_tree(tmp_path) == {"file": b"a file"}


def test_prediction_that_cannot_be_written_is_refused(refuse, finished_run, home, tmp_path):
    """`predict --out` below a regular file, and onto a folder."""
    (tmp_path / "file").write_bytes(b"a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept.txt").write_bytes(b"kept")
    before = read_tree(tmp_path)
    for out in (tmp_path / "file" / "submission.csv", tmp_path / "folder"):
        arguments = ["predict", "--run", str(finished_run), "--test", str(home / "test.csv"), "--out", str(out)]
        assert f"{out}: cannot be written" in refuse(arguments)
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
    if hub:
        assert f"local hub cache {hub} (" in message
        assert f"\n  hub {hub} (" in message


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


# how the backbone folder is broken, words that the message must have; the encoder itself is loaded after the ladder
BROKEN_BACKBONES = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "weights cannot be loaded (Error no file named"),
    "weights cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-500]),
        "weights cannot be loaded (",
    ),
    "layer missing": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=3),
        "weights do not match the architecture in config.json; missing or of another shape: encoder.layer.2.",
    ),
    "other shape": (
        lambda f: edit_json(f / "config.json", intermediate_size=64),
        "missing or of another shape: encoder.layer.0.intermediate.dense.bias",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer could be loaded from"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "no tokenizer could be loaded from"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "unsupported type": (
        lambda f: edit_json(f / "config.json", model_type="gpt2"),
        "model type 'gpt2' is not supported. Supported: deberta-v2, roberta, electra, bert, modernbert",
    ),
    "small vocabulary": (lambda f: edit_json(f / "config.json", vocab_size=50), "but its encoder only 50"),
}


@pytest.mark.parametrize("case", BROKEN_BACKBONES)
def test_broken_backbone_folder_is_refused(refuse, home, out, tmp_path, case):
    """The message names the folder; the older submission stays, and no model is there."""
    damage, words = BROKEN_BACKBONES[case]
    folder = tmp_path / "backbone"
    shutil.copytree(home / "backbone", folder)
    damage(folder)
    message = refuse(run_arguments(home, out, *SHORT, f"backbone={folder}"))
    assert words in message
    assert str(folder) in message
    assert (out / "submission.csv").read_bytes() == b"older"
    assert {path.name for path in out.iterdir()} <= {"submission.csv", "notes.txt", "config.json"}


def test_other_settings_in_the_folder_of_a_run_are_refused_by_name(refuse, finished_run, home):
    """The name, the value then and the value now."""
    before = read_tree(finished_run)
    message = refuse(run_arguments(home, finished_run, "seed=7"))
    assert f"{finished_run}: holds a run with seed=42, this one has seed=7" in message
    message = refuse(run_arguments(home, finished_run, "head=concat"))
    assert "head='symmetric', this one has head='concat'" in message
    assert read_tree(finished_run) == before


@pytest.mark.parametrize("kind", ["train", "test"])
def test_other_data_in_the_folder_of_a_run_is_refused_by_name(refuse, finished_run, home, tmp_path, kind):
    """The same path does not help where the content has changed; a copy under another name does no harm."""
    before = read_tree(finished_run)
    path = tmp_path / "copy.csv"
    with (home / f"{kind}.csv").open(encoding="utf-8", newline="") as file:
        header, *records = csv.reader(file)
    arguments = run_arguments(home, finished_run)
    arguments[arguments.index(f"--{kind}") + 1] = str(path)
    shutil.copy(home / f"{kind}.csv", path)
    assert cli.main(arguments) == 0
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *records[:-1]])
    message = refuse(arguments)
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


# What a full disk looks like, and the file in whose middle it fills up.


def full_submission(patch) -> None:
    plain = pd.DataFrame.to_csv

    def to_csv(self, path, *args, **kwargs):
        if "submission.csv" in str(path):
            Path(path).write_text("id,winner_mod", encoding="utf-8")
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(self, path, *args, **kwargs)

    patch.setattr(pd.DataFrame, "to_csv", to_csv)


def full_head(patch) -> None:
    def save_file(tensors, path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise SafetensorError('Error while serializing: I/O error: Os { message: "No space left on device" }')

    patch.setattr(saved, "save_file", save_file)


def full_encoder(patch) -> None:
    def save_pretrained(self, folder, *args, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise SafetensorError('Error while serializing: I/O error: Os { message: "No space left on device" }')

    patch.setattr("transformers.PreTrainedModel.save_pretrained", save_pretrained)


def full_tokenizer(patch) -> None:
    def save_pretrained(self, folder, *args, **kwargs):
        (Path(folder) / "tokenizer.json").write_bytes(b"half")
        raise Exception("No space left on device (os error 28)")  # what tokenizers raises

    patch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_pretrained)


def full_text(name: str):
    plain = Path.write_text

    def write_text(self, text, *args, **kwargs):
        if name in self.name:
            plain(self, text[: len(text) // 2], *args, **kwargs)
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(self, text, *args, **kwargs)

    return lambda patch: patch.setattr(Path, "write_text", write_text)


# the file in whose middle the disk fills up: how, whether the older submission was rightly replaced before
FULL_DISKS = {
    "submission": (full_submission, False),
    "head": (full_head, False),
    "encoder": (full_encoder, False),
    "tokenizer": (full_tokenizer, False),
    "preference.json": (full_text("preference.json"), False),
    "fold.json": (full_text("fold.json"), False),
    "config.json": (full_text("config.json"), False),
    "result.json": (full_text("result.json"), True),
}


@pytest.mark.parametrize("case", FULL_DISKS)
def test_full_disk_leaves_nothing_half_written(refuse, home, out, monkeypatch, case):
    """One message; no temporary file, no half model, the older submission; with free space again the run resumes."""
    fill, replaced = FULL_DISKS[case]
    arguments = run_arguments(home, out, *SHORT)
    with monkeypatch.context() as patch:
        fill(patch)
        message = refuse(arguments)
    assert "No space left on device" in message
    assert "cannot be written" in message
    tree = read_tree(out)
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    assert "result.json" not in tree
    assert tree["notes.txt"] == b"foreign"
    assert (tree["submission.csv"] == b"older") == (not replaced)
    if case in ("head", "encoder", "tokenizer", "preference.json", "fold.json"):
        assert not [name for name in tree if name.startswith("model/")]
    assert cli.main(arguments) == 0
    assert cli.main(["check-submission", str(out / "submission.csv"), "--test", str(home / "test.csv")]) == 0


def test_run_folder_without_a_model_is_refused(refuse, home, tmp_path):
    """A folder that is none, and one where no run was."""
    for run in (tmp_path, tmp_path / "none"):
        arguments = ["predict", "--run", str(run), "--test", str(home / "test.csv"), "--out", str(tmp_path / "s.csv")]
        assert f"{run}" in refuse(arguments)
    assert read_tree(tmp_path) == {}


def test_unfinished_run_does_not_predict(refuse, finished_run, home, tmp_path):
    """With one of its two folds it would be another model, and nobody would know."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "model" / "fold1")
    arguments = ["predict", "--run", str(run), "--test", str(home / "test.csv"), "--out", str(tmp_path / "s.csv")]
    assert f"{run}: the run is not finished, fold1 is missing in model/. Run the same command" in refuse(arguments)
    assert not (tmp_path / "s.csv").exists()


@pytest.mark.parametrize(
    "file", ["preference.json", "head.safetensors", "model.safetensors", "config.json", "tokenizer.json"]
)
def test_broken_saved_model_is_refused(refuse, finished_run, home, tmp_path, file):
    """Missing or cut off: the message names the folder of the fold, and no submission appears."""
    run, submission = tmp_path / "run", tmp_path / "s.csv"
    shutil.copytree(finished_run, run)
    path = run / "model" / "fold1" / file
    arguments = ["predict", "--run", str(run), "--test", str(home / "test.csv"), "--out", str(submission)]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(run / "model" / "fold1") in refuse(arguments)
    path.unlink()
    assert str(run / "model" / "fold1") in refuse(arguments)
    assert not submission.exists()


def test_model_of_other_structure_features_is_refused(refuse, finished_run, home, tmp_path):
    """A model saved by another version never gets numbers that mean something else."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    path = run / "model" / "fold0" / "preference.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["feature_scaler"]["names"][0] = "diff_other"
    path.write_text(json.dumps(state), encoding="utf-8")
    arguments = ["predict", "--run", str(run), "--test", str(home / "test.csv"), "--out", str(tmp_path / "s.csv")]
    assert "structure features are not those of this version" in refuse(arguments)


IDS = ["5", "6", "7"]
HEADER = ",".join(("id", *LABEL_COLUMNS))
THIRDS = ["5,0.2,0.3,0.5", "6,0.25,0.25,0.5", "7,0.6,0.3,0.1"]
# lines of the submission, words that the message must have
BAD_SUBMISSIONS = {
    "columns in another order": ([HEADER.replace("model_a", "x"), *THIRDS], "columns are id, winner_x"),
    "column missing": (["id,winner_model_a,winner_model_b", "5,0.5,0.5"], "expected id, winner_model_a, winner"),
    "column too many": ([HEADER + ",x", *(line + ",1" for line in THIRDS)], "columns are id,"),
    "no header": (THIRDS, "columns are 5, 0.2"),
    "row missing": ([HEADER, *THIRDS[:2]], "2 rows, but the test file has 3. Predict every test row once."),
    "row doubled": ([HEADER, *THIRDS, THIRDS[2]], "4 rows, but the test file has 3"),
    "other id": ([HEADER, *THIRDS[:2], "8,0.6,0.3,0.1"], "row 3 has id 8; the test file has 7 there"),
    "other spelling of an id": ([HEADER, "05,0.2,0.3,0.5", *THIRDS[1:]], "row 1 has id 05"),
    "other order": ([HEADER, THIRDS[1], THIRDS[0], THIRDS[2]], "row 1 has id 6; the test file has 5 there. Keep"),
    "empty cell": ([HEADER, THIRDS[0], "6,,0.5,0.5", THIRDS[2]], "row 2 (id 6): [nan, 0.5, 0.5] are not"),
    "cut off": ([HEADER, *THIRDS[:2], "7,0.6"], "row 3 (id 7): [0.6, nan, nan] are not"),
    "NaN": ([HEADER, "5,nan,0.5,0.5", *THIRDS[1:]], "row 1 (id 5): [nan, 0.5, 0.5] are not"),
    "infinite": ([HEADER, "5,inf,0.5,0.5", *THIRDS[1:]], "row 1 (id 5): [inf, 0.5, 0.5] are not"),
    "zero and one": ([HEADER, "5,0,0,1", "6,0,1,0", THIRDS[2]], "row 1 (id 5): [0.0, 0.0, 1.0] are not three"),
    "negative": ([HEADER, "5,-0.1,0.6,0.5", *THIRDS[1:]], "row 1 (id 5): [-0.1, 0.6, 0.5]"),
    "sum over one": ([HEADER, *THIRDS[:2], "7,0.6,0.3,0.10001"], "row 3 (id 7): [0.6, 0.3, 0.10001] are not"),
    "text": ([HEADER, "5,high,0.5,0.5", *THIRDS[1:]], "a probability is not a number"),
    "empty": ([], "cannot be read as CSV"),
}


@pytest.fixture
def ids_csv(write_csv) -> Path:
    return write_csv("ids.csv", [make_row(0, id=row_id) for row_id in IDS])


@pytest.mark.parametrize("case", BAD_SUBMISSIONS)
def test_bad_submission_is_refused(refuse, ids_csv, tmp_path, case):
    """check-submission names the first row that is wrong, with its id."""
    lines, words = BAD_SUBMISSIONS[case]
    path = tmp_path / "submission.csv"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    message = refuse(["check-submission", str(path), "--test", str(ids_csv)])
    assert f"{path}: {words}" in message or (str(path) in message and words in message)


def test_submission_that_is_no_file_is_refused(refuse, ids_csv, tmp_path):
    """Missing, a folder, and bytes that are no text."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("none.csv", "folder", "bytes.csv"):
        assert str(tmp_path / name) in refuse(["check-submission", str(tmp_path / name), "--test", str(ids_csv)])


def test_good_submission_is_accepted(ids_csv, tmp_path, capsys):
    """Sums may be off by less than 1e-6."""
    path = tmp_path / "submission.csv"
    path.write_text("\n".join([HEADER, *THIRDS[:2], "7,0.6,0.3,0.1000005"]), encoding="utf-8")
    assert cli.main(["check-submission", str(path), "--test", str(ids_csv)]) == 0
    assert capsys.readouterr().out == f"{path}: a valid submission for 3 test rows\n"


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


def test_interrupt_is_told_without_a_traceback(home, tmp_path, monkeypatch, capsys):
    """Ctrl-C: exit code 130, and how to go on."""

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(saved, "load_encoder", interrupt)
    assert cli.main(run_arguments(home, tmp_path / "run", *SHORT)) == 130
    assert "prefcls: interrupted. What was saved is kept" in capsys.readouterr().err


def test_reading_the_sample_names_no_place(refuse, tmp_path):
    """`competition` outside Kaggle: the places that were tried, and what to name instead."""
    message = refuse(["run", "--test", "sample", "--out", str(tmp_path / "run")])
    assert "the competition's train.csv was not found. Tried:" in message
    assert "elsewhere name a CSV file, or sample for the shipped rows" in message
    assert loading.sample_path("train").is_file()
    assert read_tree(tmp_path) == {}
