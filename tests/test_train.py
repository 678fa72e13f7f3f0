"""fit: gradients, rates, which loss is reported, and which weights are kept."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import KINDS
from sklearn.metrics import log_loss as sklearn_log_loss
from torch import nn

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples, TokenCount
from prefcls_lib.data.features import SIGNS
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import predict_proba
from prefcls_lib.models.recipes import RECIPES
from prefcls_lib.models.saved import build_model
from prefcls_lib.runtime.devices import make_accelerator, seed_everything
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training import loop, optim
from prefcls_lib.training import step as steps
from prefcls_lib.training.state import FitResult

PRIOR = (0.3, 0.2, 0.5)


def make_config(**settings) -> RunConfig:
    """Small settings, the rest as in BERT's recipe."""
    small = {"batch_size": 16, "num_epochs": 2, "validations_per_epoch": 1, "mixed_precision": "no"}
    small["start_from"] = "none"
    return RunConfig(**{**small, **settings}).with_recipe(RECIPES["bert"])


def make_model(folder, config: RunConfig, prior: tuple[float, float, float] = PRIOR) -> PreferenceModel:
    seed_everything(config.seed)
    model = build_model(folder, config)
    model.head.start_at_prior(prior)
    return model


def make_examples(num_rows: int, seed: int = 0, with_features: bool = False, longest: int = 24) -> Examples:
    """Sides of under `longest` random tokens; the one that holds token 50 wins, and where none does there is a tie."""
    random = np.random.default_rng(seed)
    token_ids, labels = [], random.integers(0, 3, num_rows)
    for label in labels:
        for side in range(2):
            ids = random.integers(100, 300, random.integers(4, longest)).astype(np.int32)
            if label == side:
                ids[1::3] = 50
            token_ids.append(ids)
    sides = np.arange(2 * num_rows).reshape(-1, 2)
    features = random.normal(size=(num_rows, len(SIGNS))).astype(np.float32) if with_features else None
    return Examples(token_ids, sides, features, labels)


def fit(model: PreferenceModel, config: RunConfig, train_examples: Examples, valid: Examples) -> FitResult:
    accelerator = make_accelerator(config.mixed_precision)
    return loop.fit(model, train_examples, valid, config, accelerator, model.encoder.config.pad_token_id)


def gradients(model: PreferenceModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference_gradients(model: PreferenceModel, examples: Examples, step: np.ndarray, smoothing: float) -> dict:
    """The gradient without any of the library's batching: all sides A, then all sides B, one mean loss."""
    model.zero_grad()
    pooled = []
    for side in range(2):
        texts = [torch.as_tensor(examples.token_ids[i].astype(np.int64)) for i in examples.sides[step, side]]
        pad_id = model.encoder.config.pad_token_id
        input_ids = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad_id)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in texts], batch_first=True)
        hidden = model.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        pooled.append((hidden * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))
    logits = model.head(*pooled, torch.as_tensor(examples.features[step]))
    labels = torch.as_tensor(examples.labels[step])
    nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing).backward()
    return gradients(model)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_give_the_gradient_of_the_whole_step(kind, backbone_folders):
    """One pair at a time, a few, all at once, and a plain loop written here: one gradient, smoothed too."""
    examples = make_examples(12, with_features=True)
    examples.sides[4] = examples.sides[5]  # sides that rows share, and a row with the same answer twice
    examples.sides[6, 0] = examples.sides[6, 1]
    step = np.array([8, 4, 5, 6, 1, 11, 0])
    model = make_model(backbone_folders[kind], make_config())
    for parameter in model.head.parameters():
        nn.init.normal_(parameter, std=0.1)
    expected = reference_gradients(model, examples, step, smoothing=0.1)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2
    for max_tokens in (16, 100, 10**6):
        config = make_config(label_smoothing=0.1)
        model.zero_grad()
        pad_id = model.encoder.config.pad_token_id
        loss_sum, _ = steps.train_step(model, examples, step, max_tokens, config, make_accelerator("no"), pad_id)
        found = gradients(model)
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-4, msg=name)
        with torch.no_grad():
            unsmoothed = nn.functional.cross_entropy(
                logits_of(model, examples, step), torch.as_tensor(examples.labels[step])
            )
        assert float(loss_sum) / 7 == pytest.approx(float(unsmoothed), abs=1e-5)


def logits_of(model: PreferenceModel, examples: Examples, step: np.ndarray) -> torch.Tensor:
    """Logits of some rows, each row on its own and unpadded."""
    logits = []
    for row in step:
        u, v = (
            model.encoder(input_ids=torch.as_tensor(examples.token_ids[i][None].astype(np.int64)))
            .last_hidden_state.mean(dim=1)
            for i in examples.sides[row]
        )  # fmt: skip
        logits.append(model.head(u, v, torch.as_tensor(examples.features[[row]])))
    return torch.cat(logits)


