"""The learning-curve study: what trains and what scores, that a point is made once; what the report shows of it."""

import numpy as np
import pandas as pd
import pytest

from prefcls_lib.data import loading
from prefcls_lib.evaluation import compare
from prefcls_lib.pipeline import steps
from prefcls_lib.runtime.files import read_json
from report.studies import learning_curve


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
    for name, value in (("max_length", 32), ("start_from", "structure_logistic")):
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
