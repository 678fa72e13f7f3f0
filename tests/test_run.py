"""The whole way through the command line: a run, a second start, predicting from what it left behind."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import read_tree, run_arguments
from sklearn.metrics import accuracy_score
from sklearn.metrics import log_loss as sklearn_log_loss

from prefcls_lib import cli
from prefcls_lib.config import RunConfig
from prefcls_lib.data import loading, splits
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.models import saved
from prefcls_lib.pipeline import job, steps
from prefcls_lib.pipeline.folder import RunFolder, read_table
from prefcls_lib.pipeline.predict import predict_run
from prefcls_lib.runtime.files import UserError, sha256, write_json

PROMISED = (
    "log_loss", "accuracy", "ladder_log_loss", "rows", "useful_token_share", "predict_useful_token_share",
    "tokens_per_second", "seconds", "best_epoch", "backbone", "seed", "versions", "data_sha256",
)  # fmt: skip
SHORT = ("folds=[0]", "max_train_rows=40")  # settings of the runs that need no second fold


@pytest.fixture(scope="module")
def result(finished_run) -> dict:
    return json.loads((finished_run / "result.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def oof(finished_run) -> pd.DataFrame:
    return read_table(finished_run / "oof.csv")


def read_probs(path: Path) -> np.ndarray:
    return read_table(path)[list(LABEL_COLUMNS)].to_numpy()


def predict(run: Path, test: Path, out: Path) -> Path:
    """`prefcls predict`, which must work."""
    assert cli.main(["predict", "--run", str(run), "--test", str(test), "--out", str(out)]) == 0
    return out


def test_runs_with_other_seeds_share_rows_and_folds(home, tmp_path):
    """Seeds 1 and 2 with fold_seed=5 have the rows and folds of seed 5; a folder without that setting is a run with its
    seed as fold_seed."""

    def read(**seeds) -> job.Job:
        files = {kind: str(home / f"{kind}.csv") for kind in ("train", "test")}
        return job.read_job(RunConfig(**files, out=str(tmp_path), num_folds=3, max_train_rows=50, **seeds))

    one, two, same, other = read(seed=1, fold_seed=5), read(seed=2, fold_seed=5), read(seed=5), read(seed=2)
    for found in (two, same):
        assert list(found.rows["id"]) == list(one.rows["id"]) and (found.folds == one.folds).all()
    assert list(other.rows["id"]) != list(one.rows["id"])
    settings = same.config.to_dict() | {"start_from": "none"}
    assert settings.pop("fold_seed") == 5
    write_json(tmp_path / "config.json", {"settings": settings, "data_sha256": same.data_sha256})
    same.folder.open(replace(same.config, start_from="none"), same.data_sha256)
    with pytest.raises(UserError, match="holds a run with fold_seed=5, this one has fold_seed=1"):
        same.folder.open(replace(same.config, fold_seed=1, start_from="none"), same.data_sha256)


def test_predict_does_not_overwrite_its_test_rows(finished_run, home, tmp_path, capsys):
    """The submission must go elsewhere; the rows are as they were."""
    rows = Path(shutil.copy(home / "test.csv", tmp_path / "new.csv"))
    assert cli.main(["predict", "--run", str(finished_run), "--test", str(rows), "--out", str(rows)]) == 2
    assert "would overwrite what is read from" in capsys.readouterr().err
    assert rows.read_bytes() == (home / "test.csv").read_bytes()


def test_run_leaves_its_files_and_nothing_half_written(finished_run):
    """All tables, both models; the foreign file is still there, and no temporary one is."""
    tree = read_tree(finished_run)
    expected = {
        "config.json",
        "result.json",
        "history.csv",
        "valid.csv",
        "oof.csv",
        "submission.csv",
        "notes.txt",
    }
    assert {name for name in tree if "/" not in name} >= expected
    assert tree["notes.txt"] == b"not of this run"
    for fold in range(2):
        for name in (
            "model.safetensors",
            "head.safetensors",
            "tokenizer.json",
            "preference.json",
            "fold.json",
        ):
            assert f"model/fold{fold}/{name}" in tree
    assert not [name for name in tree if name.endswith(".tmp")]


def test_result_holds_what_is_promised(result, home):
    """Every promised key; rows, seed, backbone, hashes as given, shares between 0 and 1."""
    assert set(PROMISED) <= set(result)
    assert (result["rows"], result["seed"], result["backbone"]) == (60, 42, str(home / "backbone"))
    assert result["data_sha256"] == {kind: sha256(home / f"{kind}.csv") for kind in ("train", "test")}
    assert 0.5 < result["useful_token_share"] <= 1
    assert 0.5 < result["predict_useful_token_share"] <= 1
    assert result["tokens_per_second"] > 0
    assert result["seconds"] > 0
    assert result["best_epoch"] == 1
    assert {"torch", "transformers", "python"} <= set(result["versions"])
    assert len(result["load_average"]) == 2 and all(load >= 0 for load in result["load_average"])


def test_reported_numbers_can_be_recomputed(result, oof):
    """log_loss and accuracy from oof.csv, with scikit-learn."""
    labels, probs = oof["label"], oof[list(LABEL_COLUMNS)].to_numpy()
    assert result["log_loss"] == pytest.approx(sklearn_log_loss(labels, probs, labels=[0, 1, 2]), abs=1e-12)
    assert result["accuracy"] == pytest.approx(accuracy_score(labels, probs.argmax(axis=1)), abs=1e-12)
    assert result["valid_rows"] == len(oof)


def test_out_of_sample_rows_are_those_of_the_fold_plan(oof, home):
    """Each row of folds 0 and 1 once, with its own label and the fold that the plan gives it."""
    rows = loading.read_rows(home / "train.csv", labelled=True)
    rows["fold"] = splits.assign_folds(rows, 3, seed=42)
    expected = rows[rows["fold"] < 2].set_index("id")[["fold", "label"]]
    found = oof.set_index("id")[["fold", "label"]]
    pd.testing.assert_frame_equal(found.sort_index(), expected.sort_index(), check_dtype=False, check_index_type=False)


def test_history_has_both_folds_and_unsmoothed_losses(home, tmp_path):
    """The last line of each fold is the log loss of that fold's rows in valid.csv, with label smoothing in training."""
    assert cli.main(run_arguments(home, tmp_path / "run", "label_smoothing=0.3")) == 0
    history, valid = read_table(tmp_path / "run" / "history.csv"), read_table(tmp_path / "run" / "valid.csv")
    assert history["fold"].unique().tolist() == [0, 1]
    for fold, lines in history.groupby("fold"):
        rows = valid[valid["fold"] == fold]
        loss = sklearn_log_loss(rows["label"], rows[list(LABEL_COLUMNS)].to_numpy(), labels=[0, 1, 2])
        assert lines["valid_log_loss"].iloc[-1] == pytest.approx(loss, abs=1e-12)


