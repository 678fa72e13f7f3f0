"""What is submitted: attached runs, their blend, and less of both where time is short, never below a valid file."""

import itertools
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import kernel_folders
import numpy as np
import pandas as pd
import pytest
from accelerate.state import AcceleratorState, PartialState

from prefcls_lib.data import loading
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.data.submission import check_submission
from prefcls_lib.ensemble import blend, submit
from prefcls_lib.ensemble.predictor import load
from prefcls_lib.evaluation.calibration import Blend, Calibration
from prefcls_lib.models.saved import SavedNetwork
from prefcls_lib.pipeline import predict
from prefcls_lib.pipeline.folder import model_folders
from prefcls_lib.runtime.files import UserError

HOURS = 1.0


@pytest.fixture
def attach(tmp_path, monkeypatch):
    """attach(folder, name): as the output of a notebook of that name."""
    root = tmp_path / "input"
    root.mkdir()
    monkeypatch.setenv("PREFCLS_INPUT_ROOT", str(root))

    def put(folder: Path, name: str) -> Path:
        return Path(shutil.copytree(folder, root / "notebooks" / "me" / name))

    return put


@pytest.fixture
def two(attach, finished_run, ladder_run, tmp_path) -> tuple[list[Path], Blend]:
    """The network and the ladder with a blend of 3/4 and 1/4 and a calibration."""
    paths = [attach(finished_run, "network"), attach(ladder_run, "ladder")]
    state = {"runs": [path.name for path in paths], "weights": [0.75, 0.25], "temperature": 1.5, "tie_bias": 0.2}
    (paths[0].parent / "blend.json").write_text(json.dumps(state))
    return submit.find_runs(tmp_path / "unused.json")


@pytest.fixture(scope="session")
def rows(home):
    return loading.read_rows(home / "test.csv", labelled=False)


def read_probs(path: Path, ids: list[str]) -> np.ndarray:
    return check_submission(path, ids)[list(LABEL_COLUMNS)].to_numpy()


def predict_two(two, rows, hours: float = HOURS) -> tuple[dict, np.ndarray | None]:
    """The record, and the last probabilities that were to be written."""
    written = [None]
    record = submit.predict_within(*two, rows, written.append, hours)
    return record, written[-1]


@pytest.mark.parametrize(("devices", "block_rows", "error"), [(1, 512, 1e-12), (2, 2, 1e-6)])
def test_all_in_time_is_the_same_as_predict_blend(two, rows, monkeypatch, devices, block_rows, error):
    """Fold by fold and block by block gives what `prefcls predict --blend` gives; so do two devices side by side, whose
    threads are the first of the process to ask accelerate for its state."""
    AcceleratorState._reset_state(reset_partial_state=True)
    real = PartialState.set_device
    monkeypatch.setattr(PartialState, "set_device", lambda state: time.sleep(0.2) or real(state))
    monkeypatch.setattr(predict, "count_processes", lambda wanted: devices)
    monkeypatch.setattr(predict, "BLOCK_ROWS", block_rows)
    record, probs = predict_two(two, rows)
    np.testing.assert_allclose(probs, load(two[0][0].parent / "blend.json").predict_rows(rows), atol=error)
    assert record["left_out"] == []
    found = [(run["run"], run["weight"], run["folds_used"], run["folds"]) for run in record["runs"]]
    assert found == [("network", 0.75, 2, 2), ("ladder", 0.25, 2, 2)]


@pytest.fixture
def clock(monkeypatch) -> None:
    """In place of the time of day: an hour has passed whenever it is asked for."""
    hours = itertools.count(1)
    for module in (predict, submit):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: 3600.0 * next(hours)))


