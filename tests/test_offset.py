"""The baseline as a network's starting point: log-odds by hand, strictly nested in the training rows, exact swaps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax

from prefcls_lib.baselines import offset
from prefcls_lib.baselines.columns import read_inputs
from prefcls_lib.baselines.estimators import ENSEMBLE, MEMBERS, fit_baseline
from prefcls_lib.baselines.offset import BaselineMean, fit_offset, log_odds
from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples
from prefcls_lib.data.features import SIGNS
from prefcls_lib.data.schema import RESPONSES, SWAP
from prefcls_lib.evaluation.scores import log_loss
from prefcls_lib.models.network import PreferenceHead
from prefcls_lib.models.recipes import RECIPES
from prefcls_lib.models.saved import build_model
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training.optim import parameter_groups
from prefcls_lib.training.step import training_loss

NAME = "structure_logistic"


@pytest.fixture(scope="module")
def known(sample_rows):
    """Inputs, labels and prompt groups of 120 shipped rows."""
    return read_inputs(sample_rows, (NAME,)), sample_rows["label"].to_numpy(), sample_rows["group"].to_numpy()


@pytest.fixture
def fixed_strength(monkeypatch):
    """The strength is chosen on all training rows, so it may move with any label; here it stays."""
    monkeypatch.setattr(offset, "choose_strength", lambda *_: 0.01)


def test_log_odds_by_hand():
    """Of (.5, .125, .375): m = ln(4) / 2, t = ln .375 - (ln .5 + ln .125) / 2 = ln 1.5."""
    found = log_odds(np.array([[0.5, 0.125, 0.375]]))
    assert found == pytest.approx(np.log([[2, 0.5, 1.5]]))
    assert softmax(found, axis=1) == pytest.approx(np.array([[0.5, 0.125, 0.375]]))


def test_offset_of_a_training_row_does_not_know_its_label(known, fixed_strength):
    """Other labels for all rows of one prompt change the offsets of other rows, and not those of this prompt's rows."""
    inputs, labels, groups = known
    _, before = fit_offset(NAME, inputs, labels, groups, seed=1)
    here = groups == groups[7]
    _, after = fit_offset(NAME, inputs, np.where(here, (labels + 1) % 3, labels), groups, seed=1)
    np.testing.assert_array_equal(after[here], before[here])
    assert not np.allclose(after[~here], before[~here])


def test_offset_of_an_ensemble_is_the_mean_of_its_members(sample_rows, known, tmp_path):
    """Of training rows and of others, also after saving; `member` finds the models of one of them."""
    inputs, (_, labels, groups) = read_inputs(sample_rows, (ENSEMBLE,)), known
    baseline, offsets = fit_offset(ENSEMBLE, inputs, labels, groups, seed=1)
    members = [fit_offset(name, inputs, labels, groups, seed=1) for name in MEMBERS]
    np.testing.assert_allclose(offsets, np.mean([values for _, values in members], axis=0), atol=1e-12)
    expected = [member.predict(inputs) for member, _ in members]
    np.testing.assert_allclose(baseline.predict(inputs), np.mean(expected, axis=0), atol=1e-12)
    baseline.save(tmp_path)
    loaded = BaselineMean.load(tmp_path)
    for name, values in zip(MEMBERS, expected, strict=True):
        np.testing.assert_array_equal(loaded.member(name).predict(inputs), values)


def test_labels_without_meaning_give_no_gain(known, fixed_strength):
    """On random labels nested offsets are no better than the class shares; a fit on the same rows seems to be."""
    inputs, labels, groups = known
    labels = np.random.default_rng(0).integers(0, 3, len(labels))
    shares = np.tile(np.bincount(labels, minlength=3) / len(labels), (len(labels), 1))
    _, nested = fit_offset(NAME, inputs, labels, groups, seed=1)
    leaking = fit_baseline(NAME, inputs, labels, groups, seed=1, strength=0.01).predict_proba(inputs)
    assert log_loss(labels, softmax(nested, axis=1)) > log_loss(labels, shares)
    assert log_loss(labels, leaking) < log_loss(labels, shares) - 0.01


def test_other_rows_get_the_geometric_mean_of_the_inner_models(known, sample_rows, tmp_path, fixed_strength):
    """Five models; their log-odds averaged; the same after saving, and permuted exactly when A and B change places."""
    inputs, labels, groups = known
    fitted, _ = fit_offset(NAME, inputs, labels, groups, seed=1)
    assert len(fitted.models) == 5
    probs = softmax(fitted.predict(inputs), axis=1)
    mean = np.exp(np.mean([np.log(model.predict_proba(inputs)) for model in fitted.models], axis=0))
    np.testing.assert_allclose(probs, mean / mean.sum(axis=1, keepdims=True), rtol=1e-12)
    swapped = sample_rows.rename(columns=dict(zip(RESPONSES, RESPONSES[::-1], strict=True)))
    swapped = read_inputs(swapped, (NAME,))
    np.testing.assert_array_equal(fitted.predict(swapped), fitted.predict(inputs)[:, list(SWAP)])
    fitted.save(tmp_path)
    np.testing.assert_array_equal(BaselineMean.load(tmp_path).predict(inputs), fitted.predict(inputs))


def test_rows_are_predicted_in_blocks(known, monkeypatch, fixed_strength):
    """However many rows are read at a time, the offsets are the same up to rounding."""
    fitted, _ = fit_offset(NAME, *known, seed=1)
    whole = fitted.predict(known[0])
    monkeypatch.setattr(offset, "ROWS_AT_ONCE", 50)
    np.testing.assert_allclose(fitted.predict(known[0]), whole, rtol=1e-12)


