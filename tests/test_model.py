"""The shared encoder, its pooling and the heads: Siamese and cross-encoder, with and without a baseline."""

import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import KINDS, MORE_KINDS
from torch import nn
from transformers import AutoModel, AutoTokenizer

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import CPU, Examples, plan_padded_batches
from prefcls_lib.data.features import identical_answers
from prefcls_lib.data.schema import SWAP
from prefcls_lib.data.tokenization import SideTokenizer, encode_rows
from prefcls_lib.models.network import PreferenceHead, PreferenceModel, mean_pool
from prefcls_lib.models.predict import predict_proba
from prefcls_lib.models.saved import build_model
from prefcls_lib.runtime.devices import make_accelerator
from prefcls_lib.training.step import training_loss

PRIOR = (0.5, 0.3, 0.2)
ALL_KINDS = pytest.mark.parametrize("kind", [*KINDS, *MORE_KINDS])
ARCHITECTURES = pytest.mark.parametrize("architecture", ["siamese", "cross"])


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def rows(sample_rows) -> pd.DataFrame:
    """24 real first turns, cut to all kinds of lengths; row 3 has identical answers."""
    rows = sample_rows.head(24).copy()
    for name, stride in (("prompt", 2), ("response_a", 7), ("response_b", 11)):
        cut = [[turns[0][: 10 + stride * number % 90]] for number, turns in enumerate(rows[name])]
        rows[name] = pd.Series(cut, dtype=object)
    rows.at[3, "response_b"] = list(rows.at[3, "response_a"])
    return rows


@pytest.fixture(scope="module")
def examples_of(backbone_folders, rows):
    """examples_of(kind, architecture) -> the rows, and the rows with the answers swapped in the table itself."""
    tables = rows, rows.assign(response_a=rows["response_b"], response_b=rows["response_a"])

    @cache
    def make(kind: str, architecture: str = "siamese") -> tuple[Examples, ...]:
        return tuple(encode(table, backbone_folders[kind], architecture) for table in tables)

    return make


def encode(rows: pd.DataFrame, folder, architecture: str = "siamese") -> Examples:
    tokenizer = SideTokenizer(AutoTokenizer.from_pretrained(folder))
    return replace(encode_rows(rows, tokenizer, 48, "none", architecture), labels=rows["label"].to_numpy())


def make_model(folder, **settings) -> PreferenceModel:
    """A model whose head has random weights, ready to predict."""
    torch.manual_seed(1)
    model = build_model(folder, RunConfig(**settings)).eval()
    for parameter in model.head.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def predict(model: PreferenceModel, examples: Examples, precision: str = "no") -> np.ndarray:
    return predict_proba(model, examples, make_accelerator(precision))[0]


def make_head(on_baseline: bool = False, symmetric: bool = True, architecture: str = "siamese") -> PreferenceHead:
    """A head over embeddings of 8 numbers, its last layers not at zero."""
    torch.manual_seed(0)
    start_from, order = "structure_logistic" if on_baseline else "none", "symmetric" if symmetric else "concat"
    head = PreferenceHead(8, RunConfig(head=order, architecture=architecture, start_from=start_from))
    for layer in (head.output, *([head.correction] if on_baseline else [])):
        nn.init.normal_(layer.weight, std=0.1)
    return head


def head_inputs(num_rows: int = 5):
    """u, v (B, 8) and offsets (m, -m, t) of some rows."""
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(2, num_rows, 8, generator=generator)
    m, t = torch.randn(2, num_rows, generator=generator)
    return u, v, torch.stack([m, -m, t], dim=1)


@ALL_KINDS
def test_padding_and_batch_size_do_not_change_logits(kind, backbone_folders, examples_of):
    """Each side alone, written out here; in batches of 3, all at once, and padded beyond ModernBERT's local window. The
    encoder gets ids and mask alone, which for ELECTRA and BERT means token type zero everywhere."""
    model, (examples, _) = make_model(backbone_folders[kind]), examples_of(kind)
    sides, seen = torch.as_tensor(examples.sides), []
    ids = [torch.as_tensor(one.astype(np.int64))[None] for one in examples.token_ids]
    with torch.inference_mode():
        u = torch.cat([model.encoder(input_ids=one).last_hidden_state.mean(dim=1) for one in ids])
        exact, _ = model.head(u[sides[:, 0]], u[sides[:, 1]])
        ways = [[([*range(len(ids))], length)] for length in (max(map(len, examples.token_ids)), 60)]
        for planned in (*ways, plan_padded_batches(examples.token_ids, max_sides=3)):
            u = model.embed_sides(examples.token_ids, planned, CPU)
            torch.testing.assert_close(model.head(u[sides[:, 0]], u[sides[:, 1]])[0], exact, atol=1e-5, rtol=0)
    model.encoder.register_forward_pre_hook(lambda _, args, given: seen.append((args, set(given))), with_kwargs=True)
    probs, tokens = predict_proba(model, examples, make_accelerator("no"))
    np.testing.assert_allclose(probs, torch.softmax(exact, dim=1), atol=1e-5)
    assert np.abs(probs.sum(axis=1) - 1).max() < 1e-12
    assert all(given == ((), {"input_ids", "attention_mask"}) for given in seen)
    assert tokens.real == sum(len(examples.token_ids[side]) for side in np.unique(examples.sides)) <= tokens.computed


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MORE_KINDS)
def test_padding_beyond_a_local_window_is_harmless_in_half_precision(kind, backbone_folders, precision):
    """A padded place of ModernBERT's local layers may see padding alone: nothing of it may reach a real token."""
    model = make_model(backbone_folders[kind])
    sides = [np.arange(100, 100 + length, dtype=np.int32) for length in (4, 5, 60)]
    with torch.autocast("cpu", dtype=precision):
        embedded = model.embed_sides(sides, [([0, 1, 2], 60)], CPU)
    embedded.sum().backward()
    exact = model.embed_sides(sides, plan_padded_batches(sides, max_sides=1), CPU)
    torch.testing.assert_close(embedded, exact, atol=0.1, rtol=0)
    assert all(torch.isfinite(p.grad).all() for p in model.encoder.parameters() if p.grad is not None)


