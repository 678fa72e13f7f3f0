"""fit: gradients, rates, which loss is reported, and which weights are kept."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from conftest import KINDS, MORE_KINDS
from sklearn.metrics import log_loss as sklearn_log_loss
from test_model import encode
from test_model import make_model as random_model
from torch import nn

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples, TokenCount
from prefcls_lib.evaluation.slices import flip_rate
from prefcls_lib.models.network import PreferenceModel
from prefcls_lib.models.predict import predict_proba
from prefcls_lib.models.recipes import RECIPES
from prefcls_lib.models.saved import build_model
from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.runtime.files import UserError
from prefcls_lib.training import loop, optim, validation
from prefcls_lib.training.checkpoint import Session, TrainingState
from prefcls_lib.training.step import accumulate_gradients

PRIOR = (0.3, 0.2, 0.5)
LEARNS = {"learning_rate": 2e-3, "head_learning_rate": 2e-3}


def make_config(**settings) -> RunConfig:
    """Small settings, the rest as in BERT's recipe."""
    small = {"batch_size": 16, "num_epochs": 2, "validations_per_epoch": 1, "mixed_precision": "no"}
    return RunConfig(**{**small, "start_from": "none", **settings}).with_recipe(RECIPES["bert"])


def make_model(folder, config: RunConfig, prior: tuple[float, float, float] = PRIOR) -> PreferenceModel:
    set_seed(config.seed)
    model = build_model(folder, config)
    model.head.start_at_prior(prior)
    return model


def make_examples(num_rows: int, seed: int = 0, longest: int = 24) -> Examples:
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
    return Examples(token_ids, sides, labels)


def fit(
    model: PreferenceModel, config: RunConfig, rows: int = 48, session: Session | None = None,
    train: Examples | None = None, valid: Examples | None = None, accelerator=None,
) -> TrainingState:  # fmt: skip
    """Train on `rows` rows, validate on 12, where no examples are given."""
    set_seed(config.seed)
    accelerator = accelerator or make_accelerator(config.mixed_precision)
    train, valid = train or make_examples(rows, 1), valid or make_examples(12, 2)
    return loop.fit(model, train, valid, config, accelerator, "fold", session)


def assert_same_weights(one: PreferenceModel, other: PreferenceModel) -> None:
    """To the bit."""
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def plain_loss(model: PreferenceModel, examples: Examples, rows: np.ndarray, smoothing: float) -> torch.Tensor:
    """Mean loss without any of the library's batching: each side on its own and unpadded."""
    logits = []
    for row in rows:
        ids = [torch.as_tensor(examples.token_ids[i].astype(np.int64))[None] for i in examples.sides[row]]
        u, v = (model.encoder(input_ids=one).last_hidden_state.mean(dim=1) for one in ids)
        logits.append(model.head(u, v)[0])
    labels = torch.as_tensor(examples.labels[rows])
    return nn.functional.cross_entropy(torch.cat(logits), labels, label_smoothing=smoothing)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_give_the_gradient_of_the_whole_step(kind, backbone_folders):
    """One pair at a time, a few, all at once, and a plain loop written here: one gradient, smoothed too."""
    examples = make_examples(12)
    examples.sides[4] = examples.sides[5]  # sides that rows share, and a row with the same answer twice
    examples.sides[6, 0] = examples.sides[6, 1]
    rows = np.array([8, 4, 5, 6, 1, 11, 0])
    model = make_model(backbone_folders[kind], make_config())
    for parameter in model.head.parameters():
        nn.init.normal_(parameter, std=0.1)
    plain_loss(model, examples, rows, smoothing=0.1).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2
    with torch.no_grad():
        unsmoothed = float(plain_loss(model, examples, rows, smoothing=0.0))
    for max_tokens in (16, 100, 10**6):
        given = (model, examples, rows, len(rows), max_tokens, 0.1, make_accelerator("no"))
        loss_sum, _ = accumulate_gradients(*given)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-4, msg=name)
        assert float(loss_sum) / 7 == pytest.approx(unsmoothed, abs=1e-5)


def test_tokens_of_a_step_by_hand(tiny):
    """Sides of 3, 8, 7 and 3 tokens, one in all three rows: 21 real; all four in one padded batch make 32 computed."""
    token_ids = [np.full(length, 110 + length, dtype=np.int32) for length in (3, 8, 7)] + [np.array([120] * 3)]
    examples = Examples(token_ids, np.array([[0, 1], [0, 2], [3, 0]]), np.array([0, 1, 2]))
    model = make_model(tiny, make_config())
    _, tokens = accumulate_gradients(model, examples, np.arange(3), 3, 100, 0.0, make_accelerator("no"))
    assert tokens == TokenCount(real=21, computed=32)


def rates(steps: int, **settings) -> list[float]:
    return [optim.rate_factor(step, steps, [], make_config(**settings)) for step in range(steps)]


