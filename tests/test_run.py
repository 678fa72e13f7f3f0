"""The whole way through the command line: a run, a second start, predicting from what it left behind."""

import csv
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import TWO_FOLDS, predict, read_tree, run_arguments, run_small
from scipy.special import softmax
from sklearn.metrics import log_loss as sklearn_log_loss

from prefcls_lib import cli
from prefcls_lib.config import RunConfig
from prefcls_lib.data import loading, splits
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.models.saved import load_model
from prefcls_lib.pipeline import job, results
from prefcls_lib.pipeline.folder import read_config, read_probs, read_table
from prefcls_lib.runtime.files import UserError, read_json, sha256

PROMISED = (
    "log_loss", "accuracy", "baseline_log_loss", "encoder_share", "rows", "useful_token_share",
    "predict_useful_token_share", "tokens_per_second", "seconds", "seconds_before_training", "best_epoch", "backbone",
    "seed", "versions", "data_sha256",
)  # fmt: skip
VARIANTS = [("head=concat",), ("architecture=cross", "text_cleaning=ascii"),
            ("mixed_precision=bf16", "start_from=none")]  # fmt: skip


@pytest.fixture(scope="module")
def result(finished_run) -> dict:
    return read_json(finished_run / "result.json")


@pytest.fixture(scope="module")
def oof(finished_run) -> pd.DataFrame:
    return read_table(finished_run / "oof.csv")


def test_rows_and_folds_are_chosen_by_content_and_fold_seed(home, tmp_path):
    """50 of 60 rows: seeds 1 and 2 with fold_seed=5 have the rows and folds of seed 5, also of a reversed file."""
    with (home / "train.csv").open(encoding="utf-8", newline="") as file:
        header, *records = csv.reader(file)
    with (tmp_path / "reversed.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *records[::-1]])

    def read(train=home / "train.csv", **seeds) -> job.Job:
        places = {"train": str(train), "test": str(home / "test.csv"), "out": str(tmp_path)}
        return job.read_job(RunConfig(**places, num_folds=3, max_train_rows=50, **seeds))

    one, two, same, other = read(seed=1, fold_seed=5), read(seed=2, fold_seed=5), read(seed=5), read(seed=2)
    for found in (two, same):
        assert list(found.rows["id"]) == list(one.rows["id"]) and found.rows["fold"].equals(one.rows["fold"])
    assert list(other.rows["id"]) != list(one.rows["id"])
    assert list(read(tmp_path / "reversed.csv", seed=5).rows["id"])[::-1] == list(one.rows["id"])
    job.open_folder(same)
    with pytest.raises(UserError, match="holds a run with fold_seed=5, this one has fold_seed=1"):
        job.open_folder(replace(same, config=replace(same.config, fold_seed=1)))


def test_run_leaves_its_files_and_nothing_half_written(finished_run, result, home):
    """All tables, both models, all that is promised; the foreign file is still there, and no temporary one is."""
    tree = read_tree(finished_run)
    tables = {"history.csv", "oof.csv", "oof_baselines.csv", "submission.csv"}
    others = {"config.json", "result.json", "README.md", "notes.txt"}
    assert {name for name in tree if "/" not in name} == tables | others
    assert tree["notes.txt"] == b"not of this run"
    of_a_model = {"model.safetensors", "head.safetensors", "tokenizer.json", "preference.json", "fold.json",
                  "history.csv", "oof.csv", "test.csv", "baseline/baseline.safetensors"}  # fmt: skip
    assert {f"model/fold{fold}/{name}" for fold in range(2) for name in of_a_model} < set(tree)
    assert not [name for name in tree if ".tmp-" in name or name.startswith("checkpoint")]
    assert set(PROMISED) <= set(result) and {"torch", "transformers", "python"} <= set(result["versions"])
    assert (result["rows"], result["seed"], result["backbone"]) == (60, 42, str(home / "backbone"))
    assert result["data_sha256"] == {kind: sha256(home / f"{kind}.csv") for kind in ("train", "test")}
    assert all(0.5 < result[name] <= 1 for name in ("useful_token_share", "predict_useful_token_share"))
    assert result["tokens_per_second"] > 0 and result["best_epoch"] == 1
    assert result["seconds"] > result["seconds_before_training"] > 0


def test_reported_numbers_can_be_recomputed(result, oof, finished_run):
    """Those of network, baseline, encoder's share and the last line of a fold's history, from the tables."""
    baselines = read_table(finished_run / "oof_baselines.csv")
    start = baselines[baselines["model"] == "structure_logistic"]
    for table, name in ((oof, "log_loss"), (start, "baseline_log_loss")):
        labels, probs = table["label"], table[list(LABEL_COLUMNS)].to_numpy()
        assert result[name] == pytest.approx(sklearn_log_loss(labels, probs, labels=[0, 1, 2]), abs=1e-12)
    right = oof[list(LABEL_COLUMNS)].to_numpy().argmax(1) == oof["label"]
    assert result["accuracy"] == pytest.approx(right.mean())
    assert result["valid_rows"] == len(oof) == len(start)
    share = result["encoder_share"]
    assert share["difference"] == pytest.approx(result["log_loss"] - result["baseline_log_loss"])
    assert share["low"] <= share["difference"] <= share["high"]
    (line,) = [line for line in result["baselines"] if line["model"] == result["baseline"]]
    assert line["log_loss"] == pytest.approx(result["baseline_log_loss"])
    for fold, lines in read_table(finished_run / "history.csv").groupby("fold"):
        rows = oof[oof["fold"] == fold]
        loss = sklearn_log_loss(rows["label"], rows[list(LABEL_COLUMNS)].to_numpy(), labels=[0, 1, 2])
        assert lines["valid_log_loss"].iloc[-1] == pytest.approx(loss, abs=1e-12)


def test_out_of_sample_rows_are_those_of_the_fold_plan(oof, home):
    """Each row of folds 0 and 1 once, with its own label and the fold that the plan gives it."""
    rows = loading.read_rows(home / "train.csv", labelled=True)
    rows["fold"] = splits.assign_folds(rows, 3, seed=42)
    expected = rows[rows["fold"] < 2].set_index("id")[["fold", "label", "group"]]
    found = oof.set_index("id")[["fold", "label", "group"]]
    pd.testing.assert_frame_equal(found.sort_index(), expected.sort_index(), check_dtype=False, check_index_type=False)


def test_submission_is_the_mean_of_the_folds(finished_run, home, capsys):
    """Of what each fold's saved model predicts, and its test.csv holds; the ids are in order."""
    rows, kept = loading.read_rows(home / "test.csv", labelled=False), []
    for fold in range(2):
        folder = finished_run / "model" / f"fold{fold}"
        model = load_model(folder)
        kept.append(read_probs(folder / "test.csv"))
        np.testing.assert_array_equal(model.predict_proba(model.read_inputs(rows)), kept[-1])
    assert np.abs(kept[0] - kept[1]).max() > 1e-4
    file = finished_run / "submission.csv"
    np.testing.assert_allclose(read_probs(file), (kept[0] + kept[1]) / 2, atol=1e-12)
    assert read_table(file)["id"].tolist() == rows["id"].tolist()
    assert cli.main(["check-submission", str(file), "--test", str(home / "test.csv")]) == 0
    assert "a valid submission for 12 test rows" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["finished_run", "ladder_run"])
