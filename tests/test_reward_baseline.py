"""The ladder's reward baseline: a logistic model of structure features and a reward model's margins."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import run_arguments
from sklearn.linear_model import LogisticRegression
from test_reward import encode, own_scores

from prefcls_lib import cli
from prefcls_lib.baselines import columns, estimators
from prefcls_lib.config import RunConfig
from prefcls_lib.data import loading
from prefcls_lib.data.features import SIGNS, FeatureScaler, compute_features
from prefcls_lib.data.schema import LABEL_COLUMNS, MARGIN, SWAP
from prefcls_lib.ensemble import submit
from prefcls_lib.models.saved import load_scorer
from prefcls_lib.pipeline.folder import read_table
from prefcls_lib.runtime.files import read_json

NAME = columns.REWARD_BASELINE
PROBS = list(LABEL_COLUMNS)


@pytest.fixture(scope="module")
def reward(reward_folders) -> Path:
    return reward_folders["bert"]


@pytest.fixture(scope="module")
def scorer(reward):
    return load_scorer(RunConfig(init_from=str(reward), max_length=48, mixed_precision="no", start_from="none"))


def test_margins_are_those_of_the_reward_model_itself(scorer, reward, sample_rows):
    """Score of A minus score of B, as transformers computes them one text at a time."""
    rows = sample_rows.head(30)
    scores = own_scores(reward, encode(rows, reward))
    np.testing.assert_allclose(scorer.add_margins(rows)[MARGIN], scores[:, 0] - scores[:, 1], atol=1e-5)


def test_it_is_scikit_learns_logistic_regression_on_the_margins(scorer, sample_rows):
    """On rows and swapped copies, of columns made by hand: the same probabilities on rows that are not odd."""
    rows = scorer.add_margins(sample_rows)
    labels, margins = rows["label"].to_numpy(), rows[MARGIN].to_numpy()
    inputs = columns.read_inputs(rows, [NAME])
    ours = estimators.fit_baseline(NAME, inputs, labels, rows["group"].to_numpy(), 0, 0.02).predict_proba(inputs)
    structure = compute_features(rows)
    structure = FeatureScaler.fit(structure).transform(structure)
    unit = 8 * margins / np.sqrt((margins**2).mean())
    anti = np.column_stack([structure[:, SIGNS < 0], unit])
    sym = np.column_stack([structure[:, SIGNS > 0], np.abs(unit)])
    doubled = np.vstack([np.hstack([anti, sym]), np.hstack([-anti, sym])])
    model = LogisticRegression(C=0.02, solver="newton-cg", tol=1e-10, max_iter=1000)
    theirs = model.fit(doubled, np.concatenate([labels, np.array(SWAP)[labels]])).predict_proba(doubled[: len(rows)])
    ordinary = inputs.kinds == columns.ORDINARY
    assert ordinary.sum() > 100
    np.testing.assert_allclose(ours[ordinary], theirs[ordinary], atol=2e-3)


def test_swapped_answers_swap_the_probabilities(scorer, sample_rows):
    """Exactly, for the margin of a swapped row is the negative one, to the bit."""
    rows = scorer.add_margins(sample_rows)
    inputs = columns.read_inputs(rows, [NAME])
    model = estimators.fit_baseline(NAME, inputs, rows["label"].to_numpy(), rows["group"].to_numpy(), 0, 0.02)
    swapped = sample_rows.rename(columns={"response_a": "response_b", "response_b": "response_a"})
    again = model.predict_proba(columns.read_inputs(scorer.add_margins(swapped), [NAME]))
    np.testing.assert_allclose(again[:, list(SWAP)], model.predict_proba(inputs), rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def votes(scorer, tmp_path_factory) -> Path:
    """A folder with train.csv, 90 shipped rows with the reward model's own verdict for a vote, and test.csv."""
    folder = tmp_path_factory.mktemp("votes")
    rows = loading.read_rows(loading.sample_path("train"), labelled=True).iloc[200:290].reset_index(drop=True)
    margins = scorer.add_margins(rows)[MARGIN]
    near = margins.abs() < margins.abs().quantile(0.3)
    rows["label"] = np.where(near, 2, np.where(margins > 0, 0, 1))
    loading.write_rows(folder / "train.csv", rows)
    loading.write_rows(folder / "test.csv", rows.drop(columns=["label", "model_a", "model_b"]).head(12))
    return folder


def ladder_arguments(votes: Path, out: Path, *settings: str) -> list[str]:
    _, *arguments = run_arguments(votes, out, "max_length=48", "mixed_precision=no", *settings)
    return ["ladder", *arguments]


@pytest.fixture(scope="module")
def ladder(votes, reward, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ladder") / "run"
    assert cli.main(ladder_arguments(votes, out, f"init_from={reward}")) == 0
    return out


@pytest.fixture(scope="module")
def plain(votes, tmp_path_factory) -> Path:
    """The same without a reward model."""
    out = tmp_path_factory.mktemp("plain") / "run"
    assert cli.main(ladder_arguments(votes, out)) == 0
    return out


def test_ladder_has_it_only_with_a_reward_model(ladder, plain):
    """Where the votes follow the reward model it is by far the best; without one it is absent, and nothing is saved."""
    table = pd.read_csv(ladder / "history.csv").set_index("rung")["log_loss"]
    assert table.idxmin() == NAME and table[NAME] < table.drop(NAME).min() - 0.1
    assert (ladder / "model" / "reward" / "model.safetensors").is_file()
    assert list(pd.read_csv(plain / "history.csv")["rung"]) == list(estimators.BASELINES)
    assert not (plain / "model" / "reward").exists()


def test_saved_and_predicted_like_the_others(ladder, plain, votes, tmp_path, monkeypatch):
    """`predict`, and what is submitted, give the submission again from the run folder alone, and so does a blend."""
    monkeypatch.setattr("prefcls_lib.models.saved.load_scorer", None)  # the reward model's own folder is not needed
    expected = read_table(ladder / "submission.csv")[PROBS].to_numpy()
    again = tmp_path / "again.csv"
    assert cli.main(["predict", "--run", str(ladder), "--test", str(votes / "test.csv"), "--out", str(again)]) == 0
    np.testing.assert_array_equal(read_table(again)[PROBS].to_numpy(), expected)
    ensemble = submit._used_runs([ladder], submit.Blend((1.0,), submit.Calibration()), "one run")
    rows = loading.read_rows(votes / "test.csv", labelled=False)
    record = submit.predict_within(ensemble, rows, tmp_path / "submit.csv", 1.0)
    assert record["left_out"] == []
    np.testing.assert_allclose(read_table(tmp_path / "submit.csv")[PROBS].to_numpy(), expected, atol=1e-9)
    assert cli.main(["blend", "--runs", str(ladder), str(plain), "--out", str(tmp_path / "blend.json")]) == 0
    assert read_json(tmp_path / "blend.json")["weights"][0] > 0.5


def test_what_is_no_reward_model_is_refused_before_the_folder_is_opened(votes, tiny, tmp_path, capsys):
    """An encoder has no score."""
    assert cli.main(ladder_arguments(votes, tmp_path / "run", f"init_from={tiny}")) == 2
    assert "is BertModel. A reward model is" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
