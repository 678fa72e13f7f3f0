"""Soft labels, weights and extra rows: read, mixed into the loss, and kept away from validation."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_row, run_arguments
from scipy.special import log_softmax

from prefcls_lib import cli
from prefcls_lib.config import RunConfig
from prefcls_lib.data import loading
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.schema import SOFT_COLUMNS
from prefcls_lib.pipeline import folds, steps
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training import step


def soft(a: object, b: object, tie: object, **cells: object) -> dict:
    return {**dict(zip(SOFT_COLUMNS, (a, b, tie), strict=True)), **cells}


def test_soft_labels_and_weights_are_read(write_csv):
    """Three probabilities and a weight; rounded ones are brought to sum 1; rows without them have no such columns."""
    path = write_csv("soft.csv", [make_row(1, 0, **soft(0.5, "0.3", 0.2, weight=2)),
                                  make_row(2, 1, **soft("0.333", "0.333", "0.333", weight="0"))])  # fmt: skip
    rows = loading.read_rows(path, labelled=True)
    np.testing.assert_allclose(rows[list(SOFT_COLUMNS)], [[0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3]])
    assert rows["weight"].tolist() == [2.0, 0.0]
    plain = loading.read_rows(write_csv("plain.csv", [make_row(1, 0), make_row(2, 1)]), labelled=True)
    assert not {*SOFT_COLUMNS, "weight"} & set(plain)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"soft_model_a": 0.5}, "column 'soft_model_a' without 'soft_model_b'"),
        (soft(0.5, 0.5, 0.5), "row 2: soft_model_a, soft_model_b, soft_tie sum to 1.5, not to 1"),
        (soft(1.5, -0.5, 0), "row 2, column 'soft_model_b': '-0.5' is not a number of 0 or more"),
        (soft(1, 0, "nan"), "row 2, column 'soft_tie': 'nan' is not a number"),
        ({"weight": "heavy"}, "row 2, column 'weight': 'heavy' is not a number"),
        ({"weight": "inf"}, "row 2, column 'weight': 'inf' is not a number"),
    ],
)
def test_bad_ones_are_named(write_csv, cells, message):
    """File, row and column, as for everything else in the file."""
    good = dict(zip(cells, (1, 0, 0), strict=False))
    path = write_csv("soft.csv", [make_row(1, 0, **good), make_row(2, 1, **cells)])
    with pytest.raises(UserError) as error:
        loading.read_rows(path, labelled=True)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_loss_by_hand():
    """Row 0 has weight 2 and the target (.5, .5, 0), row 1 weight 1 and its vote; smoothing .3 takes .1 from each."""
    logits = np.array([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
    targets, weights = np.array([[0.5, 0.5, 0], [0, 1, 0]], dtype=np.float32), np.array([2, 1], dtype=np.float32)
    examples = Examples([], np.zeros((2, 2), dtype=int), None, np.array([0, 1]), targets, weights)
    logs = log_softmax(logits, axis=1)
    target = 0.7 * targets + 0.1
    expected = -2 * (target[0] @ logs[0]) - target[1] @ logs[1]
    found = step.training_loss((torch.tensor(logits),) * 2, examples, np.array([0, 1]), 0.3)
    assert float(found) == pytest.approx(expected, abs=1e-6)
    votes = step.training_loss(
        (torch.tensor(logits),) * 2, replace(examples, targets=None, weights=None), np.arange(2), 0.0
    )
    assert float(votes) == pytest.approx(-logs[0, 0] - logs[1, 1], abs=1e-6)


@pytest.fixture(scope="module")
def files(home, tmp_path_factory):
    """train.csv of `home`, and extra rows: three with prompts of its own, two with prompts of training rows."""
    folder = tmp_path_factory.mktemp("soft")
    with (home / "train.csv").open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    extra = [make_row(n, n % 3, **soft(0.2, 0.2, 0.6, weight=0.5)) for n in range(3)]
    extra += [make_row(10 + n, 0, prompt=records[n]["prompt"], **soft(1, 0, 0, weight=3)) for n in range(2)]
    path = folder / "extra.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(extra[0]))
        writer.writeheader()
        writer.writerows(extra)
    return home, path


def start(home, extra, out, **settings):
    paths = {"train": home / "train.csv", "test": home / "test.csv", "backbone": home / "backbone"}
    places = {name: str(path) for name, path in {**paths, "extra_train": extra, "out": out}.items()}
    return steps.start(RunConfig(**places, num_folds=3, max_length=32, **settings))


def test_extra_rows_are_trained_on_but_for_validation_prompts(files, tmp_path):
    """In each fold: every extra row whose prompt is not validated there, with its own tokens; none is validated."""
    job = start(*files, tmp_path / "run", soft_label_share=0.25)
    encoded = steps.encode(job)
    extra = job.encode(job.extra_rows)
    left_out = 0
    for fold in range(3):
        train, valid, _ = folds.split_rows(job, encoded, fold)
        validated = set(job.rows["group"][job.folds == fold])
        kept = [i for i, group in enumerate(job.extra_rows["group"]) if group not in validated]
        own = int((job.folds != fold).sum())
        left_out += 5 - len(kept)
        assert (len(train), len(valid)) == (own + len(kept), int((job.folds == fold).sum()))
        for place, row in zip(range(own, len(train)), kept, strict=True):
            for side in (0, 1):
                ids = train.token_ids[train.sides[place, side]]
                assert ids.tolist() == extra.token_ids[extra.sides[row, side]].tolist()
            vote = np.eye(3)[train.labels[place]]
            wanted = 0.75 * vote + 0.25 * job.extra_rows[list(SOFT_COLUMNS)].to_numpy()[row]
            np.testing.assert_allclose(train.targets[place], wanted, atol=1e-6)
        assert train.weights[own:].tolist() == job.extra_rows["weight"].to_numpy()[kept].tolist()
        np.testing.assert_array_equal(train.targets[:own], np.eye(3)[train.labels[:own]])
        assert (train.weights[:own] == 1).all()
    assert left_out == 2  # each of the two shared prompts is validated once


def test_cross_rows_keep_their_targets_in_either_order():
    """Swapped rows have the target of A and B swapped too, and the same weight."""
    targets = np.tile(np.array([[0.7, 0.2, 0.1]], dtype=np.float32), (100, 1))
    weights = np.arange(100, dtype=np.float32)
    examples = Examples(
        [np.arange(3)] * 2, np.tile([[0, 1]], (100, 1)), None, np.zeros(100, dtype=int), targets, weights
    )
    drawn = examples.in_random_order(0, 0)
    swapped = drawn.sides[:, 0] == 1
    assert 20 < swapped.sum() < 80
    np.testing.assert_array_equal(drawn.targets[swapped], np.tile(targets[0][[1, 0, 2]], (swapped.sum(), 1)))
    np.testing.assert_array_equal(drawn.targets[~swapped], targets[~swapped])
    np.testing.assert_array_equal(drawn.weights, weights)


def test_whole_run_and_another_extra_file(files, tmp_path, capsys):
    """The file's hash is in the result; validation rows are the train file's; a changed file is another run."""
    home, extra = files
    out = tmp_path / "run"
    copy = tmp_path / "extra.csv"
    copy.write_bytes(extra.read_bytes())
    arguments = run_arguments(home, out, f"extra_train={copy}", "folds=[0]")
    assert cli.main(arguments) == 0
    assert "extra rows; " in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert set(result["data_sha256"]) == {"train", "test", "extra_train"}
    assert result["rows"] == 60
    copy.write_text(extra.read_text(encoding="utf-8").replace("answer a 0", "answer c 0"), encoding="utf-8")
    assert cli.main(arguments) == 2
    assert "extra_train" in capsys.readouterr().err
