"""`prefcls ladder` and `prefcls blend`: the folds and files of any run, cross-fitted scores, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import read_tree
from sklearn.metrics import log_loss as sklearn_log_loss
from test_run import PROMISED

from prefcls_lib import cli
from prefcls_lib.data import loading
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.data.submission import check_submission
from prefcls_lib.evaluation.calibration import NUM_PARTS, Blend, fit_blend
from prefcls_lib.evaluation.compare import split_groups
from prefcls_lib.pipeline.folder import read_probs, read_table, write_table
from prefcls_lib.runtime.files import read_json, write_json


@pytest.fixture
def runs(finished_run, ladder_run, tmp_path) -> list[Path]:
    """Copies of both runs that a test may break."""
    return [shutil.copytree(run, tmp_path / name) for run, name in ((finished_run, "network"), (ladder_run, "ladder"))]


def blend(runs: list[Path], out: Path) -> int:
    return cli.main(["blend", "--runs", *map(str, runs), "--out", str(out)])


def probs_of(table: pd.DataFrame) -> np.ndarray:
    return table[list(LABEL_COLUMNS)].to_numpy()


def test_ladder_is_a_run_without_a_network(ladder_run, finished_run):
    """Its predictions and log loss are those of the baseline that the network starts from, on the same rows."""
    result, network = (read_json(run / "result.json") for run in (ladder_run, finished_run))
    at_top = [{name for name in read_tree(run) if "/" not in name} for run in (ladder_run, finished_run)]
    assert set(result) >= set(PROMISED) and at_top[0] == at_top[1] - {"notes.txt"}
    oof = read_table(ladder_run / "oof.csv")
    for column in ("id", "fold", "label", "group"):
        assert oof[column].equals(read_table(finished_run / "oof.csv")[column])
    assert result["log_loss"] == pytest.approx(sklearn_log_loss(oof["label"], probs_of(oof)), abs=1e-9)
    assert result["log_loss"] == result["baseline_log_loss"] == network["baseline_log_loss"]
    assert (result["backbone"], result["encoder_share"], result["tokens_per_second"]) == ("ladder", None, None)
    kept = dict(iter(read_table(ladder_run / "oof_baselines.csv").groupby("model", sort=False)))
    assert [line["model"] for line in result["baselines"]] == list(kept) and "prior" in kept
    for line, other in zip(result["baselines"], network["baselines"], strict=True):
        table = kept[line["model"]]
        assert set(table["id"]) == set(oof["id"])
        assert line["log_loss"] == pytest.approx(sklearn_log_loss(table["label"], probs_of(table)), abs=1e-9)
        assert line | {"seconds": 0} == other | {"seconds": 0}
    start = kept["structure_logistic"].set_index("id").loc[oof["id"]]
    np.testing.assert_allclose(probs_of(start), probs_of(oof), rtol=0, atol=1e-12)


def test_blend_numbers_can_be_computed_again(runs, tmp_path):
    """Each part of the prompts is blended by what was fitted on the others. A blend of one run is its calibration."""
    assert blend(runs[:1], tmp_path / "blend.json") == 0
    state, result = read_json(tmp_path / "blend.json"), read_json(runs[0] / "result.json")
    assert (state["weights"], state["log_loss"]) == ([1.0], pytest.approx(result["calibrated_log_loss"], abs=1e-9))
    assert blend(runs, tmp_path / "blend.json") == 0
    state = read_json(tmp_path / "blend.json")
    tables = [read_table(run / "oof.csv").set_index("id").sort_index() for run in runs]
    labels, parts = tables[0]["label"].to_numpy(), split_groups(tables[0]["group"].to_numpy(), NUM_PARTS, "calibration")
    predictions = [probs_of(table) for table in tables]
    nested = np.empty_like(predictions[0])
    for part in np.unique(parts):
        here = parts == part
        nested[here] = fit_blend(labels[~here], [p[~here] for p in predictions]).apply([p[here] for p in predictions])
    assert state["log_loss"] == pytest.approx(sklearn_log_loss(labels, nested), abs=1e-9)
    assert state["run_log_loss"] == pytest.approx([sklearn_log_loss(labels, p) for p in predictions], abs=1e-9)
    applied = Blend.from_dict(state).apply(predictions)
    assert state["log_loss_fitted_rows"] == pytest.approx(sklearn_log_loss(labels, applied), abs=1e-9)
    assert sum(state["weights"]) == pytest.approx(1) and state["runs"] == ["network", "ladder"]


def test_blend_is_applied_to_new_rows(runs, home, tmp_path):
    """The blend of both saved runs' own predictions; equal weights, so that both count."""
    assert blend(runs, tmp_path / "blend.json") == 0
    state = read_json(tmp_path / "blend.json") | {"weights": [0.5, 0.5]}
    write_json(tmp_path / "blend.json", state)
    out = tmp_path / "blended.csv"
    arguments = ["predict", "--blend", str(tmp_path / "blend.json"), "--test", str(home / "test.csv")]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    ids = list(loading.read_rows(home / "test.csv", labelled=False)["id"])
    singles = [read_probs(run / "submission.csv") for run in runs]
    np.testing.assert_allclose(probs_of(check_submission(out, ids)), Blend.from_dict(state).apply(singles), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda table: table.assign(fold=1 - table["fold"]), "has other rows, folds or labels"),
     (lambda table: table.assign(label=(table["label"] + 1) % 3), "has other rows, folds or labels"),
     (lambda table: table.assign(winner_tie=table["winner_tie"] + 0.1), "sum"),
     (lambda table: table.iloc[:-1], " rows, or a label is not 0, 1 or 2"),
     (lambda table: table.drop(columns="winner_tie"), "winner_tie"),
     (lambda table: table.assign(id="x" + table["id"]), "only 0 rows were validated in all of these runs")],
)  # fmt: skip
def test_bad_runs_are_refused_and_nothing_is_written(runs, tmp_path, capsys, change, message):
    """One message that names the run; an older blend.json survives."""
    out, oof = tmp_path / "blend.json", runs[1] / "oof.csv"
    out.write_text("older")
    write_table(oof, change(read_table(oof)))
    assert blend(runs, out) == 2
    error = capsys.readouterr().err
    assert message in error and str(runs[1]) in error and out.read_text() == "older"


def test_missing_runs_are_named(runs, home, tmp_path, capsys):
    """A folder without result.json is not a run that ended; a blend whose run is gone predicts nothing; none twice."""
    assert blend([*runs, tmp_path / "x" / ".." / "network"], tmp_path / "blend.json") == 2
    assert "one run is named twice" in capsys.readouterr().err
    assert blend(runs, tmp_path / "blend.json") == 0
    shutil.rmtree(runs[1])
    arguments = ["predict", "--blend", str(tmp_path / "blend.json"), "--test", str(home / "test.csv")]
    assert cli.main([*arguments, "--out", str(tmp_path / "out.csv")]) == 2
    assert str(runs[1]) in capsys.readouterr().err and not (tmp_path / "out.csv").exists()
    (runs[0] / "result.json").unlink()
    assert blend(runs[:1], tmp_path / "blend.json") == 2
    assert "result.json" in capsys.readouterr().err