def test_submission_is_the_mean_of_the_folds(finished_run, home, tmp_path):
    """One fold's folder alone in a run folder predicts that fold; the mean of both is the submission."""
    alone = []
    for fold in range(2):
        run = tmp_path / f"only{fold}"
        shutil.copytree(finished_run, run)
        shutil.rmtree(run / "model" / f"fold{1 - fold}")
        config = json.loads((run / "config.json").read_text())
        config["settings"]["folds"] = [fold]
        (run / "config.json").write_text(json.dumps(config))
        rows = loading.read_rows(home / "test.csv", labelled=False)
        alone.append(predict_run(RunFolder(run), rows)[0])
    assert np.abs(alone[0] - alone[1]).max() > 1e-4
    np.testing.assert_allclose(read_probs(finished_run / "submission.csv"), (alone[0] + alone[1]) / 2, atol=1e-12)


def test_submission_has_the_test_files_ids_in_order(finished_run, home, capsys):
    """And check-submission accepts it."""
    with (home / "test.csv").open(encoding="utf-8", newline="") as file:
        ids = [record["id"] for record in csv.DictReader(file)]
    assert read_table(finished_run / "submission.csv")["id"].tolist() == ids
    assert cli.main(["check-submission", str(finished_run / "submission.csv"), "--test", str(home / "test.csv")]) == 0
    assert "a valid submission for 12 test rows" in capsys.readouterr().out


