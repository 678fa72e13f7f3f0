"""DeBERTa's attention on the fused path: the numbers and the gradients of transformers' own."""

import copy

import pytest
import torch
from transformers import DebertaV2Config, DebertaV2Model

from report.studies.disentangled import use_fused_attention


def make_pair(**changes: object) -> tuple[DebertaV2Model, DebertaV2Model]:
    """The same random DeBERTa twice, the second on the fused path; distances beyond 8 fall into logarithmic buckets."""
    torch.manual_seed(0)
    settings = {"max_position_embeddings": 80, "position_buckets": 16, "share_att_key": True, "type_vocab_size": 0}
    settings |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
    settings |= {"position_biased_input": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shape = {"vocab_size": 50, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 32}
    config = DebertaV2Config(num_hidden_layers=3, **shape, **{**settings, **changes})
    plain = DebertaV2Model(config).train()
    with torch.no_grad():  # as sharp as a trained model's attention
        for parameter in plain.parameters():
            parameter.mul_(4)
    fused = copy.deepcopy(plain)
    use_fused_attention(fused)
    return plain, fused


def run(model: DebertaV2Model, input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Hidden states of the real tokens, and the gradients of a sum of their cubes."""
    model.zero_grad()
    hidden = model(input_ids=input_ids, attention_mask=mask).last_hidden_state * mask[..., None]
    (hidden**3).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("length", [1, 7, 64])
def test_logits_and_gradients_are_those_of_transformers(length, share):
    """With padding, in one and several buckets, with shared and with own projections of the positions."""
    plain, fused = make_pair(share_att_key=share)
    input_ids = torch.randint(1, 50, (3, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(input_ids)
    mask[1, max(1, length // 2) :] = 0
    expected, gradients = run(plain, input_ids, mask)
    found, fused_gradients = run(fused, input_ids, mask)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert set(fused_gradients) == set(gradients)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():  # some are zero but for rounding: a constant beside all keys is nothing
        torch.testing.assert_close(fused_gradients[name], gradient, atol=1e-6 * largest, rtol=1e-3, msg=name)
    assert length < 3 or float(gradients["encoder.rel_embeddings.weight"].abs().max()) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_near(dtype):
    """Under autocast, 512 tokens with padding: finite hidden states and gradients, near those of fp32."""
    plain, fused = make_pair(max_position_embeddings=512, position_buckets=256)
    input_ids = torch.randint(1, 50, (2, 512), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(input_ids)
    mask[1, 100:] = 0
    expected, _ = run(plain, input_ids, mask)
    with torch.autocast("cpu", dtype=dtype):
        found, gradients = run(fused, input_ids, mask)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert float((found.float() - expected).abs().mean()) < 0.05 * float(expected.abs().mean())
