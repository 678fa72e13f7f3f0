"""Calibration and blends: worked out by hand, and fitted on other rows than those that they score."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from scipy.special import softmax

from prefcls_lib.data.schema import SWAP
from prefcls_lib.evaluation.calibration import NUM_PARTS, Blend, Calibration, blend_cross_fitted, fit_blend
from prefcls_lib.evaluation.compare import split_groups
from prefcls_lib.evaluation.scores import log_loss
from prefcls_lib.runtime.files import UserError


def _draw_labels(probs: np.ndarray, seed: int) -> np.ndarray:
    """Labels drawn from each row's probabilities, which are then perfectly calibrated."""
    uniform = np.random.default_rng(seed).uniform(size=(len(probs), 1))
    return (uniform > probs.cumsum(axis=1)[:, :2]).sum(axis=1)


def _random_probs(num_rows: int, seed: int) -> np.ndarray:
    return softmax(np.random.default_rng(seed).standard_normal((num_rows, 3)), axis=1)


def test_calibration_and_blend_by_hand():
    """Temperature 1/2 squares: (.5,.25,.25) -> (4,1,1)/6; a bias of ln 2 doubles the tie: (2,1,2)/5. Equal weights: the
    root of the products, (.4*.1, .2*.2, .4*.7) -> (.2, .2, .529)/.929."""
    probs = np.array([[0.5, 0.25, 0.25]])
    assert Calibration(temperature=0.5).apply(probs)[0] == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    assert Calibration(tie_bias=np.log(2)).apply(probs)[0] == pytest.approx([2 / 5, 1 / 5, 2 / 5])
    mean = Blend((0.5, 0.5), Calibration()).apply([np.array([[0.4, 0.2, 0.4]]), np.array([[0.1, 0.2, 0.7]])])
    roots = np.sqrt([0.04, 0.04, 0.28])
    assert mean[0] == pytest.approx(roots / roots.sum())


def test_fit_finds_the_temperature_and_bias_that_spoiled_the_probabilities():
    """Sharpened by 1/2 and a tie bias of .4 taken off: with rows enough, calibration gives both back."""
    true = _random_probs(60_000, 0)
    spoiled = softmax(2.0 * (np.log(true) - np.array([0, 0, 0.4])), axis=1)
    found = fit_blend(_draw_labels(true, 1), [spoiled]).calibration
    assert found.temperature == pytest.approx(2.0, rel=0.04)
    assert found.tie_bias == pytest.approx(0.4, abs=0.05)


def test_penalised_optimum_by_hand():
    """The derivatives vanish: 90 rows sure of a class to 3:1:1, 60 of them right, have n (q - r) ln 3 + 25 (power - 1)
    = 0 with q = 3^power / (3^power + 2); 90 uniform rows, 40 of them ties, have n p(tie) - 40 + 400 tie_bias = 0."""
    sure = np.full((3, 3), 0.2) + 0.4 * np.eye(3)
    labels = np.concatenate([[k] * 20 + [(k + 1) % 3] * 5 + [(k + 2) % 3] * 5 for k in range(3)])
    found = fit_blend(labels, [np.repeat(sure, 30, axis=0)]).calibration
    power = 1 / found.temperature
    right = 3**power / (3**power + 2)
    assert 90 * (right - 60 / 90) * np.log(3) + 50 * (power - 1) == pytest.approx(0, abs=1e-3)
    assert 1 < power < 1.26 and found.tie_bias == pytest.approx(0, abs=1e-5)  # ln 4 / ln 3 = 1.26 without a penalty
    found = fit_blend(np.repeat([0, 1, 2], [25, 25, 40]), [np.full((90, 3), 1 / 3)]).calibration
    tie = np.exp(found.tie_bias) / (np.exp(found.tie_bias) + 2)
    assert 90 * tie - 40 + 400 * found.tie_bias == pytest.approx(0, abs=1e-3) and found.tie_bias > 0.02
    assert found.temperature == pytest.approx(1.0)


