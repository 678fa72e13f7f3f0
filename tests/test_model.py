"""The shared encoder, pooling and the two heads, for all four kinds of encoder."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import KINDS
from torch import nn
from transformers import AutoModel, AutoTokenizer

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import Examples, PaddedBatch, make_padded_batches
from prefcls_lib.data.features import SIGNS, FeatureScaler, compute_features, identical_answers
from prefcls_lib.data.tokenization import SideTokenizer, encode_rows
from prefcls_lib.models.network import PreferenceHead, PreferenceModel, pool
from prefcls_lib.models.predict import predict_proba
from prefcls_lib.models.saved import build_model
from prefcls_lib.runtime.devices import make_accelerator

PRIOR = (0.5, 0.3, 0.2)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def rows(sample_rows) -> pd.DataFrame:
    """24 real first turns, cut to all kinds of lengths; row 3 has identical answers."""
    rows = sample_rows.head(24).copy()
    for name, stride in (("prompt", 2), ("response_a", 7), ("response_b", 11)):
        cut = [[turns[0][: 10 + stride * number % 90]] for number, turns in enumerate(rows[name])]
        rows[name] = pd.Series(cut, dtype=object)
    rows.at[3, "response_b"] = list(rows.at[3, "response_a"])
    return rows


@pytest.fixture(scope="session")
def examples_of(backbone_folders, rows):
    """examples_of(kind) -> the rows, and the rows with the answers swapped in the table itself."""
    cached = {}

    def make(kind: str) -> tuple[Examples, Examples]:
        if kind not in cached:
            tokenizer = SideTokenizer(AutoTokenizer.from_pretrained(backbone_folders[kind]))
            swapped = rows.assign(response_a=rows["response_b"], response_b=rows["response_a"])
            scaler = FeatureScaler.fit(compute_features(rows))
            cached[kind] = tuple(encode(table, tokenizer, scaler) for table in (rows, swapped))
        return cached[kind]

    return make


def encode(rows: pd.DataFrame, tokenizer: SideTokenizer, scaler: FeatureScaler) -> Examples:
    encoded = encode_rows(rows, tokenizer, 48, "none")
    features = scaler.transform(compute_features(rows)).astype(np.float32)
    return Examples(encoded.token_ids, encoded.sides, features, rows["label"].to_numpy())


def make_model(folder, **settings) -> PreferenceModel:
    """A model whose head has random weights, ready to predict."""
    torch.manual_seed(1)
    model = build_model(folder, RunConfig(**settings)).eval()
    for parameter in model.head.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def pad_id_of(model: PreferenceModel) -> int:
    return model.encoder.config.pad_token_id


def test_padding_and_batch_size_do_not_change_logits(kind, backbone_folders, examples_of):
    """One side at a time unpadded, in padded batches of 3, all at once, and padded to 60: the same logits in fp32."""
    model, (examples, _) = make_model(backbone_folders[kind]), examples_of(kind)
    pad_id, sides = pad_id_of(model), torch.as_tensor(examples.sides)
    x = torch.as_tensor(examples.features)
    ways = {
        "one at a time": make_padded_batches(examples.token_ids, pad_id, max_sides=1),
        "batches of 3": make_padded_batches(examples.token_ids, pad_id, max_sides=3),
        "all at once": make_padded_batches(examples.token_ids, pad_id, 10**6, 10**6),
        "padded to 60": make_padded_batches(examples.token_ids, pad_id, 5, 10**6, multiple_of=60),
    }
    with torch.inference_mode():
        embedded = {name: model.embed_sides(batches) for name, batches in ways.items()}
        logits = {name: model(u[sides[:, 0]], u[sides[:, 1]], x) for name, u in embedded.items()}
    assert len(np.unique([len(ids) for ids in examples.token_ids])) > 5  # so padding really differs
    for name in ways:
        torch.testing.assert_close(logits[name], logits["one at a time"], atol=1e-5, rtol=0)


def test_predict_proba_is_the_model_row_by_row(kind, backbone_folders, examples_of):
    """The probabilities of a batch are those of each row alone, and of a forward pass written out here."""
    model, (examples, _) = make_model(backbone_folders[kind]), examples_of(kind)
    accelerator = make_accelerator("no")
    probs, tokens = predict_proba(model, examples, accelerator, pad_id_of(model))
    for row in (0, 3, 11):
        alone = Examples(examples.token_ids, examples.sides[[row]], examples.features[[row]])
        single, _ = predict_proba(model, alone, accelerator, pad_id_of(model))
        np.testing.assert_allclose(single[0], probs[row], atol=1e-5)
        u, v = (embed_plainly(model, examples.token_ids[side]) for side in examples.sides[row])
        with torch.inference_mode():
            logits = model.head(u, v, torch.as_tensor(examples.features[[row]]))
        np.testing.assert_allclose(torch.softmax(logits, dim=1)[0].numpy(), probs[row], atol=1e-5)
    assert np.abs(probs.sum(axis=1) - 1).max() < 1e-12
    used = np.unique(examples.sides)
    assert tokens.real == sum(len(examples.token_ids[side]) for side in used)
    assert tokens.computed >= tokens.real


def embed_plainly(model: PreferenceModel, ids: np.ndarray) -> torch.Tensor:
    """Mean of the last hidden states of one unpadded side."""
    with torch.inference_mode():
        hidden = model.encoder(input_ids=torch.as_tensor(ids[None].astype(np.int64))).last_hidden_state
    return hidden.mean(dim=1)


def test_masked_mean_by_hand():
    """(1, 2) and (3, 6) are real, (100, 100) is padding: mean (2, 4); first token (1, 2); fp32 from bf16."""
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]], dtype=torch.bfloat16)
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0, 4.0]]
    assert pool(hidden, mask, "first").tolist() == [[1.0, 2.0]]
    assert pool(hidden, mask, "mean").dtype == pool(hidden, mask, "first").dtype == torch.float32


@pytest.mark.parametrize("head", ["symmetric", "concat"])
@pytest.mark.parametrize("structure_features", [True, False])
def test_untrained_model_predicts_the_prior(tiny, examples_of, head, structure_features):
    """.5 and .3 are averaged to .4: every row gets (.4, .4, .2), and the first loss is its cross-entropy."""
    examples, _ = examples_of("bert")
    if not structure_features:
        examples = Examples(examples.token_ids, examples.sides, None, examples.labels)
    model = make_model(tiny, head=head, structure_features=structure_features)
    model.head.start_at_prior(PRIOR)
    probs, _ = predict_proba(model, examples, make_accelerator("no"), pad_id_of(model))
    np.testing.assert_allclose(probs, np.tile([0.4, 0.4, 0.2], (len(examples), 1)), atol=1e-7)
    loss = -np.log(probs[np.arange(len(examples)), examples.labels]).mean()
    counts = np.bincount(examples.labels)
    by_hand = -((counts[0] + counts[1]) * np.log(0.4) + counts[2] * np.log(0.2)) / counts.sum()
    assert loss == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_swapping_the_answers_permutes_the_probabilities_exactly(
    kind, backbone_folders, examples_of, precision, pooling
):
    """To the bit, in every precision: the rows are swapped in the table and go all the way again."""
    examples, swapped = examples_of(kind)
    model, accelerator = make_model(backbone_folders[kind], pooling=pooling), make_accelerator(precision)
    probs, _ = predict_proba(model, examples, accelerator, pad_id_of(model))
    for other in (swapped, examples.swapped()):
        back, _ = predict_proba(model, other, accelerator, pad_id_of(model))
        assert (back == probs[:, [1, 0, 2]]).all()
    assert np.abs(probs[:, 0] - probs[:, 1]).max() > 0.01  # the head has something to say


def test_swap_is_exact_even_where_a_side_is_computed_differently_in_another_place(tiny, examples_of):
    """As kernels in half precision may: here each row of a padded batch gets its place in it added on top."""
    examples, swapped = examples_of("bert")
    model, accelerator = make_model(tiny), make_accelerator("no")

    def disturb(module, inputs, output):
        places = torch.arange(len(output.last_hidden_state))
        output.last_hidden_state = output.last_hidden_state + 1e-3 * places[:, None, None].pow(2)

    clean, _ = predict_proba(model, examples, accelerator, pad_id_of(model))
    model.encoder.register_forward_hook(disturb)
    probs, _ = predict_proba(model, examples, accelerator, pad_id_of(model))
    back, _ = predict_proba(model, swapped, accelerator, pad_id_of(model))
    assert (back == probs[:, [1, 0, 2]]).all()
    assert (probs != clean).any()


def test_identical_answers_are_equally_likely_to_win(kind, backbone_folders, examples_of, rows):
    """P(A) == P(B) to the bit where the answer is the same twice (row 3 is one), and nowhere else."""
    model, (examples, _) = make_model(backbone_folders[kind]), examples_of(kind)
    probs, _ = predict_proba(model, examples, make_accelerator("bf16"), pad_id_of(model))
    assert identical_answers(rows)[3]
    assert ((probs[:, 0] == probs[:, 1]) == identical_answers(rows)).all()


def test_concat_head_is_not_symmetric(kind, backbone_folders, examples_of):
    """The original's head knows position: a swap is no permutation, even for identical answers."""
    examples, swapped = examples_of(kind)
    model = make_model(backbone_folders[kind], head="concat")
    probs, back = (predict_proba(model, e, make_accelerator("no"), pad_id_of(model))[0] for e in (examples, swapped))
    assert np.abs(back - probs[:, [1, 0, 2]]).max() > 0.01
    assert probs[3, 0] != probs[3, 1]


