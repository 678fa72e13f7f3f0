"""The studies of the learning curve and of rows whose best log loss is known: what trains and scores, what is drawn."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax

from prefcls_lib.data import loading
from prefcls_lib.data.schema import class_shares
from prefcls_lib.evaluation import compare
from prefcls_lib.evaluation.scores import row_losses
from prefcls_lib.pipeline import steps
from prefcls_lib.runtime.files import read_json
from report.studies import known_floor, learning_curve


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    """The first 150 shipped rows."""
    path = tmp_path_factory.mktemp("curve") / "rows.csv"
    pd.read_csv(loading.sample_path("train"), dtype=str, keep_default_na=False).head(150).to_csv(path, index=False)
    return path


def test_rows_that_score_share_no_prompt_with_those_that_train(rows_file):
    """With the same seed 20 rows are a part of 40; another seed draws others."""
    pool, scored = learning_curve.split_rows(rows_file, 0)
    assert len(pool) + len(scored) == 150 and len(scored) == pytest.approx(30, abs=4)
    assert not set(pool["group"]) & set(scored["group"])
    drawn = [set(learning_curve.draw_rows(pool, count, seed)["id"]) for count, seed in ((20, 1), (40, 1), (40, 2))]
    assert drawn[0] < drawn[1] != drawn[2]
    assert [len(ids) for ids in drawn] == [20, 40, 40]


def test_a_point_is_made_once_and_has_the_numbers_of_its_predictions(rows_file, tiny, tmp_path, monkeypatch):
    """Log loss and difference worked out from point.npz; a second call trains nothing; --set makes another curve."""
    arguments = f"curve {rows_file} --out {tmp_path} --rows 60 --seeds 3 --backbone {tiny}".split()
    for name, value in (("max_length", 32), ("num_epochs", 1), ("start_from", "structure_logistic")):
        monkeypatch.setitem(learning_curve.SETTINGS, name, value)
    for more in ([], ["--set", "num_epochs=2"]):
        monkeypatch.setattr("sys.argv", [*arguments, *more])
        learning_curve.main()
    monkeypatch.setattr(steps, "run", lambda config: pytest.fail("trained again"))
    learning_curve.main()
    line, longer = learning_curve.collect(tmp_path)
    assert [one["network"] for one in (line, longer)] == [tiny.name, f"{tiny.name}+num_epochs=2"]
    assert (line["source"], line["rows"], line["seeds"]) == ("rows", 60, [3])
    with np.load(tmp_path / f"rows--{tiny.name}" / "60-3" / "point.npz") as arrays:
        labels, names = arrays["label"], ("network", "baseline", "prior")
        losses = {name: -np.log(arrays[name][np.arange(len(labels)), labels]).mean() for name in names}
    assert line["eval_rows"] == len(labels) and longer["log_loss"]["network"] != losses["network"]
    assert {name: line["log_loss"][name] for name in losses} == pytest.approx(losses)
    assert line["comparison"]["difference"] == pytest.approx(losses["network"] - losses["baseline"])


def test_seeds_are_averaged_row_by_row():
    """Means and interval are those of the row losses averaged over two seeds, which share the rows."""
    labels, groups, random = np.arange(12) % 3, np.repeat(list("abcd"), 3), np.random.default_rng(0)
    points = [(labels, groups, {name: random.dirichlet((3, 3, 3), 12) for name in ("network", "baseline")})
              for _ in range(2)]  # fmt: skip
    rows = {name: [-np.log(probs[name][np.arange(12), labels]) for *_, probs in points] for name in points[0][2]}
    differences = np.subtract(rows["network"], rows["baseline"])  # (2, 12)
    found = learning_curve.average_seeds(points)
    assert found["log_loss"] == pytest.approx({name: np.mean(losses) for name, losses in rows.items()})
    assert found["seed_differences"] == pytest.approx(differences.mean(axis=1))
    c = found["comparison"]
    assert (c.low, c.high) == pytest.approx(compare.bootstrap_interval(differences.mean(axis=0), groups))
    assert c.difference == pytest.approx(differences.mean())
    with pytest.raises(SystemExit, match="scored on different rows"):
        learning_curve.average_seeds([points[0], (labels[::-1], groups, points[1][2])])


def test_the_learning_curve_in_the_report_is_the_measured_one(tmp_path):
    """The committed table is what the study's program makes of the committed lines."""
    committed = read_json(learning_curve.FOLDER / "learning_curve.json")
    learning_curve.write(committed["lines"], tmp_path)
    assert read_json(tmp_path / "learning_curve.json") == committed
    assert (tmp_path / "learning_curve.svg").stat().st_size > 10_000
    c, cells = committed["lines"][0]["comparison"], committed["table"].splitlines()[2].replace("−", "-").split(" | ")
    assert cells[5:7] == [f"{c['difference']:+.4f}", f"{c['low']:+.4f} to {c['high']:+.4f}"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with 400 generated rows and a backbone of two layers, and the distributions of the labels."""
    folder = tmp_path_factory.mktemp("floor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known_floor, "LAYERS", 2)
        known_floor.prepare(folder, 400, seed=1)
    return folder, np.load(folder / "probs.npy")


def test_labels_follow_the_distribution_of_the_text(made):
    """It is computed again from the written words of one row; class shares are its mean, within four deviations."""
    folder, probs = made
    rows = loading.read_rows(folder / "train.csv", labelled=True)
    worth = dict(zip(*known_floor.make_words(), strict=True))
    a, b = (rows.loc[7, name][0].split() for name in ("response_a", "response_b"))
    d = sum(worth[w] for w in a) - sum(worth[w] for w in b) + known_floor.LENGTH_WORTH * (len(a) - len(b))
    np.testing.assert_allclose(probs[7], softmax([d, -d, 0.0]), atol=1e-9)
    variances = (probs * (1 - probs)).mean(axis=0) / len(rows)
    assert (np.abs(class_shares(rows["label"]) - probs.mean(axis=0)) < 4 * np.sqrt(variances)).all()
    losses, entropy = row_losses(rows["label"], probs), -(probs * np.log(probs)).sum(axis=1)
    assert abs(losses.mean() - entropy.mean()) < 4 * losses.std() / np.sqrt(len(rows))


def test_a_variant_is_compared_with_the_floor_of_its_own_validation_rows(made):
    """Two layers, ours: far from the floor, and no better than it; 360 rows in steps of 32, two epochs."""
    folder, probs = made
    found = known_floor.run_variant("ours", folder, seed=42)
    assert found["floor"] < found["log_loss"] < found["prior"] + 0.05
    assert probs.min() > 0 and found["steps"] == 24