def test_masked_mean_by_hand():
    """(1, 2) and (3, 6) are real, (100, 100) is padding: mean (2, 4); fp32 from bf16."""
    mean = mean_pool(torch.tensor([[[1, 2], [3, 6], [100, 100]]], dtype=torch.bfloat16), torch.tensor([[1, 1, 0]]))
    assert mean.tolist() == [[2.0, 4.0]] and mean.dtype == torch.float32


@pytest.mark.parametrize("head", ["symmetric", "concat"])
def test_untrained_model_predicts_the_prior(tiny, examples_of, head):
    """.5 and .3 are averaged to .4: every row gets (.4, .4, .2), and the first loss is its cross-entropy."""
    examples, _ = examples_of("bert")
    model = make_model(tiny, head=head)
    model.head.start_at_prior(PRIOR)
    probs = predict(model, examples)
    np.testing.assert_allclose(probs, np.tile([0.4, 0.4, 0.2], (len(examples), 1)), atol=1e-7)
    counts = np.bincount(examples.labels)
    by_hand = -((counts[0] + counts[1]) * np.log(0.4) + counts[2] * np.log(0.2)) / counts.sum()
    assert -np.log(probs[np.arange(len(examples)), examples.labels]).mean() == pytest.approx(by_hand, abs=1e-6)


@ARCHITECTURES
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_swapping_the_answers_permutes_the_probabilities_exactly(
    kind, backbone_folders, examples_of, rows, precision, architecture
):
    """To the bit, in every precision. Identical answers, and no others, are equally likely to win."""
    examples, swapped = examples_of(kind, architecture)
    model = make_model(backbone_folders[kind], architecture=architecture)
    for parameter in (*model.encoder.parameters(), model.head.output.weight):
        parameter.data *= 4  # so that attention depends on the order of the answers, and the head has something to say
    probs = predict(model, examples, precision)
    for other in (swapped, examples.swapped()):
        assert (predict(model, other, precision) == probs[:, SWAP]).all()
    assert np.abs(probs[:, 0] - probs[:, 1]).max() > 0.001  # the head has something to say
    assert identical_answers(rows)[3]
    assert ((probs[:, 0] == probs[:, 1]) == identical_answers(rows)).all()


def test_swap_is_exact_even_where_a_side_is_computed_differently_in_another_place(tiny, examples_of):
    """As kernels in half precision may: here each row of a padded batch gets its place in it added on top."""
    examples, swapped = examples_of("bert")
    model = make_model(tiny)

    def disturb(module, inputs, output):
        places = torch.arange(len(output.last_hidden_state))
        output.last_hidden_state = output.last_hidden_state + 1e-3 * places[:, None, None].pow(2)

    clean = predict(model, examples)
    model.encoder.register_forward_hook(disturb)
    probs = predict(model, examples)
    assert (predict(model, swapped) == probs[:, SWAP]).all()
    assert (probs != clean).any()


def test_concat_head_is_not_symmetric(tiny, examples_of):
    """A swap is no permutation, even for identical answers. The symmetric head is (h(u, v) + P h(v, u)) / 2."""
    symmetric, concat, (u, v, _) = make_head(), make_head(symmetric=False), head_inputs()
    torch.testing.assert_close(symmetric(u, v)[0], (concat(u, v)[0] + concat(v, u)[0][:, SWAP]) / 2)
    model = make_model(tiny, head="concat")
    probs, back = (predict(model, examples) for examples in examples_of("bert"))
    assert np.abs(back - probs[:, SWAP]).max() > 0.01
    assert probs[3, 0] != probs[3, 1]


