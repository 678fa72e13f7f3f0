"""What is submitted: attached runs, their blend, and less of both where time is short, never below a valid file."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from kaggle_parts import kernel_folders

from prefcls_lib import cli
from prefcls_lib.data import loading
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.data.submission import check_submission
from prefcls_lib.ensemble import blend, submit
from prefcls_lib.evaluation.calibration import Blend, Calibration
from prefcls_lib.models.saved import load_fold_model
from prefcls_lib.pipeline import predict
from prefcls_lib.pipeline.folder import RunFolder
from prefcls_lib.pipeline.launch import WorkerFailed
from prefcls_lib.pipeline.predict import predict_run
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


def test_blocks_do_not_change_the_probabilities(two, rows, tmp_path, monkeypatch):
    """Looking at the clock after every two rows."""
    monkeypatch.setattr(predict, "BLOCK_ROWS", 2)
    submit.predict_within(two, rows, tmp_path / "submission.csv", HOURS)
    wanted = blend.predict_blend(Path(two.source), rows)
    np.testing.assert_allclose(read_probs(tmp_path / "submission.csv", rows), wanted, atol=2e-6)


class Clock:
    """`time.time()` that advances by an hour whenever it is asked."""

    def __init__(self):
        self.hours, self.perf_counter = 0, time.perf_counter

    def time(self) -> float:
        self.hours += 1
        return 3600.0 * self.hours


@pytest.mark.parametrize(
    ("deadline", "used"), [(1.5, (0, 0)), (3.5, (1, 0)), (6.5, (2, 0)), (7.5, (2, 1)), (8.5, (2, 1)), (9.5, (2, 2))]
)
def test_what_is_not_complete_in_time_is_left_out(two, rows, tmp_path, monkeypatch, deadline, used):
    """The start is at 1 h; each model has two blocks and looks at the clock before each: the ladder's models at 2 and
    3 h, 4 and 5 h, the network's at 6 and 7 h, 8 and 9 h. The calibration belongs to both runs together."""
    clock = Clock()
    monkeypatch.setattr(predict, "time", clock)
    monkeypatch.setattr(submit, "time", clock)
    monkeypatch.setattr(predict, "BLOCK_ROWS", 6)
    monkeypatch.setattr(submit, "RESERVED", 0.0)
    record = submit.predict_within(two, rows, tmp_path / "submission.csv", deadline - 1)
    assert [run["folds_used"] for run in record["runs"]] == [used[1], used[0]]
    network, ladder = ([load_fold_model(path).predict_proba(rows) for path in f.model_folders()] for f in two.folders)
    if used == (0, 0):
        counts = np.bincount(pd.read_csv(two.folders[0] / "oof.csv")["label"], minlength=3) + 1  # one row of each more
        wanted = np.tile(counts / counts.sum(), (len(rows), 1))
    elif used[1] == 0:
        wanted = np.mean(ladder[: used[0]], axis=0)
    else:
        wanted = two.blend.apply([np.mean(network[: used[1]], axis=0), np.mean(ladder, axis=0)])
    np.testing.assert_allclose(read_probs(tmp_path / "submission.csv", rows), wanted, atol=2e-6)
    assert any("1 of 2 folds" in line for line in record["left_out"]) == (1 in used)


