"""The study on unseen rows: no prompt in both parts, each number worked out from the saved predictions, made once."""

import numpy as np
import pandas as pd
import pytest

from prefcls_lib import cli
from prefcls_lib.data import loading
from prefcls_lib.ensemble.blend import predict_blend
from prefcls_lib.evaluation.calibration import Calibration
from prefcls_lib.runtime.files import UserError, read_json
from report.studies import unseen


def test_what_is_submitted_is_scored_on_prompts_that_trained_nothing(tiny, tmp_path, monkeypatch):
    """The blend is that of `prefcls predict --blend`; a calibration of single models is applied to the mean."""
    path, out = tmp_path / "rows.csv", tmp_path / "unseen"
    pd.read_csv(loading.sample_path("train"), dtype=str, keep_default_na=False).head(180).to_csv(path, index=False)
    arguments = ["unseen", str(path), "--out", str(out), "--parts", "3"]
    arguments += ["--set", f"backbone={tiny}", "--set", "max_length=32"]
    monkeypatch.setattr("sys.argv", arguments)
    unseen.main()
    result = read_json(out / "unseen.json")
    rows = unseen.split_file(path, 3, out)
    train = loading.read_rows(out / "train.csv", labelled=True)
    assert not set(train["group"]) & set(rows["group"])
    assert len(train) + len(rows) == 180
    assert (result["train_rows"], result["unseen_rows"]) == (len(train), len(rows))

    labels, probs = rows["label"].to_numpy(), {name: np.load(out / f"{name}.npy") for name in ("ladder", "network")}
    probs["blend"] = predict_blend(out / "blend.json", rows)
    losses = {name: -np.log(values[np.arange(len(labels)), labels]).mean() for name, values in probs.items()}
    assert result["log_loss"] == pytest.approx(losses)
    network = result["calibrations"]["network"]
    calibrated = Calibration.from_dict(network["of_single_models"]).apply(probs["network"])
    assert network["log_loss"] == pytest.approx(-np.log(calibrated[np.arange(len(labels)), labels]).mean())
    difference = result["comparisons"]["network against ladder"]["difference"]
    assert difference == pytest.approx(losses["network"] - losses["ladder"])

    monkeypatch.setattr(cli, "main", lambda command: 2)
    with pytest.raises(UserError, match=r"prefcls ladder .*failed"):
        unseen.main()