def test_saved_run_predicts_the_same_bytes(finished_run, home, tmp_path):
    """`predict` from the saved models is the run's own submission, byte for byte."""
    again = predict(finished_run, home / "test.csv", tmp_path / "again.csv")
    assert again.read_bytes() == (finished_run / "submission.csv").read_bytes()


def test_swapping_the_columns_of_the_test_file_permutes_the_submission(finished_run, home, tmp_path):
    """Exactly, through CSV, tokens, structure features, both folds and the CSV of the submission."""
    with (home / "test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with (tmp_path / "swapped.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**r, "response_a": r["response_b"], "response_b": r["response_a"]} for r in rows)
    swapped = read_probs(predict(finished_run, tmp_path / "swapped.csv", tmp_path / "submission.csv"))
    probs = read_probs(finished_run / "submission.csv")
    assert (swapped == probs[:, [1, 0, 2]]).all()
    assert (probs[:, 0] != probs[:, 1]).any()


def test_complete_run_says_so_and_changes_nothing(finished_run, home, capsys):
    """The same command again: exit code 0, every file with the same bytes and time."""
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    tree = read_tree(finished_run)
    assert cli.main(run_arguments(home, finished_run)) == 0
    assert "this run is complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before
    assert read_tree(finished_run) == tree


def test_interrupted_run_goes_on_where_it_stopped(finished_run, home, tmp_path, capsys):
    """The last fold and result.json are gone: fold 0 is kept, and the end is the same to the byte."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "model" / "fold1")
    (run / "result.json").unlink()
    kept = (run / "model" / "fold0" / "model.safetensors").stat().st_mtime_ns
    assert cli.main(run_arguments(home, run)) == 0
    assert "fold0: done before, kept" in capsys.readouterr().out
    assert (run / "model" / "fold0" / "model.safetensors").stat().st_mtime_ns == kept
    before, after = read_tree(finished_run), read_tree(run)
    assert before.keys() == after.keys()
    for name in ("submission.csv", "oof.csv", "valid.csv", "model/fold1/model.safetensors"):
        assert after[name] == before[name]


def test_same_seed_gives_the_same_run_in_another_folder(home, tmp_path):
    """Submission, predictions and weights to the byte; another seed gives others."""
    trees = {}
    for name, seed in (("one", 7), ("two", 7), ("three", 8)):
        assert cli.main(run_arguments(home, tmp_path / name, *SHORT, f"seed={seed}")) == 0
        trees[name] = read_tree(tmp_path / name)
    for file in (
        "submission.csv",
        "oof.csv",
        "model/fold0/model.safetensors",
        "model/fold0/head.safetensors",
    ):
        assert trees["one"][file] == trees["two"][file]
        assert trees["one"][file] != trees["three"][file]


def test_moved_run_needs_nothing_else(finished_run, home, tmp_path):
    """The run folder under another name, its backbone, data and former place out of reach: the same bytes."""
    expected = (finished_run / "submission.csv").read_bytes()
    moved, away = tmp_path / "elsewhere", home.with_name("away")
    shutil.copytree(finished_run, moved)
    hidden = finished_run.with_name("hidden")
    home.rename(away)
    finished_run.rename(hidden)
    try:
        again = predict(moved, away / "test.csv", tmp_path / "again.csv").read_bytes()
    finally:
        away.rename(home)
        hidden.rename(finished_run)
    assert again == expected


def break_the_encoder(*_args, **_kwargs):
    raise UserError("stopped where the encoder is loaded")


def test_a_submission_is_there_before_the_encoder_is_loaded(home, tmp_path, monkeypatch, capsys):
    """First the shares of the 60 training labels, then the best quick baseline's, whatever happens from then on."""
    run, test = tmp_path / "run", str(home / "test.csv")
    submission = run / "submission.csv"

    def look(*_, **__):
        shares = np.bincount(loading.read_rows(home / "train.csv", labelled=True)["label"]) / 60
        np.testing.assert_allclose(read_probs(submission), np.tile(shares, (12, 1)), atol=1e-12)
        raise UserError("stopped at the baselines")

    with monkeypatch.context() as patch:
        patch.setattr(steps, "cross_validate", look)
        assert cli.main(run_arguments(home, run)) == 2
    assert "stopped at the baselines" in capsys.readouterr().err
    submission.unlink()
    monkeypatch.setattr(saved, "load_encoder", break_the_encoder)
    assert cli.main(run_arguments(home, run)) == 2
    assert "stopped where the encoder is loaded" in capsys.readouterr().err
    assert len(np.unique(read_probs(submission)[:, 2])) > 1
    assert cli.main(["check-submission", str(submission), "--test", test]) == 0
    assert not (run / "result.json").exists()