def test_tokens_of_a_step_by_hand(tiny):
    """Sides of 3, 8, 7 and 3 tokens, one in all three rows: 21 real; all four in one padded batch make 32 computed."""
    token_ids = [np.full(length, 110 + length, dtype=np.int32) for length in (3, 8, 7)] + [np.array([120] * 3)]
    examples = Examples(token_ids, np.array([[0, 1], [0, 2], [3, 0]]), None, np.array([0, 1, 2]))
    config = make_config(structure_features=False)
    model = make_model(tiny, config)
    _, tokens = steps.train_step(model, examples, np.arange(3), 100, config, make_accelerator("no"), pad_id=0)
    assert tokens == TokenCount(real=21, computed=32)


def test_learning_rate_factor_by_hand():
    """10 steps, 20 % warm-up: 1/3, 2/3, then 8/8 down to 1/8."""
    factors = [optim.learning_rate_factor(step, 10, 0.2) for step in range(10)]
    assert factors == pytest.approx([1 / 3, 2 / 3, *(n / 8 for n in range(8, 0, -1))])


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("total_steps", [1, 2, 7, 100])
def test_no_step_is_wasted_at_rate_zero(total_steps, warmup_ratio):
    """Every factor is above 0 and at most 1; without warm-up the first is 1."""
    factors = [optim.learning_rate_factor(step, total_steps, warmup_ratio) for step in range(total_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert warmup_ratio > 0 or factors[0] == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure_features", [True, False])
def test_every_parameter_is_in_one_group(kind, backbone_folders, structure_features):
    """Encoder, head and linear path have their own rates; weights decay, biases and norms do not."""
    config = make_config(learning_rate=1e-5, head_learning_rate=2e-4, structure_features=structure_features)
    model = make_model(backbone_folders[kind], config)
    next(model.encoder.parameters()).requires_grad_(False)
    groups = optim.parameter_groups(model, config)
    group_of = {id(p): group for group in groups for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(group_of) == sorted(map(id, trainable.values()))
    assert sum(len(group["params"]) for group in groups) == len(trainable)
    for name, parameter in trainable.items():
        group = group_of[id(parameter)]
        plain = name.endswith("bias") or "norm" in name.lower()
        rate = 1e-5 if name.startswith("encoder.") else 1e-2 if "head.wide" in name else 2e-4
        assert (name, group["weight_decay"], group["peak"]) == (name, 0.0 if plain else 0.01, rate)
    assert any("norm" in name.lower() and name.endswith("weight") for name in trainable)


def test_schedule_scales_every_group(tiny):
    """Half the factor is half the peak in each group."""
    config = make_config(learning_rate=1e-5, head_learning_rate=2e-4)
    optimizer = optim.make_optimizer(make_model(tiny, config), config, torch.device("cpu"))
    optim.set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-6, 1e-4, 5e-3}
    optim.set_learning_rate(optimizer, 1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-5, 2e-4, 1e-2}


def test_no_smoothed_loss_is_reported(tiny, monkeypatch):
    """With all rates zero the model stays at the prior: both losses reported are its cross-entropy."""
    monkeypatch.setattr(optim, "WIDE_LEARNING_RATE", 0.0)
    config = make_config(learning_rate=0.0, head_learning_rate=0.0, label_smoothing=0.3)
    rows = replace(make_examples(40, 1, True), labels=np.repeat([2, 0], [30, 10]))
    valid = replace(make_examples(30, 2, True), labels=np.repeat([2, 1], [20, 10]))
    result = fit(make_model(tiny, config, (0.1, 0.1, 0.8)), config, rows, valid)
    for name, labels in (("train_log_loss", rows.labels), ("valid_log_loss", valid.labels)):
        per_row = -np.log([0.1, 0.1, 0.8])
        plain = per_row[labels].mean()
        assert abs(0.7 * plain + 0.3 * per_row.mean() - plain) > 0.02  # a smoothed loss would be seen
        np.testing.assert_allclose(result.history[name], plain, atol=1e-5)


def test_validation_loss_is_that_of_scikit_learn(tiny):
    """At every validation, from the probabilities that are handed back; training is smoothed, this is not."""
    config = make_config(label_smoothing=0.3, validations_per_epoch=2, learning_rate=1e-3)
    valid = make_examples(30, 2, True)
    result = fit(make_model(tiny, config), config, make_examples(64, 1, True), valid)
    assert result.history["step"].tolist() == [2, 4, 6, 8]
    assert result.history["epoch"].tolist() == [0.5, 1.0, 1.5, 2.0]
    for loss, probs in zip(result.history["valid_log_loss"], result.valid_probs, strict=True):
        assert loss == pytest.approx(sklearn_log_loss(valid.labels, probs, labels=[0, 1, 2]), abs=1e-12)
    assert result.history["valid_log_loss"].nunique() == 4


def fake_validations(monkeypatch, labels: np.ndarray, confidences: list[float]) -> list[dict]:
    """Let validation i give the true class confidences[i]; returns a list that gets the weights at each."""
    states: list[dict] = []

    def embed_unique_sides(model, *_):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return None, TokenCount()

    def predict_from_embeddings(*_):
        confidence = confidences[len(states) - 1]
        probs = np.full((len(labels), 3), (1 - confidence) / 2)
        probs[np.arange(len(labels)), labels] = confidence
        return probs

    monkeypatch.setattr(steps, "embed_unique_sides", embed_unique_sides)
    monkeypatch.setattr(steps, "predict_from_embeddings", predict_from_embeddings)
    return states


@pytest.mark.parametrize(("min_rows", "chosen"), [(30, 1), (31, 2)])
def test_best_weights_with_many_validation_rows_else_the_last(tiny, monkeypatch, min_rows, chosen):
    """True class at .8, .98, .7: the second is best by plain log loss (.02), the first by a smoothed one."""
    monkeypatch.setattr(loop, "MIN_ROWS_TO_SELECT", min_rows)
    config = make_config(num_epochs=3, label_smoothing=0.3, structure_features=False)
    valid = make_examples(30, 2)
    states = fake_validations(monkeypatch, valid.labels, [0.8, 0.98, 0.7])
    model = make_model(tiny, config)
    result = fit(model, config, make_examples(32, 1), valid)
    assert result.chosen == chosen
    np.testing.assert_allclose(result.history["valid_log_loss"], -np.log([0.8, 0.98, 0.7]), atol=1e-12)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, states[chosen][name])
    assert not torch.equal(states[1]["head.output.weight"], states[2]["head.output.weight"])


@pytest.mark.parametrize("min_rows", [1, 31])
def test_swapped_rows_are_predicted_from_the_embeddings_of_the_validation(tiny, monkeypatch, min_rows):
    """As `predict_proba` has them, to the bit, by the chosen weights; one pass of the encoder for each validation."""
    monkeypatch.setattr(loop, "MIN_ROWS_TO_SELECT", min_rows)
    passes, real = [], steps.embed_unique_sides
    monkeypatch.setattr(steps, "embed_unique_sides", lambda *args: passes.append(1) or real(*args))
    config = make_config(num_epochs=4, learning_rate=0.02, head_learning_rate=0.02, head="concat")
    model, valid = make_model(tiny, config), make_examples(30, 2, True)
    result = fit(model, config, make_examples(48, 1, True), valid)
    assert len(passes) == 4
    expected, _ = predict_proba(model, valid.swapped(), make_accelerator("no"), 0)
    assert (result.swapped_probs == expected).all()
    assert (result.swapped_probs[:, [1, 0, 2]] != result.valid_probs[result.chosen]).any()


def test_two_thousand_rows_are_needed_to_select():
    """Fewer make the best step noise; the number itself is a promise of the README."""
    assert loop.MIN_ROWS_TO_SELECT == 2000


def test_fit_learns_what_can_be_learned(tiny):
    """Token 50 decides: from the prior's 1.1 to less than half of it, on rows that were not trained on."""
    config = make_config(
        num_epochs=6,
        learning_rate=2e-3,
        head_learning_rate=2e-3,
        label_smoothing=0.0,
        structure_features=False,
    )
    result = fit(make_model(tiny, config), config, make_examples(192, 1), make_examples(60, 2))
    losses = result.history["valid_log_loss"]
    assert losses.iloc[-1] < 0.5
    assert result.history["train_log_loss"].iloc[-1] < result.history["train_log_loss"].iloc[0]
    assert result.tokens.real > 0
    assert result.tokens.useful_share > 0.7
    assert (result.history["tokens_per_second"] > 0).all()


def test_loss_that_is_not_finite_stops_with_advice(tiny):
    """Nothing is made of broken weights: the message names the step and the settings to change."""
    config = make_config(structure_features=False)
    model = make_model(tiny, config)
    with torch.no_grad():
        model.head.hidden.weight[0, 0] = math.nan
    with pytest.raises(
        UserError, match=r"at step 2 the predictions are not finite .*Set learning_rate lower, or mixed"
    ):
        fit(model, config, make_examples(32, 1), make_examples(9, 2))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_same_seed_same_weights(tiny, precision):
    """Twice the same to the bit, dropout included; another seed is another model."""
    weights = []
    for seed in (1, 1, 2):
        config = make_config(seed=seed, dropout=0.1, mixed_precision=precision, num_epochs=1, learning_rate=1e-3)
        model = make_model(tiny, config)
        fit(model, config, make_examples(32, 1, True), make_examples(9, 2, True))
        weights.append(model.state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert not torch.equal(weights[0]["head.hidden.weight"], weights[2]["head.hidden.weight"])


def test_seed_decides_the_order_of_the_rows(tiny):
    """From the same first weights: the seed of the settings shuffles the rows, nothing else is random."""
    weights = []
    for seed in (1, 1, 2):
        model = make_model(tiny, make_config(seed=5, num_epochs=1))
        fit(model, make_config(seed=seed, num_epochs=1), make_examples(64, 1, True), make_examples(9, 2, True))
        weights.append(model.head.hidden.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