def test_cross_encoders_logits_are_the_mean_of_both_orders(tiny, examples_of):
    """Written out: u of (A, B), v of (B, A); each order's own logits, the second's with A and B swapped back."""
    (examples, _), model = examples_of("bert", "cross"), make_model(tiny, architecture="cross")
    probs = predict(model, examples)
    for row in range(6):
        logits = []
        for order, side in enumerate(examples.sides[row]):
            ids = torch.as_tensor(examples.token_ids[side], dtype=torch.long)[None]
            with torch.inference_mode():
                u = model.head.norm(model.encoder(input_ids=ids).last_hidden_state.mean(dim=1))
                one = model.head.output(nn.functional.gelu(model.head.hidden(u)))
            logits.append(one[0, [1, 0, 2]] if order else one[0])
        expected = torch.softmax((logits[0] + logits[1]) / 2, dim=0)
        np.testing.assert_allclose(probs[row], expected.numpy(), atol=1e-5)


@ARCHITECTURES
def test_head_on_a_baseline_is_exactly_order_equivariant(architecture):
    """To the bit, both outputs. Untrained, its correction is zero, and the auxiliary output is the prior."""
    head, (u, v, offset) = make_head(True, architecture=architecture), head_inputs()
    swapped = head(v, u, offset[:, SWAP])
    for found, other in zip(head(u, v, offset), swapped, strict=True):
        assert torch.equal(other[:, SWAP], found)
    head.start_at_prior((0.5, 0.25, 0.25))
    logits, auxiliary = head(u, v, offset)
    assert torch.equal(logits, offset)
    assert torch.softmax(auxiliary, dim=1)[0].tolist() == pytest.approx([0.375, 0.375, 0.25])


def test_loss_on_a_baseline_by_hand():
    """Cross-entropy of both outputs: labels A, tie; logits 0 have ln 3 each, the offset's probability 1/2 has ln 2."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]))
    examples = Examples([], np.zeros((2, 2), dtype=int), labels=np.array([0, 2]), offsets=np.zeros((2, 3), np.float32))
    given = ((logits, torch.zeros(2, 3)), examples, np.arange(2))
    assert float(training_loss(*given, label_smoothing=0.0)) == pytest.approx(2 * np.log(2) + 2 * np.log(3))
    alone = training_loss(given[0], replace(examples, offsets=None), np.arange(2), 0.0)
    assert float(alone) == pytest.approx(2 * np.log(2))


def test_encoder_learns_beside_a_perfect_offset():
    """Where the offset explains every label, the correction has no gradient, and the auxiliary output still has."""
    head, (u, v, _) = make_head(True), head_inputs()
    u.requires_grad_()
    offset = torch.tensor([[40.0, -40.0, -40.0]]).repeat(5, 1)
    outputs, labels = head(u, v, offset), np.zeros(5, dtype=int)
    both = Examples([], np.zeros((5, 2), dtype=int), labels=labels, offsets=offset.numpy())
    largest = []
    for examples in (both, replace(both, offsets=None)):
        loss = training_loss(outputs, examples, np.arange(5), 0.0)
        largest.append(float(torch.autograd.grad(loss, u, retain_graph=True)[0].abs().max()))
    assert largest[0] > 1e-3 and largest[1] < 1e-6


def test_autocast_reaches_the_encoder_and_not_the_head(tiny, examples_of):
    """bf16 gives other numbers than fp32, and not very different ones; the head's logits are the same to the bit."""
    model, (examples, _) = make_model(tiny), examples_of("bert")
    assert 0 < np.abs(predict(model, examples, "no") - predict(model, examples, "bf16")).max() < 0.05
    head, (u, v, _) = make_head(), head_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = head(u, v)
    assert inside.dtype == torch.float32 and torch.equal(inside, head(u, v)[0])


def test_weights_are_the_checkpoints_in_fp32(kind, backbone_folders, tmp_path):
    """Also where they are stored in half precision; in train mode."""
    folder = shutil.copytree(backbone_folders[kind], tmp_path / "half")
    AutoModel.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    encoder, plain = build_model(folder, RunConfig()).encoder, AutoModel.from_pretrained(folder).state_dict()
    assert encoder.training
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, plain[name].to(tensor.dtype)) and tensor.dtype in (torch.float32, torch.int64)


@ALL_KINDS
def test_dropout_is_a_setting(kind, backbone_folders, examples_of):
    """It reaches every dropout of encoder and head, whatever its name in the configuration; 0 is exact."""
    side = torch.as_tensor(examples_of(kind)[0].token_ids[0].astype(np.int64))[None]
    for settings in ({}, {"dropout": 0.5}):
        model, dropout = build_model(backbone_folders[kind], RunConfig(**settings)), settings.get("dropout", 0.0)
        assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {dropout}
        attention = [m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")]
        assert {p.p if isinstance(p, nn.Dropout) else p for p in attention} <= {dropout}
        once, twice = (model.encoder(input_ids=side).last_hidden_state for _ in range(2))
        assert torch.equal(once, twice) == (dropout == 0)
