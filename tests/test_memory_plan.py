"""What a backbone needs: its parameters, what the backward pass holds, its operations, and the plan for a T4."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import AutoModel, PretrainedConfig

from prefcls_lib.doctor import capacity
from prefcls_lib.models.backbones import MINILM_PACKAGE
from report.studies import t4_plan
from report.studies.t4_plan import read_config


@pytest.mark.parametrize(
    ("name", "millions"),
    [("deberta-v3-small", 141), ("deberta-v3-base", 184), ("deberta-v3-large", 434), ("modernbert-base", 149),
     ("modernbert-large", 395), ("ettin-encoder-150m", 149), ("ettin-encoder-400m", 395), ("xlm-roberta-base", 278),
     ("mdeberta-v3-base", 278), ("all-mpnet-base-v2", 109), ("electra-large-discriminator", 334)],
)  # fmt: skip
def test_configurations_have_the_published_size(name, millions):
    """Parameters counted on the model, without its pooler, and those that the plan is made from."""
    with torch.device("meta"):
        encoder = AutoModel.from_config(read_config(name))
    real = sum(p.numel() for name, p in encoder.named_parameters() if not name.startswith("pooler"))
    assert real / 1e6 == pytest.approx(millions, rel=0.005)
    assert capacity.count_parameters(read_config(name)) == pytest.approx(real, rel=0.01)


def test_bytes_by_hand():
    """24.5 or 28.5 layers and an input in fp32. DeBERTa-v3-large at 768: a layer holds 48 bytes a unit (32, 4 for each
    inner one) and 6 x 768 + 8 x 256 a head; ModernBERT-large 24, 8 an inner one. Checkpointed: 24 inputs, 1.5 layer."""
    layer = 48 * 1024 + 16 * (6 * 768 + 8 * 256)
    assert capacity.bytes_per_token(read_config("deberta-v3-large"), True, 768) == 24.5 * layer + 4 * 1024
    layer = 24 * 1024 + 8 * 2624
    assert capacity.bytes_per_token(read_config("modernbert-large"), True) == 28.5 * layer + 4 * 1024
    config = read_config("electra-large-discriminator")
    assert capacity.bytes_per_token(config, True, checkpointing=True) == 24 * 1024 * 4 + 1.5 * 1024 * 40
    assert capacity.bytes_per_token(config, False, checkpointing=True) == 24 * 1024 * 4 + 1.5 * 1024 * 80


def test_operations_by_hand():
    """One layer of width 2, inner width 3: 2 x (16 + 12) for the weights, 4 x 2 x 10 for ten positions. DeBERTa: 2 x 4
    x 2 x 5 more for five buckets; ModernBERT: a third matrix of 6 weights."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 2, "intermediate_size": 3}
    assert t4_plan.flop_per_token(PretrainedConfig(model_type="bert", **sizes), 10) == 56 + 80
    deberta = PretrainedConfig(model_type="deberta-v2", position_buckets=5, **sizes)
    assert t4_plan.flop_per_token(deberta, 10) == 56 + 80 + 80
    assert t4_plan.flop_per_token(PretrainedConfig(model_type="modernbert", **sizes), 10) == 56 + 12 + 80


def test_plan_by_hand(monkeypatch):
    """Two sides a row, three passes in training, one in prediction; long sides are cut, and weigh in attention."""
    monkeypatch.setattr(t4_plan, "T4_FLOP_PER_SECOND", (2e12, 1e12))
    lengths = np.array([100, 1000])
    config = read_config("roberta-base")
    tokens, attended = (100 + 512) / 2, (100**2 + 512**2) / 612
    forward = 12 * (2 * (4 * 768**2 + 2 * 768 * 3072) + 4 * 768 * attended) * tokens / 1e12 / 3600
    line = t4_plan.plan_backbone(config, 512, lengths)
    assert line[-2] == f"{3 * 51_729 * forward:.1f} to {6 * 51_729 * forward:.1f}"
    assert line[-1] == f"{25_000 * forward:.2f} to {2 * 25_000 * forward:.2f}"
    fixed = 16 * capacity.count_parameters(config) + 2 * 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert line[:2] == ["512", f"{fixed / 2**30:.1f}"]


@pytest.mark.skipif(find_spec(MINILM_PACKAGE) is None, reason="counts tokens with MiniLM's tokenizer")
def test_committed_plan_is_of_this_code():
    """Memory and operations as they are computed now; `python -m report.studies.t4_plan` writes it anew."""
    committed = (t4_plan.FOLDER / "t4_plan.md").read_text(encoding="utf-8")
    now = t4_plan.make_plan(t4_plan.count_tokens())
    assert committed == now