@pytest.mark.parametrize(
    ("deadline", "used"), [(1.5, (0, 0)), (3.5, (1, 0)), (6.5, (2, 0)), (7.5, (2, 1)), (8.5, (2, 1)), (9.5, (2, 2))]
)
def test_what_is_not_complete_in_time_is_left_out(two, rows, monkeypatch, clock, deadline, used):
    """From 1 h on each of the models' two blocks looks at the clock: the ladder's at 2 to 5 h, the network's at 6 to 9
    h. The calibration belongs to both runs together."""
    monkeypatch.setattr(predict, "BLOCK_ROWS", 6)
    monkeypatch.setattr(submit, "RESERVED", 0.0)
    record, probs = predict_two(two, rows, deadline - 1)
    assert [run["folds_used"] for run in record["runs"]] == [used[1], used[0]]
    assert any("1 of 2 folds" in line for line in record["left_out"]) == (1 in used)
    network, ladder = (
        [load(path).predict_rows(rows) for path in model_folders(run)[:number]]
        for run, number in zip(two[0], reversed(used), strict=True)
    )
    if used == (0, 0):
        assert probs is None  # the prior's submission stays
    elif network:
        wanted = two[1].apply([np.mean(network, axis=0), np.mean(ladder, axis=0)])
        np.testing.assert_allclose(probs, wanted, atol=1e-12)
    else:
        np.testing.assert_allclose(probs, np.mean(ladder, axis=0), atol=1e-12)


def test_models_in_the_order_of_their_worth(attach, finished_run, ladder_run):
    """The ladder, then one fold of each network by falling weight, then the next folds."""
    paths = [attach(finished_run, "light"), attach(finished_run, "heavy"), attach(ladder_run, "ladder")]
    models = submit.order_models(paths, Blend((0.3, 0.5, 0.2), Calibration()))
    assert [(place, path.parents[1].name, path.name) for place, path in models] == [
        (2, "ladder", "fold0"), (2, "ladder", "fold1"), (1, "heavy", "fold0"), (0, "light", "fold0"),
        (1, "heavy", "fold1"), (0, "light", "fold1"),
    ]  # fmt: skip


def test_without_a_blend_the_weights_are_fitted_here(attach, finished_run, ladder_run, tmp_path, capsys):
    """As `prefcls blend` fits them; one run needs none; runs that share no rows count the same, and a line says why."""
    with pytest.raises(UserError, match="no finished run is attached"):
        submit.find_runs(tmp_path / "blend.json")
    paths = [attach(finished_run, "network")]
    assert submit.find_runs(tmp_path / "blend.json")[1] == Blend((1.0,), Calibration())
    paths.insert(0, attach(ladder_run, "ladder"))  # the order in which they are found: another one rounds otherwise
    runs, fitted = submit.find_runs(tmp_path / "blend.json")
    wanted = blend.fit_runs(paths, tmp_path / "again.json")
    weights = {path.name: weight for path, weight in zip(paths, wanted["weights"], strict=True) if weight > 0}
    assert {run.name: weight for run, weight in zip(runs, fitted.weights, strict=True)} == pytest.approx(weights)
    lines = (paths[1] / "oof.csv").read_text().splitlines()
    (paths[1] / "oof.csv").write_text("\n".join([lines[0], *(f"9{line}" for line in lines[1:])]) + "\n")
    assert submit.find_runs(tmp_path / "blend.json")[1] == Blend((0.5, 0.5), Calibration())
    assert "all runs get the same weight, since no blend can be fitted" in capsys.readouterr().out