def test_learning_rate_by_hand():
    """10 steps, 20 % warm-up: 1/3, 2/3, then 8/8 down to 1/8. No step is wasted at rate zero."""
    assert rates(10, warmup_ratio=0.2) == pytest.approx([1 / 3, 2 / 3, *(n / 8 for n in range(8, 0, -1))])
    assert rates(4, warmup_ratio=0.5, schedule="plateau") == pytest.approx([1 / 3, 2 / 3, 1, 1])
    for steps, warmup_ratio in itertools.product((1, 2, 7, 100), (0.0, 0.1, 0.5, 1.0)):
        assert all(0 < factor <= 1 for factor in rates(steps, warmup_ratio=warmup_ratio))


def test_plateau_by_hand():
    """A tenth after two validations without a new best, as of ReduceLROnPlateau with patience 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, threshold=0.0)
    records, config = [], make_config(schedule="plateau", warmup_ratio=0.0)
    for loss, share in ((1.0, 1), (0.9, 1), (0.95, 1), (0.91, 0.1), (0.92, 0.1), (0.93, 0.01), (0.8, 0.01)):
        records.append({"valid_log_loss": loss})
        scheduler.step(loss)
        found = [optim.rate_factor(1, 10, records, config), optimizer.param_groups[0]["lr"]]
        assert found == pytest.approx([share, share])


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
def test_rate_and_decay_of_every_parameter(kind, backbone_folders):
    """Two layers, decay .5: the top layer (and ModernBERT's norm above it) 1, the first .5, what is beside them .25."""
    config = make_config(learning_rate=0.008, head_learning_rate=5e-4, layer_decay=0.5, start_from="structure_logistic")
    model = make_model(backbone_folders[kind], config)
    frozen = next(model.encoder.parameters()).requires_grad_(False)
    optimizer = optim.make_optimizer(model, config, torch.device("cpu"))
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(group_of)  # each in one group
    for name, parameter in model.named_parameters():
        if parameter is frozen:
            assert id(parameter) not in group_of
            continue
        group = group_of[id(parameter)]
        if name.startswith("head."):
            rate = {"correction": 2e-4}.get(name.split(".")[1], 5e-4)
        else:
            rate = 0.008 if ".1." in name or "final_norm" in name else 0.004 if ".0." in name else 0.002
        decay = 0.0 if name.endswith("bias") or "norm" in name.lower() else 0.01
        assert (name, group["peak"], group["weight_decay"]) == (name, pytest.approx(rate), decay)


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
def test_gradient_checkpointing_changes_no_gradient(kind, backbone_folders):
    """Activations are recomputed: after an epoch the weights are those of a run without it. MPNet says it cannot."""
    configs = [make_config(num_epochs=1, learning_rate=1e-3, gradient_checkpointing=value) for value in (False, True)]
    models = [make_model(backbone_folders[kind], config) for config in configs]
    if kind == "mpnet":
        with pytest.raises(UserError, match="gradient_checkpointing=true: not possible with 'mpnet'"):
            fit(models[1], configs[1])
        return
    for model, config in zip(models, configs, strict=True):
        fit(model, config, 32)
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_no_smoothed_loss_is_reported(tiny):
    """With all rates zero the model stays at the prior: both losses are its cross-entropy; tie shifts count."""
    config = make_config(learning_rate=0.0, head_learning_rate=0.0, label_smoothing=0.3)
    shifts = np.repeat([0, np.log(0.25)], [30, 10]).astype(np.float32)  # the odds of a tie are 4, in an extra file 1
    train = replace(make_examples(40, 1), labels=np.repeat([2, 0], [30, 10]), tie_shifts=shifts)
    valid = replace(make_examples(30, 2), labels=np.repeat([2, 1], [20, 10]))
    history = fit(make_model(tiny, config, (0.1, 0.1, 0.8)), config, train=train, valid=valid).history
    losses = np.repeat(-np.log([[0.1, 0.1, 0.8], [0.25, 0.25, 0.5]]), [30, 10], axis=0)
    for name, labels in (("train_log_loss", train.labels), ("valid_log_loss", valid.labels)):
        plain = losses[range(len(labels)), labels].mean()
        assert abs(0.3 * (losses[: len(labels)].mean() - plain)) > 0.02  # a smoothed loss would be seen
        np.testing.assert_allclose(history[name], plain, atol=1e-5)


@pytest.mark.parametrize("min_rows", [30, 31])
def test_best_weights_with_many_validation_rows_else_the_last(tiny, monkeypatch, min_rows):
    """By the plain log loss, which is scikit-learn's; the model and its predictions of swapped rows are that step's."""
    monkeypatch.setattr(validation, "MIN_ROWS_TO_SELECT", min_rows)
    states, embed = [], validation.embed_unique_sides

    def embed_unique_sides(model, *given):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return embed(model, *given)

    monkeypatch.setattr(validation, "embed_unique_sides", embed_unique_sides)
    rates = {"learning_rate": 0.02, "head_learning_rate": 0.02}
    config = make_config(num_epochs=4, validations_per_epoch=2, label_smoothing=0.3, head="concat", **rates)
    model, valid = make_model(tiny, config), make_examples(30, 2)
    valid = replace(valid, labels=np.roll(valid.labels, 1))  # nothing that is learned holds here
    result = fit(model, config, 64, valid=valid)
    assert result.history["step"].tolist() == [2, 4, 6, 8, 10, 12, 14, 16]
    assert result.history["epoch"].tolist() == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    for loss, probs in zip(result.history["valid_log_loss"], result.valid_probs, strict=True):
        assert loss == pytest.approx(sklearn_log_loss(valid.labels, probs, labels=[0, 1, 2]), abs=1e-12)
    best = int(result.history["valid_log_loss"].argmin())
    assert best < 7
    assert result.chosen == (best if min_rows == 30 else 7)
    assert all(torch.equal(tensor, states[result.chosen][name]) for name, tensor in model.state_dict().items())
    expected, _ = predict_proba(model, valid.swapped(), make_accelerator("no"))
    assert result.history["flip_rate"][result.chosen] == flip_rate(result.valid_probs[result.chosen], expected) > 0


def test_loss_that_is_not_finite_stops_with_advice(tiny):
    """Nothing is made of broken weights: the message names the step and the settings to change."""
    config = make_config()
    model = make_model(tiny, config)
    with torch.no_grad():
        model.head.hidden.weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"at step 2 the predictions are not finite .*Set learning_rate lower"):
        fit(model, config, 32)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_same_seed_same_weights(tiny, precision):
    """Twice the same to the bit, dropout included; another seed is another model, also from the same first weights."""
    models, from_same, small = [], [], {"num_epochs": 1, "dropout": 0.1, "mixed_precision": precision}
    for seed in (1, 1, 2):
        config = make_config(seed=seed, learning_rate=1e-3, **small)
        models.append(make_model(tiny, config))
        from_same.append(make_model(tiny, make_config(seed=5, **small)))
        fit(models[-1], config, 32)
        fit(from_same[-1], config, 32)
    for one, same, other in (models, from_same):
        assert_same_weights(one, same)
        assert not torch.equal(one.head.hidden.weight, other.head.hidden.weight)