def test_existing_submission_is_replaced_only_by_a_trained_one(home, tmp_path, monkeypatch):
    """An older one survives a run that stops; the same run, finished, replaces it."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "submission.csv").write_bytes(b"older")
    with monkeypatch.context() as patch:
        patch.setattr(saved, "load_encoder", break_the_encoder)
        assert cli.main(run_arguments(home, run, *SHORT)) == 2
    assert (run / "submission.csv").read_bytes() == b"older"
    assert cli.main(run_arguments(home, run, *SHORT)) == 0
    assert cli.main(["check-submission", str(run / "submission.csv"), "--test", str(home / "test.csv")]) == 0


def test_max_train_rows_are_taken_by_content(home, tmp_path):
    """40 of 60 rows; the same 40 from a file in reversed order."""
    with (home / "train.csv").open(encoding="utf-8", newline="") as file:
        header, *records = csv.reader(file)
    with (tmp_path / "reversed.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *records[::-1]])
    found = []
    for name, path in (("one", home / "train.csv"), ("two", tmp_path / "reversed.csv")):
        arguments = run_arguments(home, tmp_path / name, *SHORT)
        arguments[arguments.index("--train") + 1] = str(path)
        assert cli.main(arguments) == 0
        result = json.loads((tmp_path / name / "result.json").read_text(encoding="utf-8"))
        assert result["rows"] == 40
        found.append(read_table(tmp_path / name / "oof.csv").set_index("id")["label"].sort_index())
    pd.testing.assert_series_equal(*found)


@pytest.mark.parametrize(
    "setting",
    [
        "head=concat",
        "structure_features=false",
        "pooling=first",
        "text_cleaning=ascii",
        "mixed_precision=bf16",
    ],
)
def test_variant_runs_and_predicts_the_same_from_disk(home, tmp_path, setting):
    """A variant is a parameter: it reaches the saved model, and `predict` needs not be told."""
    run = tmp_path / "run"
    assert cli.main(run_arguments(home, run, *SHORT, setting)) == 0
    again = predict(run, home / "test.csv", tmp_path / "again.csv")
    assert again.read_bytes() == (run / "submission.csv").read_bytes()
    name, value = setting.split("=")
    state = json.loads((run / "model" / "fold0" / "preference.json").read_text(encoding="utf-8"))
    if name == "structure_features":
        assert state["feature_scaler"] is None
    else:
        assert str(state[name]) == value


def test_sample_is_named_not_located(finished_run, tmp_path):
    """`--test sample` are the competition's three rows."""
    submission = tmp_path / "s.csv"
    assert cli.main(["predict", "--run", str(finished_run), "--test", "sample", "--out", str(submission)]) == 0
    assert read_table(submission)["id"].tolist() == ["136060", "211333", "1233961"]
    assert cli.main(["check-submission", str(submission), "--test", "sample"]) == 0