def test_failing_member_stops_here_and_is_left_out_in_a_rerun(two, rows, monkeypatch, capsys):
    """Nobody could correct it in the rerun, and the rest is a valid submission."""

    def fail(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(predict, "BLOCK_ROWS", 2)  # no other block waits for the one that fails
    monkeypatch.setattr(SavedNetwork, "predict_proba", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        predict_two(two, rows)
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    record, probs = predict_two(two, rows)
    assert record["left_out"] == ["network: 0 of 2 folds were used"]
    assert "RuntimeError: CUDA out of memory" in capsys.readouterr().err
    np.testing.assert_allclose(probs, load(two[0][1]).predict_rows(rows), atol=1e-12)


BROKEN = [("prompt", ""), ("response_a", "just words"), ("response_b", '["two\nlines"]'), ("response_b", "[1]")]


def test_a_rerun_never_ends_without_a_submission(two, home, tmp_path, monkeypatch, capsys, write_csv):
    """Cells that are no JSON lists are read as one text, double ids are kept, each is printed; else they are errors."""
    table = pd.read_csv(home / "test.csv", dtype=str, keep_default_na=False)
    for row, (column, cell) in enumerate(BROKEN, 1):
        table.loc[row, column] = cell
    table.loc[0, "id"] = table.loc[11, "id"]
    path, out = write_csv("broken.csv", table.to_dict("records")), tmp_path / "submission.csv"
    with pytest.raises(UserError, match="is in rows 1 and 12"):
        submit.submit_file(path, out, HOURS)
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    record = submit.submit_file(path, out, HOURS)
    assert record["left_out"] == []
    assert json.loads((tmp_path / "submit.json").read_text()) == record
    assert len(np.unique(read_probs(out, list(table["id"])), axis=0)) > 6
    printed = capsys.readouterr().out
    assert "is in rows 1 and 12" in printed
    read = loading.read_rows(path, labelled=False)
    for row, (column, cell) in enumerate(BROKEN, 1):
        assert f"row {row + 1}, column {column!r}: not a JSON list" in printed and read.loc[row, column] == [cell]


def test_whatever_fails_in_a_rerun_the_prior_is_there(two, home, rows, tmp_path, monkeypatch):
    """Written before any text is read; elsewhere the error is raised."""
    monkeypatch.setattr(submit, "read_rows", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        submit.submit_file(home / "test.csv", tmp_path / "submission.csv", HOURS)
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    record = submit.submit_file(home / "test.csv", tmp_path / "submission.csv", HOURS)
    assert record["left_out"] == ["what was not complete: failed (ZeroDivisionError: division by zero)"]
    votes = np.bincount(loading.read_rows(loading.sample_path("train"), labelled=True)["label"])
    probs = read_probs(tmp_path / "submission.csv", list(rows["id"]))
    np.testing.assert_allclose(probs, np.tile(votes / 770, (12, 1)), atol=1e-9)


def test_first_run_projects_the_time_of_a_rerun(two, home, tmp_path, monkeypatch, capsys):
    """60 shipped rows on a CPU in 36 s: 25,000 in 4.2 h, of the 7.2 that are used of 8."""
    monkeypatch.setattr(submit, "predict_within", lambda *_: {"seconds": 36.0, "left_out": [], "runs": []})
    submit.submit_file(home / "test.csv", tmp_path / "submission.csv", 8.0)
    shown = capsys.readouterr().out
    assert "60 shipped rows took 36 s on " in shown
    assert "25,000 rows takes at most 4.2 h; the limit is 7.2 h" in shown


def test_submit_notebook_runs(two, home, rows, tmp_path, monkeypatch, capsys):
    """On the attached runs, from the first cell to the last; small cells that define nothing."""
    competition = tmp_path / "input" / "competitions" / "llm-classification-finetuning"
    competition.mkdir(parents=True)
    for name in ("train.csv", "test.csv"):
        shutil.copyfile(home / name, competition / name)
    monkeypatch.chdir(tmp_path)
    notebook = kernel_folders.put_parameters(kernel_folders.read_notebook("submit"), {"time_budget_hours": 7.0})
    namespace: dict = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert len([line for line in cell.source.splitlines() if line.strip()]) <= 12
            assert not any(word in cell.source for word in ("def ", "class ", "lambda"))
            exec(cell.source, namespace)
    assert namespace["time_budget_hours"] == 7.0
    wanted = load(two[0][0].parent / "blend.json").predict_rows(rows)
    np.testing.assert_allclose(read_probs(tmp_path / "submission.csv", list(rows["id"])), wanted, atol=2e-6)
    shown, errors = capsys.readouterr()
    assert "60 shipped rows took" in shown and errors == ""