# --- a cross-encoder: one of the two orders of A and B a step


def test_a_training_step_costs_one_sequence_a_pair(tiny, sample_rows):
    """Half the tokens of both orders, and the gradient is that of the one order, whatever the micro-batches."""
    examples = encode(sample_rows.head(16), tiny, "cross")
    drawn, model = examples.in_random_order(0, 0), random_model(tiny, architecture="cross")
    ids = [torch.as_tensor(drawn.token_ids[side], dtype=torch.long)[None] for side in drawn.sides[:, 0]]
    u = torch.cat([model.encoder(input_ids=one).last_hidden_state.mean(dim=1) for one in ids])
    nn.functional.cross_entropy(model.head(u, None)[0], torch.as_tensor(drawn.labels)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for max_tokens in (10**6, 100):
        _, tokens = accumulate_gradients(model, drawn, np.arange(16), 16, max_tokens, 0.0, make_accelerator("no"))
        assert tokens.real == drawn.lengths.sum() < 0.6 * examples.lengths.sum()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], atol=2e-6, rtol=1e-3)


def make_sequences(num_rows: int, seed: int) -> Examples:
    """Sequences of two halves: the answer with token 50 wins, whichever comes first; with it in neither, a tie."""
    random = np.random.default_rng(seed)
    token_ids, labels = [], random.integers(0, 3, num_rows)
    for label in labels:
        a, b = (random.integers(100, 300, 9).astype(np.int32) for _ in range(2))
        for side, answer in enumerate((a, b)):
            if label == side:
                answer[1::2] = 50
        separator = np.array([2], dtype=np.int32)
        token_ids += [np.concatenate([a, separator, b]), np.concatenate([b, separator, a])]
    return Examples(token_ids, np.arange(2 * num_rows).reshape(-1, 2), labels)


def test_it_learns_which_answer_is_first(tiny):
    """The verdict can only be told by where in the sequence token 50 stands: to less than half the prior's loss."""
    config, train = make_config(architecture="cross", num_epochs=10, seed=1, **LEARNS), make_sequences(256, 1)
    model = make_model(tiny, config, (1 / 3, 1 / 3, 1 / 3))
    result = fit(model, config, train=train, valid=make_sequences(60, 2))
    assert result.history["valid_log_loss"].iloc[-1] < 0.5
    assert result.tokens.real == 10 * train.lengths[:, 0].sum()


def test_settings_that_contradict_it_are_refused():
    """A head that joins two answers, and a reward model that reads one."""
    with pytest.raises(UserError, match=r"head='concat'.*cross-encoder"):
        RunConfig(architecture="cross", head="concat")
    with pytest.raises(UserError, match=r"init_from.*architecture=siamese"):
        RunConfig(architecture="cross", init_from="some/reward-model")
