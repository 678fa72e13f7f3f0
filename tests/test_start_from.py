"""Networks that start from a baseline: saved, predicted, resumed, and judged by what their encoder adds."""

import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import read_tree, run_arguments
from scipy.special import softmax

from prefcls_lib import cli
from prefcls_lib.baselines.columns import read_inputs
from prefcls_lib.baselines.estimators import ENSEMBLE, MEMBERS, MODELS
from prefcls_lib.baselines.out_of_fold import fit_out_of_fold
from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.features import FEATURE_NAMES, FeatureScaler
from prefcls_lib.data.loading import read_rows
from prefcls_lib.data.schema import RESPONSES, SWAP
from prefcls_lib.data.splits import assign_folds
from prefcls_lib.data.tokenization import encode_rows
from prefcls_lib.evaluation import compare, scores
from prefcls_lib.evaluation.calibration import fit_calibration_on
from prefcls_lib.models.backbones import load_backbone
from prefcls_lib.models.recipes import RECIPES
from prefcls_lib.models.saved import build_model, load_fold_model
from prefcls_lib.pipeline import offsets, preview, results, steps
from prefcls_lib.runtime.devices import make_accelerator, seed_everything
from prefcls_lib.runtime.files import read_json
from prefcls_lib.training.loop import fit

LOGISTIC = ("folds=[0]", "start_from=structure_logistic", "learning_rate=0.001")


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    """A finished run that starts from structure_logistic."""
    out = tmp_path_factory.mktemp("start") / "run"
    assert cli.main(run_arguments(home, out, *LOGISTIC)) == 0
    return out


def test_result_says_what_the_encoder_adds(run):
    """encoder_share is network minus baseline on the validated rows; the baseline is in the ladder, too."""
    result = read_json(run / "result.json")
    assert result["encoder_share"]["difference"] == pytest.approx(result["log_loss"] - result["baseline_log_loss"])
    assert result["encoder_share"]["low"] <= result["encoder_share"]["difference"] <= result["encoder_share"]["high"]
    (entry,) = [line for line in result["ladder"] if line["rung"] == "structure_logistic"]
    assert entry["log_loss"] == pytest.approx(result["baseline_log_loss"])
    assert {*MEMBERS, ENSEMBLE} < {line["rung"] for line in result["ladder"]}  # the verdict is against the strongest
    history = pd.read_csv(run / "history.csv")
    assert result["encoder_only_log_loss"] == pytest.approx(history["encoder_log_loss"].iloc[-1])


def test_ladder_shows_the_members_of_the_start_without_fitting_them_again(home, tmp_path):
    """Started from the ensemble, its members are in the ladder with the inner models' own predictions."""
    places = {"train": str(home / "train.csv"), "test": str(home / "test.csv"), "out": str(tmp_path / "run")}
    job = steps.start(RunConfig(**places, backbone=str(home / "backbone"), num_folds=3, max_length=32))
    ladder = steps.run_ladder(job)
    assert list(ladder)[-3:] == [*MEMBERS, ENSEMBLE]
    start, here = offsets.fold_offset(job, 0), job.folds == 0
    inputs = read_inputs(job.rows[here])
    for name in MEMBERS:
        expected = start.baseline.member(name).predict_proba(inputs)
        np.testing.assert_allclose(ladder[name].probs[here], expected, atol=1e-12)


def test_result_in_words():
    """Each comparison is a table of one; what an encoder that adds nothing needs comes once, at the end."""
    better = {"difference": -0.0164, "low": -0.0255, "high": -0.0072, "p": 0.0004, "smallest_detectable": 0.013}
    unclear = {"difference": 0.0003, "low": -0.001, "high": 0.0016, "p": 0.672, "smallest_detectable": 0.002}
    counts = {"rows": 154, "groups": 153}
    result = {"comparison": better | counts, "ladder_log_loss": 1.08, "start_from": "structure_tfidf",
              "encoder_share": unclear | counts, "baseline_log_loss": 1.0729, "encoder_warnings": {}}  # fmt: skip
    lines = [
        "network BEATS the best baselines, chosen on other rows (1.0800): log loss 0.0164 lower (95 % CI -0.0255 to "
        "-0.0072, p<0.001) on 154 validation rows; a difference of 0.0130 would be found in 80 % of such samples",
        "with the encoder, the log loss is 0.0003 higher (95 % CI -0.0010 to +0.0016, p=0.672) than with "
        "structure_tfidf alone (1.0729)",
    ]
    assert results.verdict(result).splitlines() == lines
    assert results.verdict(result | {"start_from": "none"}).splitlines() == lines[:1]
    warned = results.verdict(result | {"encoder_warnings": {"fold0": "why", "fold1": "why"}}).splitlines()
    assert warned[2:] == [*(f"fold{n}: the encoder does not contribute: why" for n in (0, 1)), results.TRY_NEXT]
    earlier = {"comparison": {**unclear, **counts, "verdict": "TIES"}, "ladder_log_loss": 1.08}
    del earlier["comparison"]["p"]
    assert results.verdict(earlier).startswith("network INCONCLUSIVE against the best baselines")