def test_symmetric_head_is_the_mean_of_both_orders():
    """(h(u, v, x) + P h(v, u, Px)) / 2, from a concat head with the same weights."""
    torch.manual_seed(0)
    symmetric, concat = (PreferenceHead(8, is_symmetric, True, 0.0) for is_symmetric in (True, False))
    concat.load_state_dict(symmetric.state_dict())
    u, v, x = torch.randn(5, 8), torch.randn(5, 8), torch.randn(5, len(SIGNS))
    signs = torch.tensor(SIGNS, dtype=torch.float32)
    expected = (concat(u, v, x) + concat(v, u, x * signs)[:, [1, 0, 2]]) / 2
    torch.testing.assert_close(symmetric(u, v, x), expected)


def test_head_computes_in_fp32_inside_autocast():
    """The logits of bf16 autocast are those without it, to the bit."""
    torch.manual_seed(0)
    head = PreferenceHead(8, True, False, 0.0)
    u, v = torch.randn(5, 8), torch.randn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head(u, v, None)
    assert inside.dtype == torch.float32
    assert (inside == head(u, v, None)).all()


def test_autocast_reaches_the_encoder(tiny, examples_of):
    """bf16 gives other numbers than fp32, and not very different ones."""
    model, (examples, _) = make_model(tiny), examples_of("bert")
    fp32, bf16 = (predict_proba(model, examples, make_accelerator(p), pad_id_of(model))[0] for p in ("no", "bf16"))
    assert 0 < np.abs(fp32 - bf16).max() < 0.05


