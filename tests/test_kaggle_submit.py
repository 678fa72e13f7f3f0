"""What is submitted: attached runs, their blend, and less of both where time is short, never below a valid file."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from kaggle_parts import kernel_folders

from prefcls_lib import cli
from prefcls_lib.data import loading
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.data.submission import check_submission
from prefcls_lib.ensemble import blend, submit
from prefcls_lib.evaluation.calibration import Blend, Calibration
from prefcls_lib.pipeline.folder import RunFolder
from prefcls_lib.pipeline.steps import predict_run
from prefcls_lib.runtime.files import UserError

HOURS = 1.0
NO_TIME = 1e-9


@pytest.fixture(scope="session")
def ladder_run(tmp_path_factory, home) -> Path:
    """The ladder on the same files and folds as `finished_run`."""
    out = tmp_path_factory.mktemp("ladder") / "ladder"
    arguments = ["ladder", "--train", str(home / "train.csv"), "--test", str(home / "test.csv"), "--out", str(out)]
    assert cli.main([*arguments, "--set", "num_folds=3", "--set", "folds=[0,1]"]) == 0
    return out


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
def two(attach, finished_run, ladder_run, tmp_path) -> submit.Ensemble:
    """The network and the ladder with a blend of 3/4 and 1/4 and a calibration."""
    paths = [attach(finished_run, "network"), attach(ladder_run, "ladder")]
    state = {"runs": [path.name for path in paths], "weights": [0.75, 0.25], "temperature": 1.5, "tie_bias": 0.2}
    (paths[0].parent / "blend.json").write_text(json.dumps(state))
    return submit.find_ensemble(tmp_path / "unused.json")


@pytest.fixture(scope="session")
def rows(home):
    return loading.read_rows(home / "test.csv", labelled=False)


def read_probs(path: Path, rows) -> np.ndarray:
    return check_submission(path, list(rows["id"]))[list(LABEL_COLUMNS)].to_numpy()


def test_plan_of_folds_by_hand():
    """Fewer folds of each first, then fewer networks, the least weight first, then none."""
    seconds, folds, weights = [10.0, 1.0], [3, 3], [0.6, 0.4]
    plans = [submit.plan_folds(seconds, folds, weights, left) for left in (33, 32, 22, 21, 12, 11, 10.5, 10, 9, -1)]
    assert plans == [[3, 3], [2, 3], [2, 2], [1, 2], [1, 2], [1, 1], [1, 0], [1, 0], [0, 0], [0, 0]]


def test_nothing_attached_lists_what_to_attach(tmp_path, attach):
    """One message."""
    with pytest.raises(UserError, match="no finished run is attached"):
        submit.find_ensemble(tmp_path / "blend.json")


def test_all_in_time_is_the_same_as_predict_blend(two, rows, tmp_path):
    """Fold by fold and block by block gives what `prefcls predict --blend` gives."""
    record = submit.predict_within(two, rows, tmp_path / "submission.csv", HOURS)
    wanted = blend.predict_blend(Path(two.source), rows)
    np.testing.assert_allclose(read_probs(tmp_path / "submission.csv", rows), wanted, atol=2e-6)
    assert record["left_out"] == []
    assert [(run["run"], run["folds_used"], run["folds"]) for run in record["runs"]] == [
        ("network", 2, 2),
        ("ladder", 2, 2),
    ]
    assert json.loads((tmp_path / "submit.json").read_text()) == record
    assert submit.record_table(record).loc["network", "tokens_per_fold"] > 0


def test_blocks_do_not_change_the_probabilities(two, rows, tmp_path, monkeypatch):
    """Looking at the clock after every two rows."""
    monkeypatch.setattr(submit, "BLOCK_ROWS", 2)
    submit.predict_within(two, rows, tmp_path / "submission.csv", HOURS)
    wanted = blend.predict_blend(Path(two.source), rows)
    np.testing.assert_allclose(read_probs(tmp_path / "submission.csv", rows), wanted, atol=2e-6)


def test_fewer_folds(two, rows, tmp_path, monkeypatch):
    """One fold of the network where time is for no more; the blend is otherwise the same."""
    monkeypatch.setattr(submit, "plan_folds", lambda seconds, folds, weights, left: [1])
    record = submit.predict_within(two, rows, tmp_path / "submission.csv", HOURS)
    assert record["left_out"] == ["network: 1 of 2 folds were used"]
    network, ladder = two.folders
    monkeypatch.setattr(RunFolder, "model_folders", lambda self: [self / "model" / "fold0"])
    first, _ = predict_run(network, rows)
    monkeypatch.undo()
    predictions = [first, predict_run(ladder, rows)[0]]
    np.testing.assert_allclose(read_probs(tmp_path / "submission.csv", rows), two.blend.apply(predictions), atol=2e-6)


def test_no_time_leaves_the_ladder_without_the_calibration_of_the_blend(two, rows, tmp_path):
    """The temperature was fitted for the whole blend, not for the ladder."""
    record = submit.predict_within(two, rows, tmp_path / "submission.csv", NO_TIME)
    assert record["left_out"] == ["network: 0 of 2 folds were used"]
    ladder, _ = predict_run(two.folders[1], rows)
    np.testing.assert_allclose(read_probs(tmp_path / "submission.csv", rows), ladder, atol=2e-6)


def test_a_pace_that_slows_down_stops_in_the_middle(two, rows, tmp_path, monkeypatch):
    """The plan said all, the clock says no: the fold under way is dropped."""
    monkeypatch.setattr(submit, "plan_folds", lambda seconds, folds, weights, left: folds)
    submit.predict_within(two, rows, tmp_path / "submission.csv", NO_TIME)
    ladder, _ = predict_run(two.folders[1], rows)
    np.testing.assert_allclose(read_probs(tmp_path / "submission.csv", rows), ladder, atol=2e-6)


def test_only_networks_and_no_time_leaves_the_class_shares(attach, finished_run, rows, tmp_path):
    """Never below a valid submission: the shares of the validated rows, with one row of each class added."""
    attach(finished_run, "network")
    ensemble = submit.find_ensemble(tmp_path / "blend.json")
    submit.predict_within(ensemble, rows, tmp_path / "submission.csv", NO_TIME)
    probs = read_probs(tmp_path / "submission.csv", rows)
    labels = [int(line.split(",")[2]) for line in (finished_run / "oof.csv").read_text().splitlines()[1:]]
    counts = np.bincount(labels, minlength=3) + 1
    np.testing.assert_allclose(probs, np.tile(counts / counts.sum(), (len(rows), 1)), atol=1e-12)


def test_without_a_blend_the_weights_are_fitted_here(attach, finished_run, ladder_run, tmp_path):
    """As `prefcls blend` fits them."""
    paths = [attach(finished_run, "network"), attach(ladder_run, "ladder")]
    ensemble = submit.find_ensemble(tmp_path / "blend.json")
    wanted = blend.fit_runs(sorted(paths), tmp_path / "again.json")
    weights = [weight for weight in wanted["weights"] if weight > 0]
    assert ensemble.source == "fitted here"
    assert sorted(ensemble.blend.weights) == pytest.approx(sorted(weights))
    assert (tmp_path / "blend.json").is_file()
    assert list(ensemble.table()["folds"]) == [2] * len(weights)


def test_runs_that_share_no_rows_count_the_same(attach, finished_run, ladder_run, tmp_path, capsys):
    """And it is said why."""
    attach(finished_run, "network")
    other = attach(ladder_run, "ladder")
    for name in ("oof.csv", "valid.csv"):
        lines = (other / name).read_text().splitlines()
        (other / name).write_text("\n".join([lines[0], *(f"9{line}" for line in lines[1:])]) + "\n")
    ensemble = submit.find_ensemble(tmp_path / "blend.json")
    assert ensemble.blend == Blend((0.5, 0.5), Calibration())
    assert "counts the same, since no blend can be fitted" in capsys.readouterr().out


def test_blend_without_its_runs_is_refused(two, tmp_path):
    """It names them."""
    shutil.rmtree(two.folders[1].path)
    with pytest.raises(UserError, match="ladder, which holds no finished run"):
        submit.find_ensemble(tmp_path / "blend.json")


def test_failing_member_stops_here_and_is_left_out_in_a_rerun(two, rows, tmp_path, monkeypatch, capsys):
    """Nobody could mend it in the rerun, and the rest is a valid submission."""

    def fail(path):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(submit, "load_model", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        submit.predict_within(two, rows, tmp_path / "submission.csv", HOURS)
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    record = submit.predict_within(two, rows, tmp_path / "submission.csv", HOURS)
    assert record["left_out"][0] == "network: failed (RuntimeError: CUDA out of memory)"
    assert "RuntimeError: CUDA out of memory" in capsys.readouterr().err
    ladder, _ = predict_run(two.folders[1], rows)
    np.testing.assert_allclose(read_probs(tmp_path / "submission.csv", rows), ladder, atol=2e-6)


def test_submit_notebook_runs(two, home, rows, tmp_path):
    """As Kaggle runs it, on the attached runs; small cells that define nothing."""
    competition = tmp_path / "input" / "competitions" / "llm-classification-finetuning"
    competition.mkdir(parents=True)
    for name in ("train.csv", "test.csv"):
        shutil.copyfile(home / name, competition / name)
    (tmp_path / "submit.ipynb").write_text(
        kernel_folders.put_parameters(kernel_folders.build_submit(), {"time_budget_hours": 8.0})
    )
    command = [sys.executable, "-m", "papermill", "submit.ipynb", "out.ipynb", "-y", "{}", "--no-progress-bar"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = blend.predict_blend(Path(two.source), rows)
    np.testing.assert_allclose(read_probs(tmp_path / "submission.csv", rows), wanted, atol=2e-6)
    cells = [c for c in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells if c.cell_type == "code"]
    assert all(len([line for line in c.source.splitlines() if line.strip()]) <= 12 for c in cells)
    assert not any(word in c.source for c in cells for word in ("def ", "class ", "lambda"))
    outputs = [output for c in cells for output in c.outputs]
    assert "commit not recorded" in str(outputs)
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