def test_a_useless_second_member_costs_less_than_a_thousandth():
    """The truth and a copy of it with noise, 770 rows: the nested blend against the truth alone."""
    costs = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        signal = generator.normal(0, 0.35, (770, 3))
        truth, noisy = softmax(signal, axis=1), softmax(signal + generator.normal(0, 0.2, (770, 3)), axis=1)
        labels = _draw_labels(truth, 1000 + seed)
        nested = blend_cross_fitted(labels, [truth, noisy], np.arange(770).astype(str))
        costs.append(log_loss(labels, nested) - log_loss(labels, truth))
    assert 0 < np.mean(costs) < 0.001


def test_calibration_and_blend_swap_with_the_answers_exactly():
    """A and B share the bias: swapped probabilities come out swapped, to the bit, and swapped labels fit the same."""
    predictions = [_random_probs(50, seed) for seed in (2, 3)]
    labels = _draw_labels(predictions[0], 4)
    blend = fit_blend(labels, predictions)
    other = fit_blend(np.array(SWAP)[labels], [probs[:, list(SWAP)] for probs in predictions])
    assert other.weights == pytest.approx(blend.weights, abs=1e-6)
    assert asdict(other.calibration) == pytest.approx(asdict(blend.calibration), abs=1e-6)
    swapped = blend.apply([probs[:, list(SWAP)] for probs in predictions])
    assert (swapped[:, list(SWAP)] == blend.apply(predictions)).all()


def test_blend_gives_noise_no_weight_and_equal_informants_equal_weight():
    """Of 6,000 rows the penalties change little; the blend beats the better of two halves of the truth."""
    generator = np.random.default_rng(8)
    signals = generator.standard_normal((2, 6000, 3))
    labels = _draw_labels(softmax(signals.sum(axis=0), axis=1), 9)
    first, second = (softmax(signal, axis=1) for signal in signals)
    blend = fit_blend(labels, [first, second, _random_probs(6000, 10)])
    assert blend.weights == pytest.approx((0.5, 0.5, 0.0), abs=0.03) and sum(blend.weights) == pytest.approx(1.0)
    assert blend.calibration.temperature == pytest.approx(0.5, rel=0.05)
    nested = blend_cross_fitted(labels, [first, second], np.arange(6000).astype(str))
    assert log_loss(labels, nested) < min(log_loss(labels, first), log_loss(labels, second)) - 0.02


def test_a_nested_blend_never_sees_the_prompts_that_it_predicts():
    """A run that knows the labels of one part alone: the blend of all rows rushes to it, the nested one does not."""
    probs, groups = _random_probs(300, 13), np.arange(300).astype(str)
    labels, here = _draw_labels(probs, 14), split_groups(groups, NUM_PARTS, "calibration") == 0
    leaked = _random_probs(300, 15)
    leaked[here] = np.where(np.eye(3)[labels[here]] == 1, 0.98, 0.01)
    nested = blend_cross_fitted(labels, [probs, leaked], groups)
    assert nested.sum(axis=1) == pytest.approx(np.ones(300))
    fitted = fit_blend(labels, [probs, leaked]).apply([probs, leaked])
    taught = fit_blend(labels[~here], [probs[~here], leaked[~here]])
    assert (nested[here] == taught.apply([probs[here], leaked[here]])).all()
    assert log_loss(labels[here], fitted[here]) < log_loss(labels[here], nested[here]) - 0.02
    with pytest.raises(UserError, match="too few prompts"):
        blend_cross_fitted(labels, [probs], np.full(300, "one prompt"))


@pytest.mark.parametrize(
    "change",
    [{"weights": [0.5, 0.6]}, {"weights": [-0.5, 1.5]}, {"weights": None}, {"weights": []}, {"weights": ["a", 1.0]},
     {"temperature": 0.0}, {"temperature": float("nan")}, {"tie_bias": "a"}, {"tie_bias": float("inf")}],
)  # fmt: skip
def test_blend_comes_back_from_json_to_the_bit_and_a_broken_one_is_refused(change):
    """What blend.json holds gives the same probabilities after it is read; a value that cannot be right does not."""
    predictions = [_random_probs(30, seed) for seed in (16, 17)]
    blend = fit_blend(_draw_labels(predictions[0], 18), predictions)
    state = json.loads(json.dumps(blend.to_dict()))
    assert Blend.from_dict(state) == blend
    with pytest.raises((TypeError, ValueError)):
        Blend.from_dict({**state, **change})
