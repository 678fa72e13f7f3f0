"""`prefcls ladder` and `prefcls blend`: the folds and files of any run, cross-fitted scores, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import read_tree
from sklearn.metrics import log_loss as sklearn_log_loss

from prefcls_lib import cli
from prefcls_lib.baselines.estimators import BASELINES
from prefcls_lib.data import loading
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.data.submission import check_submission
from prefcls_lib.evaluation.calibration import Blend, fit_blend
from prefcls_lib.pipeline.folder import read_table, write_table


def ladder_arguments(home: Path, out: Path, *settings: str) -> list[str]:
    arguments = ["ladder", "--train", str(home / "train.csv"), "--test", str(home / "test.csv"), "--out", str(out)]
    for setting in ("num_folds=3", "folds=[0,1]", *settings):
        arguments += ["--set", setting]
    return arguments


@pytest.fixture(scope="module")
def ladder_run(home, tmp_path_factory) -> Path:
    """A finished ladder on the folds of `finished_run`."""
    out = tmp_path_factory.mktemp("ladder") / "run"
    assert cli.main(ladder_arguments(home, out)) == 0
    return out


@pytest.fixture
def runs(finished_run, ladder_run, tmp_path) -> list[Path]:
    """Copies of both runs that a test may break."""
    return [shutil.copytree(run, tmp_path / name) for run, name in ((finished_run, "network"), (ladder_run, "ladder"))]


def blend(runs: list[Path], out: Path) -> int:
    return cli.main(["blend", "--runs", *map(str, runs), "--out", str(out)])


def probs_of(table: pd.DataFrame) -> np.ndarray:
    return table[list(LABEL_COLUMNS)].to_numpy()


def test_ladder_has_the_files_and_folds_of_any_run(ladder_run, finished_run):
    """Equal num_folds, seed and data: equal ids, folds, labels and groups, in both tables."""
    names = {"config.json", "result.json", "history.csv", "valid.csv", "oof.csv", "submission.csv"}
    assert names <= set(read_tree(ladder_run))
    for name in ("oof.csv", "valid.csv"):
        network, ladder = (read_table(run / name).set_index("id").sort_index() for run in (finished_run, ladder_run))
        assert list(ladder.columns) == list(network.columns)
        for column in set(ladder.columns) - set(LABEL_COLUMNS):
            assert (ladder[column] == network[column]).all()


def test_ladder_numbers_are_those_of_its_files(ladder_run):
    """log_loss from oof.csv, which has the ensemble's probabilities, and every baseline's from oof_baselines.csv."""
    result, oof = json.loads((ladder_run / "result.json").read_text()), read_table(ladder_run / "oof.csv")
    assert result["log_loss"] == pytest.approx(sklearn_log_loss(oof["label"], probs_of(oof)), abs=1e-9)
    kept = dict(iter(read_table(ladder_run / "oof_baselines.csv").groupby("rung", sort=False)))
    losses = read_table(ladder_run / "history.csv").set_index("rung")["log_loss"].sort_values()
    assert set(kept) == set(BASELINES)
    for name, table in kept.items():
        assert list(table["id"]) == list(oof["id"])
        assert losses[name] == pytest.approx(sklearn_log_loss(table["label"], probs_of(table)), abs=1e-9)
    assert (probs_of(kept["structure_ensemble"]) == probs_of(oof)).all()


def test_saved_ladder_predicts_its_own_submission(ladder_run, home, tmp_path):
    """Byte for byte, from the run folder alone; and swapped answers give swapped columns."""
    out = tmp_path / "again.csv"
    arguments = ["predict", "--run", str(ladder_run), "--out", str(out)]
    assert cli.main([*arguments, "--test", str(home / "test.csv")]) == 0
    assert out.read_bytes() == (ladder_run / "submission.csv").read_bytes()
    test = pd.read_csv(home / "test.csv", dtype=str)
    test.rename(columns={"response_a": "response_b", "response_b": "response_a"}).to_csv(tmp_path / "swapped.csv")
    before = probs_of(read_table(out))
    assert cli.main([*arguments, "--test", str(tmp_path / "swapped.csv")]) == 0
    np.testing.assert_allclose(probs_of(read_table(out)), before[:, [1, 0, 2]], atol=1e-12)


def test_ladder_started_again_only_says_that_it_is_complete(ladder_run, home, capsys):
    """It prints the table again, a line a model; and a network run is refused in its folder."""
    before = read_tree(ladder_run)
    assert cli.main(ladder_arguments(home, ladder_run)) == 0
    printed = capsys.readouterr().out
    assert "this run is complete" in printed and "\nmodel  " in printed and "rung" not in printed
    assert read_tree(ladder_run) == before
    assert cli.main(ladder_arguments(home, ladder_run, "seed=7")) == 2
    assert "seed=42" in capsys.readouterr().err


def test_blend_numbers_can_be_computed_again(runs, tmp_path):
    """The nested score by hand: two folds, each blended by what was fitted on the other."""
    assert blend(runs, tmp_path / "blend.json") == 0
    state = json.loads((tmp_path / "blend.json").read_text())
    tables = [read_table(run / "oof.csv").set_index("id").sort_index() for run in runs]
    labels, folds = tables[0]["label"].to_numpy(), tables[0]["fold"].to_numpy()
    predictions = [probs_of(table) for table in tables]
    nested = np.empty_like(predictions[0])
    for fold in (0, 1):
        here = folds == fold
        nested[here] = fit_blend(labels[~here], [p[~here] for p in predictions]).apply([p[here] for p in predictions])
    assert state["log_loss"] == pytest.approx(sklearn_log_loss(labels, nested), abs=1e-9)
    assert state["run_log_loss"] == pytest.approx([sklearn_log_loss(labels, p) for p in predictions], abs=1e-9)
    applied = Blend.from_dict(state).apply(predictions)
    assert state["log_loss_fitted_rows"] == pytest.approx(sklearn_log_loss(labels, applied), abs=1e-9)
    assert sum(state["weights"]) == pytest.approx(1)
    assert state["runs"] == ["network", "ladder"]


def test_blend_is_applied_to_new_rows(runs, home, tmp_path):
    """The blend of both saved runs' own predictions; equal weights, so that both count."""
    assert blend(runs, tmp_path / "blend.json") == 0
    state = json.loads((tmp_path / "blend.json").read_text())
    (tmp_path / "blend.json").write_text(json.dumps({**state, "weights": [0.5, 0.5]}))
    out = tmp_path / "blended.csv"
    arguments = ["predict", "--blend", str(tmp_path / "blend.json"), "--test", str(home / "test.csv")]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    ids = list(loading.read_rows(home / "test.csv", labelled=False)["id"])
    blended = probs_of(check_submission(out, ids))
    state = json.loads((tmp_path / "blend.json").read_text())
    singles = [probs_of(read_table(run / "submission.csv")) for run in runs]
    np.testing.assert_allclose(blended, Blend.from_dict(state).apply(singles), atol=1e-6)