def test_swapping_the_columns_of_the_test_file_permutes_the_submission(kind, home, tmp_path, request):
    """Of a run to the bit, through CSV, tokens, structure features, both folds and the CSV of the submission."""
    run = request.getfixturevalue(kind)
    test = pd.read_csv(home / "test.csv", dtype=str)
    test.rename(columns={"response_a": "response_b", "response_b": "response_a"}).to_csv(tmp_path / "swapped.csv")
    swapped = predict(run, tmp_path / "swapped.csv", tmp_path / "submission.csv")
    probs = read_probs(run / "submission.csv")
    np.testing.assert_allclose(swapped, probs[:, [1, 0, 2]], rtol=0, atol=0 if kind == "finished_run" else 1e-9)
    assert (probs[:, 0] != probs[:, 1]).any()


@pytest.mark.parametrize(("kind", "command"), [("finished_run", "run"), ("ladder_run", "ladder")])
def test_complete_run_says_so_and_changes_nothing(kind, command, home, request, tmp_path, prefcls):
    """The same command again: exit code 0, every file with the same bytes and time. A notebook's baselines, fitted once
    more, do not take the submission's place."""
    run = request.getfixturevalue(kind)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    tree = read_tree(run)
    code, said, _ = prefcls(command, *run_arguments(home, run, *TWO_FOLDS)[1:])
    assert (code, "this run is complete" in said) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before and read_tree(run) == tree
    copy = shutil.copytree(run, tmp_path / "copy")
    job.fit_baselines(job.open_folder(job.read_job(replace(read_config(copy), out=str(copy)))))
    assert (copy / "submission.csv").read_bytes() == tree["submission.csv"]


def test_moved_run_predicts_the_same_bytes_and_needs_nothing_else(finished_run, home, tmp_path):
    """The run folder under another name, its backbone, data and former place out of reach."""
    expected = (finished_run / "submission.csv").read_bytes()
    moved, away = tmp_path / "elsewhere", home.with_name("away")
    shutil.copytree(finished_run, moved)
    hidden = finished_run.with_name("hidden")
    home.rename(away)
    finished_run.rename(hidden)
    try:
        predict(moved, away / "test.csv", tmp_path / "again.csv")
    finally:
        away.rename(home)
        hidden.rename(finished_run)
    assert (tmp_path / "again.csv").read_bytes() == expected