def test_models_in_the_order_of_their_worth(attach, finished_run, ladder_run, tmp_path):
    """The ladder, then one fold of each network by falling weight, then the next folds."""
    paths = [attach(finished_run, "light"), attach(finished_run, "heavy"), attach(ladder_run, "ladder")]
    blended = Blend((0.3, 0.5, 0.2), Calibration())
    models = submit.Ensemble([RunFolder(path) for path in paths], blended, "by hand").models()
    assert [(path.parents[1].name, path.name) for _, path in models] == [
        ("ladder", "fold0"), ("ladder", "fold1"), ("heavy", "fold0"), ("light", "fold0"), ("heavy", "fold1"),
        ("light", "fold1"),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def many_rows():
    """600 shipped rows: two blocks."""
    return loading.read_rows(loading.sample_path("train"), labelled=False).head(600)


def test_two_processes_write_the_same_submission(two, many_rows, tmp_path):
    """To the byte: a block is predicted as a whole, by whichever process."""
    for name, processes in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        record = submit.predict_within(two, many_rows, tmp_path / name / "submission.csv", HOURS, processes)
        assert record["left_out"] == []
    one, shared = ((tmp_path / name / "submission.csv").read_bytes() for name in ("one", "two"))
    assert one == shared


def test_two_processes_keep_the_deadline(two, many_rows, tmp_path, monkeypatch):
    """It is handed to both, and a process begins no block after it; one that does not end is stopped five minutes
    later. What was complete before counts."""

    def run_one_and_hang(commands, names, poll):
        for command in commands:
            arguments = cli._parser().parse_args(command)
            assert arguments.deadline == 3600 * (1 + 0.9 * 5)
            predict.predict_share(arguments.models[:1], arguments.rows, arguments.out, arguments.deadline)
        looks.extend(iter(poll, True))
        assert predict.time.time() > arguments.deadline + 300
        predict.predict_share(arguments.models, arguments.rows, tmp_path, arguments.deadline)
        assert not list(tmp_path.glob("*.bin"))

    looks, clock = [], Clock()
    monkeypatch.setattr(predict, "time", clock)
    monkeypatch.setattr(submit, "time", clock)
    monkeypatch.setattr(predict, "run_side_by_side", run_one_and_hang)
    record = submit.predict_within(two, many_rows, tmp_path / "submission.csv", 5, 2)
    assert looks == [False, False]  # at 4 and 5 h: both blocks of the first model took a look before
    assert [run["folds_used"] for run in record["runs"]] == [0, 1]
    wanted = load_fold_model(two.folders[1] / "model" / "fold0").predict_proba(many_rows)
    np.testing.assert_allclose(read_probs(tmp_path / "submission.csv", many_rows), wanted, atol=2e-6)


@pytest.mark.parametrize("failing", [0, 1])
def test_failing_process_is_left_out_in_a_rerun(two, many_rows, tmp_path, monkeypatch, capsys, failing):
    """One process cannot read a model, when the other has done all or nothing; the others are predicted without it."""
    weights = two.folders[0] / "model" / "fold0" / "head.safetensors"
    rounds, good = [], weights.read_bytes()

    def run_here(commands, names, poll):
        rounds.append(names)
        for number, command in enumerate(commands):
            weights.write_bytes(b"broken" if number == failing else good)
            if cli.main(command) != 0:
                raise WorkerFailed(f"{names[number]} failed: {capsys.readouterr().err}", number)

    monkeypatch.setattr(predict, "run_side_by_side", run_here)
    with pytest.raises(WorkerFailed, match="the saved model cannot be read"):
        submit.predict_within(two, many_rows, tmp_path / "submission.csv", HOURS, 2)
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    rounds.clear()
    record = submit.predict_within(two, many_rows, tmp_path / "submission.csv", HOURS, 2)
    assert record["left_out"][0].startswith(f"network, fold0: failed (WorkerFailed: predict {failing + 1}/2 failed")
    assert record["left_out"][1:] == ["network: 1 of 2 folds were used"]
    assert "the saved model cannot be read" in capsys.readouterr().err
    assert len(rounds) == 2
    fold1 = load_fold_model(two.folders[0] / "model" / "fold1").predict_proba(many_rows)
    wanted = two.blend.apply([fold1, predict_run(two.folders[1], many_rows)[0]])
    np.testing.assert_allclose(read_probs(tmp_path / "submission.csv", many_rows), wanted, atol=2e-3)  # bf16


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
    """And a line says why."""
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
    """Nobody could correct it in the rerun, and the rest is a valid submission."""

    def fail(path):
        if "network" in str(path):
            raise RuntimeError("CUDA out of memory")
        return load_fold_model(path)

    monkeypatch.setattr(predict, "load_fold_model", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        submit.predict_within(two, rows, tmp_path / "submission.csv", HOURS)
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    record = submit.predict_within(two, rows, tmp_path / "submission.csv", HOURS)
    assert record["left_out"][0] == "network, fold0: failed (RuntimeError: CUDA out of memory)"
    assert "RuntimeError: CUDA out of memory" in capsys.readouterr().err
    ladder, _ = predict_run(two.folders[1], rows)
    np.testing.assert_allclose(read_probs(tmp_path / "submission.csv", rows), ladder, atol=2e-6)


def test_submit_notebook_runs(two, home, rows, tmp_path):
    """As Kaggle runs it, on the attached runs; small cells that define nothing."""
    competition = tmp_path / "input" / "competitions" / "llm-classification-finetuning"
    competition.mkdir(parents=True)
    for name in ("train.csv", "test.csv"):
        shutil.copyfile(home / name, competition / name)
    notebook = kernel_folders.put_parameters(kernel_folders.read_notebook("submit"), {"time_budget_hours": 8.0})
    nbformat.write(notebook, tmp_path / "submit.ipynb")
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
