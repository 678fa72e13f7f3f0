"""Networks that start from a baseline: what is kept of it, and what is said of what their encoder adds."""

import numpy as np
import pandas as pd
import pytest
from accelerate.utils import set_seed
from conftest import run_arguments
from scipy.special import softmax

from prefcls_lib import cli
from prefcls_lib.baselines.columns import read_inputs
from prefcls_lib.baselines.estimators import ENSEMBLE, MEMBERS, MODELS
from prefcls_lib.baselines.out_of_fold import fit_out_of_fold
from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.schema import LABEL_COLUMNS
from prefcls_lib.data.splits import assign_folds
from prefcls_lib.data.tokenization import encode_rows
from prefcls_lib.evaluation import compare
from prefcls_lib.evaluation.calibration import fit_calibration_on
from prefcls_lib.models.backbones import load_backbone
from prefcls_lib.models.predict import predict_proba
from prefcls_lib.models.recipes import RECIPES
from prefcls_lib.models.saved import build_model
from prefcls_lib.pipeline import folds, steps
from prefcls_lib.pipeline.job import load_baseline, open_folder, read_job
from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.training.loop import fit


def config_of(home, out, *settings: str) -> RunConfig:
    """The settings of `run_arguments`."""
    return cli._config(cli._parser().parse_args(run_arguments(home, out, *settings)))


def test_members_of_the_ensemble_are_shown_without_fitting_them_again(home, tmp_path):
    """Started from the ensemble, its members are among the baselines with the inner models' own predictions."""
    job = open_folder(read_job(config_of(home, tmp_path / "run", "start_from=structure_ensemble")))
    predictions = steps.fit_baselines(job)
    assert list(dict.fromkeys(predictions["model"]))[-3:] == [*sorted(MEMBERS), ENSEMBLE]
    (baseline, _), inputs = load_baseline(job.folder, 0), read_inputs(job.rows[job.rows["fold"] == 0])
    for name in MEMBERS:
        probs = predictions.loc[predictions["model"] == name, list(LABEL_COLUMNS)].to_numpy()
        np.testing.assert_allclose(probs, baseline.members()[name].predict_proba(inputs), atol=1e-12)


@pytest.mark.parametrize("architecture", ["siamese", "cross"])
def test_untrained_network_predicts_what_its_baseline_does(home, tmp_path, architecture):
    """Before a step; with both architectures."""
    job = steps.prepare(steps.start(config_of(home, tmp_path / "run", f"architecture={architecture}")))
    steps.fit_baselines(job)
    accelerator, (train, valid, *_) = make_accelerator("no"), folds.split_rows(job, 0)
    probs, _ = predict_proba(folds.new_model(job, train, accelerator), valid, accelerator)
    offsets = load_baseline(job.folder, 0)[1][job.table["fold"] == 0]
    np.testing.assert_allclose(probs, softmax(offsets, axis=1), atol=1e-6)


def test_scores_are_calibrated_on_top_of_the_offset():
    """Votes drawn from offset + score / 200 + [0, 0, 0.5], scores of hundreds: both are found again."""
    random = np.random.default_rng(0)
    m, t, score = random.normal(size=(3, 20_000))
    offset = np.column_stack([m, -m, t])
    scores = np.column_stack([score, -score, 0 * score]) * 100
    probs = softmax(offset + scores / 200 + np.array([0, 0, 0.5]), axis=1)
    labels = (random.random((len(probs), 1)) > probs.cumsum(axis=1)).sum(axis=1)
    found = fit_calibration_on(offset, scores, labels)
    assert (found.temperature, found.tie_bias) == (pytest.approx(200, abs=10), pytest.approx(0.5, abs=0.05))


def share_of_the_encoder(tiny, rows: pd.DataFrame, inputs, encoded, seed: int, leak: bool) -> compare.Comparison:
    """Network against baseline on rows whose labels are drawn from a baseline; `leak`: the winner's tokens tell."""
    groups = rows["group"].to_numpy()
    truth = next(MODELS["structure_logistic"].fit_path(inputs, rows["label"].to_numpy(), [1.0])).predict_proba(inputs)
    random = np.random.default_rng(seed)
    labels = (random.random((len(rows), 1)) > truth.cumsum(axis=1)).sum(axis=1)
    is_train = assign_folds(rows.assign(label=labels), 2, seed) == 0
    train, valid = np.flatnonzero(is_train), np.flatnonzero(~is_train)
    baseline, nested = fit_out_of_fold("structure_logistic", inputs.take(train), labels[train], groups[train], seed)
    offset = np.empty((len(rows), 3), np.float32)
    offset[train], offset[valid] = nested, baseline.predict(inputs.take(valid))
    token_ids = [encoded.token_ids[side].copy() for side in encoded.sides.ravel()]
    for side in 2 * np.flatnonzero(labels < 2) + labels[labels < 2] if leak else []:
        token_ids[side][1::3] = 50
    examples = Examples(token_ids, np.arange(len(token_ids)).reshape(-1, 2), labels, offset)
    settings = {"learning_rate": 1e-3, "num_epochs": 2, "batch_size": 16, "mixed_precision": "no", "seed": seed}
    config = RunConfig(**settings, start_from="structure_logistic").with_recipe(RECIPES["bert"])
    set_seed(seed)
    model = build_model(tiny, config)
    model.head.start_at_prior((0.35, 0.35, 0.3))
    fitted = fit(model, examples.take(train), examples.take(valid), config, make_accelerator("no"))
    return compare.compare(labels[valid], fitted.valid_probs[-1], softmax(offset[valid], axis=1), groups[valid])


@pytest.mark.parametrize("leak", [False, True])
def test_encoder_adds_nothing_where_the_baseline_knows_everything(tiny, sample_rows, leak):
    """In three draws the interval lies below zero at most once; with a leak planted in the tokens, in all of them."""
    inputs = read_inputs(sample_rows, with_text=False)
    encoded = encode_rows(sample_rows, load_backbone(str(tiny), 32).tokenizer, 32, "none")
    shares = [share_of_the_encoder(tiny, sample_rows, inputs, encoded, seed, leak) for seed in range(3)]
    below = sum(share.high < 0 for share in shares)
    assert below == 3 if leak else below <= 1