def test_interrupted_before_training_keeps_what_is_done(home, finished_run, tmp_path, monkeypatch):
    """First the submission of the labels' shares, then the baseline's. The resumed run takes folds, tokens, baselines
    from the checkpoint, and ends as one that nobody stopped, to the byte; another seed gives another end."""
    run, submission = tmp_path / "run", tmp_path / "run" / "submission.csv"

    def stop_at(place: str, code: int = 2, error: type[BaseException] = UserError) -> None:
        def stop(*_, **__):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(f"prefcls_lib.pipeline.{place}", stop)
            assert cli.main(run_arguments(home, run)) == code

    stop_at("job.fit_out_of_fold")
    shares = np.bincount(loading.read_rows(home / "train.csv", labelled=True)["label"]) / 60
    np.testing.assert_allclose(read_probs(submission), np.tile(shares, (12, 1)), atol=1e-12)
    stop_at("folds.build_model")
    offsets = np.load(run / "checkpoint" / "baseline-fold0" / "offsets.npy")[60:]
    np.testing.assert_allclose(read_probs(submission), softmax(offsets, axis=1), atol=1e-12)
    stop_at("folds.fit", 130, KeyboardInterrupt)
    assert not (run / "result.json").exists()
    with monkeypatch.context() as patch:
        for name in ("job.assign_folds", "job.encode_rows", "job.fit_out_of_fold"):
            patch.setattr(f"prefcls_lib.pipeline.{name}", None)
        run_small(home, run)
    run_small(home, tmp_path / "other", "seed=8", "fold_seed=42")
    resumed, same, other = (read_tree(one / "model" / "fold0") for one in (run, finished_run, tmp_path / "other"))
    assert resumed.keys() == same.keys() and not (run / "checkpoint").exists()
    for name in ("oof.csv", "test.csv", "model.safetensors", "head.safetensors"):
        assert resumed[name] == same[name] != other[name]
    name = "baseline/baseline.safetensors"
    assert resumed[name] == same[name] == other[name]


@pytest.mark.parametrize("settings", VARIANTS)
def test_variant_runs_and_predicts_the_same_from_disk(home, tmp_path, settings):
    """A variant is a parameter: it reaches the saved model, and `predict` needs not be told."""
    run = tmp_path / "run"
    result = run_small(home, run, *settings)
    predict(run, home / "test.csv", tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (run / "submission.csv").read_bytes()
    state = read_json(run / "model" / "fold0" / "preference.json")
    for name, value in (setting.split("=") for setting in settings):
        assert str(state["settings"][name]).lower() == value.lower()
    assert (run / "model" / "fold0" / "baseline").exists() == ("start_from=none" not in settings)
    assert (result["flip_rate"] == 0) == ("head=concat" not in settings)


def test_result_in_words():
    """The comparison with its numbers, encoders that add nothing, and what to try next."""
    counts = {"rows": 154, "groups": 153, "smallest_detectable": 0.013}
    better = {"difference": -0.0164, "low": -0.0255, "high": -0.0072, "p": 0.0004} | counts
    result = {"encoder_share": better, "baseline": "structure_tfidf", "baseline_log_loss": 1.08, "encoder_warnings": {},
              "log_loss": 1.0636, "calibrated_log_loss": 1.0616, "rows": 5_000,
              "seconds_before_training": 9.6, "seconds": 71.2}  # fmt: skip
    line = (
        "network BEATS structure_tfidf (1.0800): with the encoder, the log loss is 0.0164 lower (95 % CI -0.0255 to "
        "-0.0072, p<0.001) on 154 validation rows; a difference of 0.0130 would be found in 80 % of such samples"
    )
    spent = "10 of 71 seconds passed before training."
    ideas = "train a second seed (`num_seeds`), and blend with `prefcls ladder`; calibrate: `prefcls blend`"
    assert results.verdict(result) == f"{line}\n{spent}\nWhat to try next: {ideas}."
    warned = results.verdict(result | {"encoder_warnings": {"fold0": "why", "fold1": "why"}}).splitlines()
    assert warned[2:4] == [f"fold{n}: the encoder does not contribute: why" for n in (0, 1)]
    assert warned[4] == f"What to try next: train on more rows (`extra_train`; `max_train_rows` if set); {ideas}."
    for share, words in (({"p": 0.2}, "validate on more rows"), ({"difference": 0.01}, "stop earlier")):
        changed = result | {"encoder_share": better | share, "calibrated_log_loss": 1.0635, "rows": 4_999}
        last = results.verdict(changed).splitlines()[-1]
        assert f": train on more rows (`extra_train`; `max_train_rows` if set); {words}" in last
    ladder = {"encoder_share": None, "baseline": "prior", "log_loss": 1.1, "valid_rows": 9}
    assert results.verdict(ladder) == "prior: log loss 1.1000 on 9 validation rows"


def test_seconds_of_a_run_by_hand(monkeypatch):
    """This session 900 to 1000 s, its one fold too; two folds of an earlier one 100 to 300 and 150 to 350."""
    monkeypatch.setattr(results.time, "time", lambda: 1000.0)
    records = [{"seconds": 200.0, "finished_at": 300.0}, {"seconds": 200.0, "finished_at": 350.0},
               {"seconds": 60.0, "finished_at": 970.0}]  # fmt: skip
    assert results._total_seconds(type("Job", (), {"started_at": 900.0}), records) == 100 + 250 + 0