def test_blend_of_one_run_is_its_calibration(runs, tmp_path):
    """Weight 1, a temperature and a tie bias."""
    assert blend(runs[:1], tmp_path / "blend.json") == 0
    state = json.loads((tmp_path / "blend.json").read_text())
    assert state["weights"] == [1.0]
    result = json.loads((runs[0] / "result.json").read_text())
    assert state["log_loss"] == pytest.approx(result["calibrated_log_loss"], abs=1e-9)


def change_table(run: Path, change) -> None:
    """Rewrite a run's oof.csv."""
    write_table(run / "oof.csv", change(read_table(run / "oof.csv")))


def other_fold(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(fold=1 - table["fold"])


def other_label(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(label=(table["label"] + 1) % 3)


def too_sure(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(winner_tie=table["winner_tie"] + 0.1)


def last_row_missing(table: pd.DataFrame) -> pd.DataFrame:
    return table.iloc[:-1]


def no_probabilities(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns="winner_tie")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_fold, "another fold"),
        (other_label, "another label"),
        (too_sure, "sum"),
        (last_row_missing, "rows are missing or doubled"),
        (no_probabilities, "the columns winner_tie are missing"),
    ],
)
def test_bad_runs_are_refused_and_nothing_is_written(runs, tmp_path, capsys, change, message):
    """One message that names the file; an older blend.json survives."""
    out = tmp_path / "blend.json"
    out.write_text("older")
    change_table(runs[1], change)
    assert blend(runs, out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(runs[1] / "oof.csv") in error
    assert out.read_text() == "older"


def test_runs_without_shared_rows_are_refused(runs, tmp_path, capsys):
    """Other ids altogether: nothing to fit on."""
    for name in ("oof.csv", "valid.csv"):
        table = read_table(runs[1] / name)
        write_table(runs[1] / name, table.assign(id="x" + table["id"]))
    assert blend(runs, tmp_path / "blend.json") == 2
    assert "only 0 rows were predicted out of sample by all" in capsys.readouterr().err
    assert not (tmp_path / "blend.json").exists()


def test_unfinished_run_is_refused(runs, tmp_path, capsys):
    """A folder without result.json is not a run that ended."""
    (runs[0] / "result.json").unlink()
    assert blend(runs, tmp_path / "blend.json") == 2
    assert "result.json" in capsys.readouterr().err


def test_blend_whose_run_is_gone(runs, home, tmp_path, capsys):
    """The missing folder is named; no submission appears."""
    assert blend(runs, tmp_path / "blend.json") == 0
    shutil.rmtree(runs[1])
    arguments = ["predict", "--blend", str(tmp_path / "blend.json"), "--test", str(home / "test.csv")]
    assert cli.main([*arguments, "--out", str(tmp_path / "out.csv")]) == 2
    assert "its run folder" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