def test_encoder_need_not_ask_whether_there_is_padding(kind, backbone_folders, examples_of):
    """Without padding it gets no mask; with padding one that is used as it is. DeBERTa takes its own kind always."""
    model, (examples, _) = make_model(backbone_folders[kind]), examples_of(kind)
    masks = []
    model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    shortest, longest = examples.token_ids[0], examples.token_ids[-1]
    with torch.inference_mode():
        for sides in ([longest], [longest, longest], [shortest, longest]):
            model.embed(make_padded_batches(sides, pad_id_of(model))[0])
    if kind == "deberta-v2":
        assert [mask.shape[0] for mask in masks] == [1, 2, 2]
    else:
        assert masks[:2] == [None, None]
    assert masks[2].shape == ((2, len(longest)) if kind == "deberta-v2" else (2, 1, 1, len(longest)))
    assert masks[2].sum() == len(shortest) + len(longest)


def test_token_types_are_never_passed(kind, backbone_folders, examples_of):
    """The encoder gets ids and mask alone, which for ELECTRA and BERT means token type zero everywhere."""
    model, (examples, _) = make_model(backbone_folders[kind]), examples_of(kind)
    seen = []
    model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((len(args), set(kwargs))), with_kwargs=True
    )
    batch = make_padded_batches(examples.token_ids[:4], pad_id_of(model))[0]
    with torch.inference_mode():
        embedded = model.embed(batch)
        assert seen == [(0, {"input_ids", "attention_mask"})]
        if kind in ("electra", "bert"):
            zeros = torch.zeros_like(batch.input_ids)
            hidden = model.encoder(batch.input_ids, batch.attention_mask, token_type_ids=zeros)
            assert (pool(hidden.last_hidden_state, batch.attention_mask, "mean") == embedded).all()


def test_encoder_has_fp32_master_weights(kind, backbone_folders, tmp_path):
    """Also where the checkpoint was stored in half precision; and it is in train mode."""
    shutil.copytree(backbone_folders[kind], tmp_path / "half")
    AutoModel.from_pretrained(backbone_folders[kind], dtype=torch.float16).save_pretrained(tmp_path / "half")
    for folder in (backbone_folders[kind], tmp_path / "half"):
        encoder = build_model(folder, RunConfig()).encoder
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
        assert encoder.training


def test_weights_are_the_checkpoints(kind, backbone_folders):
    """What is loaded is what lies in the folder, and no pooling layer comes on top with random weights."""
    plain = AutoModel.from_pretrained(backbone_folders[kind], dtype=torch.float32).state_dict()
    for name, tensor in build_model(backbone_folders[kind], RunConfig()).encoder.state_dict().items():
        assert not name.startswith("pooler")
        assert (tensor == plain[name]).all()


def test_dropout_is_a_setting(kind, backbone_folders, examples_of):
    """0 by default: training mode is exact. 0.5 reaches configuration, encoder and head."""
    examples, _ = examples_of(kind)
    for dropout, equal in ((0.0, True), (0.5, False)):
        model = make_model(backbone_folders[kind], dropout=dropout).train()
        config = model.encoder.config
        assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == dropout
        assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {dropout}
        batch = make_padded_batches(examples.token_ids[:3], pad_id_of(model))[0]
        assert torch.equal(model.embed(batch), model.embed(batch)) == equal


def test_embeddings_come_back_in_the_order_of_the_sides(tiny):
    """Padded batches are sorted by length; what the head gets is not."""
    model = make_model(tiny)
    sides = [np.array(ids, dtype=np.int32) for ids in ([5], [5, 6, 7], [5, 6])]
    with torch.inference_mode():
        embedded = model.embed_sides(make_padded_batches(sides, 0, max_sides=1))
        for side, ids in enumerate(sides):
            alone = PaddedBatch(
                torch.tensor([0]), torch.tensor([ids.tolist()]), torch.ones(1, len(ids), dtype=torch.long)
            )
            torch.testing.assert_close(embedded[side], model.embed(alone)[0], atol=1e-6, rtol=0)