def test_saved_network_swaps_exactly(run, home):
    """A and B in each other's place in the rows: the probabilities are permuted, to the bit."""
    rows = read_rows(home / "test.csv", labelled=False)
    swapped = rows.rename(columns=dict(zip(RESPONSES, RESPONSES[::-1], strict=True)))
    model = load_fold_model(run / "model" / "fold0")
    np.testing.assert_array_equal(model.predict_proba(swapped)[:, list(SWAP)], model.predict_proba(rows))


def test_untrained_network_has_the_log_loss_of_its_baseline(home, tmp_path):
    """Before a step the network predicts what the baseline does, so their log losses agree."""
    settings = {
        "backbone": str(home / "backbone"),
        "num_folds": 3,
        "max_length": 32,
        "start_from": "structure_logistic",
    }
    places = {"train": str(home / "train.csv"), "test": str(home / "test.csv"), "out": str(tmp_path / "run")}
    job = steps.start(RunConfig(**settings, **places))
    start = offsets.fold_offset(job, 0)
    labels = job.rows["label"].to_numpy()[job.folds == 0]
    expected = scores.log_loss(labels, softmax(start.valid, axis=1))
    assert preview.untrained_log_loss(job, steps.encode(job), len(labels)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_network_without_its_baseline_predicts_nothing(run, home, tmp_path, capsys, damage):
    """The message names the folder or file; exit code 2; an older submission stays as it was."""
    copy, out = tmp_path / "run", tmp_path / "submission.csv"
    shutil.copytree(run, copy)
    out.write_text("older", encoding="utf-8")
    if damage == "missing":
        shutil.rmtree(copy / "model" / "fold0" / "baseline")
    else:
        (copy / "model" / "fold0" / "baseline" / "baseline.safetensors").write_bytes(b"cut off")
    assert cli.main(["predict", "--run", str(copy), "--test", str(home / "test.csv"), "--out", str(out)]) == 2
    assert "baseline" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == "older"


def test_unknown_baseline_names_the_nearest(home, tmp_path, capsys):
    """start_from=structure_tfdif: choose one of four, did you mean structure_tfidf?"""
    assert cli.main(run_arguments(home, tmp_path / "run", "start_from=structure_tfdif")) == 2
    assert "Did you mean 'structure_tfidf'?" in capsys.readouterr().err


def test_the_original_recipe_starts_from_none(home, tmp_path):
    """The study's networks had no baseline; the setting can be given all the same."""
    out = tmp_path / "run"
    assert cli.main(run_arguments(home, out, "recipe=original", "folds=[0]")) == 0
    assert read_json(out / "config.json")["settings"]["start_from"] == "none"
    assert not (out / "model" / "fold0" / "baseline").exists()


def test_resumed_run_does_not_fit_its_baseline_again(home, tmp_path, monkeypatch):
    """Killed in training: the baseline is read from the checkpoint, and the end is the same to the byte."""
    real, fits = offsets.fit_out_of_fold, []
    monkeypatch.setattr(offsets, "fit_out_of_fold", lambda *given: fits.append(given) or real(*given))

    def interrupt(*_):
        raise KeyboardInterrupt

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.main(run_arguments(home, whole, *LOGISTIC)) == 0
    with monkeypatch.context() as patch:
        patch.setattr("prefcls_lib.pipeline.folds.fit", interrupt)
        assert cli.main(run_arguments(home, killed, *LOGISTIC)) == 130
    assert cli.main(run_arguments(home, killed, *LOGISTIC)) == 0
    assert len(fits) == 2
    assert (killed / "submission.csv").read_bytes() == (whole / "submission.csv").read_bytes()
    name = "model/fold0/baseline/baseline.safetensors"
    assert read_tree(killed)[name] == read_tree(whole)[name]


def test_extra_rows_train_the_baseline_too(home, tmp_path, monkeypatch):
    """60 rows in three folds: 40 train fold 0, and with the same rows as extra ones those of the 40 once more."""
    real, sizes = offsets.fit_out_of_fold, []
    monkeypatch.setattr(offsets, "fit_out_of_fold", lambda *given: sizes.append(len(given[2])) or real(*given))
    rows = pd.read_csv(home / "train.csv", dtype=str, keep_default_na=False)
    rows.assign(id="x" + rows["id"]).to_csv(tmp_path / "extra.csv", index=False)
    for name, more in (("plain", ()), ("extra", (f"extra_train={tmp_path / 'extra.csv'}",))):
        assert cli.main(run_arguments(home, tmp_path / name, *LOGISTIC, *more)) == 0
    assert sizes[1] == 2 * sizes[0]


def test_scores_are_calibrated_on_top_of_the_offset():
    """Votes drawn from offset + score / 2 + [0, 0, 0.5]: temperature and tie bias are found again."""
    random = np.random.default_rng(0)
    m, t, score = random.normal(size=(3, 20_000))
    offset = np.column_stack([m, -m, t])
    scores = np.column_stack([score, -score, 0 * score])
    probs = softmax(offset + scores / 2 + np.array([0, 0, 0.5]), axis=1)
    labels = (random.random((len(probs), 1)) > probs.cumsum(axis=1)).sum(axis=1)
    found = fit_calibration_on(offset, scores, labels)
    assert (found.temperature, found.tie_bias) == (pytest.approx(2, abs=0.1), pytest.approx(0.5, abs=0.05))


def share_of_the_encoder(tiny, rows: pd.DataFrame, inputs, encoded, seed: int, leak: bool) -> compare.Comparison:
    """Network against baseline on rows whose labels are drawn from a baseline; `leak`: a feature gives them away."""
    groups = rows["group"].to_numpy()
    truth = MODELS["structure_logistic"].fit(inputs, rows["label"].to_numpy(), 1.0).predict_proba(inputs)
    random = np.random.default_rng(seed)
    labels = (random.random((len(rows), 1)) > truth.cumsum(axis=1)).sum(axis=1)
    is_train = assign_folds(rows.assign(label=labels), 2, seed) == 0
    train, valid = np.flatnonzero(is_train), np.flatnonzero(~is_train)
    baseline, nested = fit_out_of_fold("structure_logistic", inputs.take(train), labels[train], groups[train], seed)
    offset = np.empty((len(rows), 3), np.float32)
    offset[train], offset[valid] = nested, baseline.predict(inputs.take(valid))
    features = (
        FeatureScaler.fit(inputs.dense[:, : len(FEATURE_NAMES)][train]).transform(inputs.structure).astype(np.float32)
    )
    if leak:
        features[:, :1] = 4.0 * (labels[:, None] == 0) - 4.0 * (labels[:, None] == 1)
    examples = Examples(encoded.token_ids, encoded.sides, features, labels, offsets=offset)
    settings = {"learning_rate": 1e-3, "num_epochs": 2, "batch_size": 16, "mixed_precision": "no", "seed": seed}
    config = RunConfig(**settings, start_from="structure_logistic").with_recipe(RECIPES["bert"])
    seed_everything(seed)
    model = build_model(tiny, config)
    model.head.start_at_prior((0.35, 0.35, 0.3))
    fitted = fit(model, examples.take(train), examples.take(valid), config, make_accelerator("no"), 0)
    return compare.compare(labels[valid], fitted.valid_probs[-1], softmax(offset[valid], axis=1), groups[valid])


@pytest.mark.parametrize("leak", [False, True])
def test_encoder_adds_nothing_where_the_baseline_knows_everything(tiny, sample_rows, leak):
    """In six draws the interval lies below zero at most once; with a leak planted in the features, in all of them."""
    inputs = read_inputs(sample_rows, with_text=False)
    encoded = encode_rows(sample_rows, load_backbone(str(tiny), 32).tokenizer, 32, "none")
    shares = [share_of_the_encoder(tiny, sample_rows, inputs, encoded, seed, leak) for seed in range(6)]
    below = sum(share.high < 0 for share in shares)
    assert below == 6 if leak else below <= 1