def test_parallel_processes_give_the_same(known, monkeypatch, fixed_strength):
    """Inner models that are fitted in processes of their own are the same to the bit."""
    one, values = fit_offset(NAME, *known, seed=1)
    monkeypatch.setattr(offset, "MIN_ROWS_TO_SHARE", 0)
    monkeypatch.setattr(offset.joblib, "cpu_count", lambda: 2)
    other, shared = fit_offset(NAME, *known, seed=1)
    np.testing.assert_array_equal(shared, values)
    np.testing.assert_array_equal(other.models[4].state["w"], one.models[4].state["w"])


def test_class_missing_in_an_inner_fold(known, capsys, fixed_strength):
    """All ties share a prompt: the inner model without it has no tie to learn, and predicts the class shares."""
    inputs, labels, groups = known
    labels = np.where(groups == groups[7], 2, np.arange(len(labels)) % 2)
    fitted, values = fit_offset(NAME, inputs, labels, groups, seed=1, label="fold0")
    assert [model.name for model in fitted.models].count("prior") == 1
    assert np.isfinite(values).all()
    assert "a class is missing in an inner fold" in capsys.readouterr().out


def test_missing_or_broken_baseline_is_named(known, tmp_path, fixed_strength):
    """The message has the folder or the file."""
    with pytest.raises(UserError, match="a baseline's models are missing"):
        BaselineMean.load(tmp_path)
    fit_offset(NAME, *known, seed=1)[0].save(tmp_path)
    (tmp_path / "inner3" / "arrays.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="inner3"):
        BaselineMean.load(tmp_path)


def make_head(**settings) -> PreferenceHead:
    """A head on a baseline, its last layers not at zero."""
    torch.manual_seed(0)
    head = PreferenceHead(8, True, True, 0.0, on_baseline=True, **settings)
    for layer in (head.output, head.correction, head.wide):
        torch.nn.init.normal_(layer.weight, std=0.1)
    return head


def random_inputs(rows: int = 5):
    """u, v (B, 8), structure features and offsets (m, -m, t) of some rows."""
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(2, rows, 8, generator=generator)
    m, t = torch.randn(2, rows, generator=generator)
    return u, v, torch.randn(rows, len(SIGNS), generator=generator), torch.stack([m, -m, t], dim=1)


@pytest.mark.parametrize("architecture", ["siamese", "cross"])
def test_head_on_a_baseline_is_exactly_order_equivariant(architecture):
    """A and B in each other's place permute both outputs, to the bit."""
    head, (u, v, x, offset) = make_head(architecture=architecture), random_inputs()
    swapped = head.outputs(v, u, x * head.signs, offset[:, list(SWAP)])
    for found, other in zip(head.outputs(u, v, x, offset), swapped, strict=True):
        assert torch.equal(other[:, list(SWAP)], found)


def test_untrained_network_predicts_what_the_baseline_does():
    """With its last layers at zero the correction is zero, and the auxiliary output is the prior."""
    head, (u, v, x, offset) = make_head(), random_inputs()
    head.start_at_prior((0.5, 0.25, 0.25))
    logits, auxiliary = head.outputs(u, v, x, offset)
    assert torch.equal(logits, offset)
    assert torch.softmax(auxiliary, dim=1)[0].tolist() == pytest.approx([0.375, 0.375, 0.25])


def test_loss_on_a_baseline_by_hand():
    """Cross-entropy of both outputs: labels A, tie; logits 0 have ln 3 each, the offset's probability 1/2 has ln 2."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]))
    examples = Examples([], np.zeros((2, 2), dtype=int), labels=np.array([0, 2]), offsets=np.zeros((2, 3), np.float32))
    found = training_loss((logits, torch.zeros(2, 3)), examples, np.arange(2), label_smoothing=0.0)
    assert float(found) == pytest.approx(2 * np.log(2) + 2 * np.log(3))
    alone = training_loss((logits, torch.zeros(2, 3)), replace(examples, offsets=None), np.arange(2), 0.0)
    assert float(alone) == pytest.approx(2 * np.log(2))


def test_encoder_learns_beside_a_perfect_offset():
    """Where the offset explains every label, the correction has no gradient, and the auxiliary output still has."""
    head, (u, v, x, _) = make_head(), random_inputs()
    u.requires_grad_()
    offset = torch.tensor([[40.0, -40.0, -40.0]]).repeat(5, 1)
    logits, auxiliary = head.outputs(u, v, x, offset)
    examples = Examples([], np.zeros((5, 2), dtype=int), labels=np.zeros(5, dtype=int), offsets=offset.numpy())
    (alone,) = torch.autograd.grad(
        training_loss((logits, auxiliary), replace(examples, offsets=None), np.arange(5), 0.0), u, retain_graph=True
    )
    (both,) = torch.autograd.grad(training_loss((logits, auxiliary), examples, np.arange(5), 0.0), u)
    assert float(alone.abs().max()) < 1e-6
    assert float(both.abs().max()) > 1e-3


def test_correction_learns_slower_than_the_head(tiny):
    """The head's rate is 5e-4 and the correction's 2e-4: it starts at a good prediction."""
    config = RunConfig(start_from="structure_logistic").with_recipe(RECIPES["bert"])
    model = build_model(tiny, config)
    rates = {id(p): group["peak"] for group in parameter_groups(model, config) for p in group["params"]}
    assert rates[id(model.head.output.weight)] == 5e-4
    assert rates[id(model.head.correction.weight)] == rates[id(model.head.correction.bias)] == pytest.approx(2e-4)
