"""What a backbone needs: its parameters, what the backward pass holds, its operations, and the plan for a T4."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel, PretrainedConfig

from prefcls_lib.doctor import capacity
from prefcls_lib.models.backbones import MINILM_PACKAGE
from prefcls_lib.runtime.files import read_json
from report.studies import t4_plan

CONFIGS = {path.stem: read_json(path)["config"] for path in Path(__file__).parents[1].glob("report/backbones/*.json")}
T4 = 15 * 2**30


def read_config(name: str, **changes: object) -> PretrainedConfig:
    return AutoConfig.for_model(**{**CONFIGS[name], **changes})


@pytest.mark.parametrize(
    ("name", "millions"),
    [("deberta-v3-base", 184), ("deberta-v3-large", 434), ("modernbert-base", 149), ("xlm-roberta-base", 278),
     ("mdeberta-v3-base", 278)],
)  # fmt: skip
def test_configurations_have_the_published_size(name, millions):
    """Parameters counted on the model, without its pooler, and those that the plan is made from."""
    with torch.device("meta"):
        encoder = AutoModel.from_config(read_config(name))
    real = sum(p.numel() for name, p in encoder.named_parameters() if not name.startswith("pooler"))
    assert real / 1e6 == pytest.approx(millions, rel=0.005)
    assert capacity.count_parameters(read_config(name)) == pytest.approx(real, rel=0.01)


class CountHeld(TorchFunctionMode):
    """CUDA's autocast and fused attention on the meta device, where no kernel runs; `torch.autocast` skips it there."""

    HALF = (functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm)
    FULL = (functional.layer_norm, functional.softmax, torch.softmax, torch.Tensor.softmax)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def cast(value, dtype):
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        if function is torch.Tensor.__contains__:  # transformers looks for padding, to warn
            return False
        if function is functional.scaled_dot_product_attention:
            return FusedAttention.apply(*(cast(value, torch.float16) for value in args[:3]))
        if function in self.HALF:
            args = [cast(value, torch.float16) for value in args]
        elif function in self.FULL:
            args = [cast(value, torch.float32) for value in args]
        return function(*args, **(kwargs or {}))


class FusedAttention(torch.autograd.Function):
    """Keeps what memory-efficient attention keeps: its inputs, its output, and a sum for each row of scores."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient, gradient


def count_held(config: PretrainedConfig, length: int) -> float:
    """Bytes a token that autograd keeps for the backward pass of 5 sides, without parameters."""
    with torch.device("meta"):
        model = AutoModel.from_config(config).train()
        ids = torch.ones(5, length, dtype=torch.long)  # no activation is shaped as a weight
    shapes = {tuple(t.shape) for p in model.parameters() for t in (p, p.mT if p.ndim == 2 else p)}
    storages = {}

    def keep(tensor):
        base = tensor if tensor._base is None else tensor._base
        if tuple(tensor.shape) not in shapes and tuple(base.shape) not in shapes:
            storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    mask = torch.ones_like(ids) if config.model_type == "deberta-v2" else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), CountHeld():
        model(input_ids=ids, attention_mask=mask)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) / ids.numel()


@pytest.mark.parametrize("length", [512, 768])
@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_held_are_what_autograd_keeps(name, length, monkeypatch):
    """A layer's, as the difference of two depths, within a tenth; so what memory is planned with is counted."""
    if length > 512 and CONFIGS[name]["model_type"] not in ("deberta-v2", "modernbert"):
        length = 256
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda *_: False
    )  # ModernBERT of transformers 5.0 asks for meta's
    exact = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    exact = {key: value for key, value in exact.items() if key in CONFIGS[name]}
    shallow, deep = (count_held(read_config(name, num_hidden_layers=layers, **exact), length) for layers in (3, 6))
    planned = capacity.bytes_per_token(read_config(name, num_hidden_layers=3), True, length)
    assert planned == pytest.approx(deep - shallow, rel=0.12)


def test_checkpointing_holds_the_inputs_of_layers_and_one_layer():
    """ELECTRA-large: 24 inputs of 1,024 units in fp32, and 40 bytes a unit once; fp32 doubles the layer alone."""
    config = read_config("electra-large-discriminator")
    assert capacity.bytes_per_token(config, True, checkpointing=True) == 24 * 1024 * 4 + 1024 * 40
    assert capacity.bytes_per_token(config, False, checkpointing=True) == 24 * 1024 * 4 + 1024 * 80
    left = int(0.85 * T4) - capacity.fixed_bytes(config)
    held = capacity.largest_micro_step(config, T4, True, checkpointing=True)
    assert held == pytest.approx(left / (24 * 1024 * 4 + 1024 * 40), abs=1)


def test_deberta_holds_scores_for_length_and_buckets():
    """DeBERTa-v3-large at 768: 24 layers of 40 bytes a unit, and 16 heads of 6 x 768 and 8 x 256 bytes."""
    found = capacity.bytes_per_token(read_config("deberta-v3-large"), True, 768)
    assert found == 24 * (40 * 1024 + 16 * (6 * 768 + 8 * 256))


def test_operations_by_hand():
    """One layer of width 2, inner width 3: 2 x (16 + 12) for the weights, 4 x 2 x 10 for ten positions.

    DeBERTa: 2 x 4 x 2 x 5 more for five buckets; ModernBERT: a third matrix of 6 weights.
    """
    sizes = {"num_hidden_layers": 1, "hidden_size": 2, "intermediate_size": 3}
    assert capacity.flop_per_token(PretrainedConfig(model_type="bert", **sizes), 10) == 56 + 80
    deberta = PretrainedConfig(model_type="deberta-v2", position_buckets=5, **sizes)
    assert capacity.flop_per_token(deberta, 10) == 56 + 80 + 80
    assert capacity.flop_per_token(PretrainedConfig(model_type="modernbert", **sizes), 10) == 56 + 12 + 80


def test_plan_by_hand(monkeypatch):
    """Two sides a row, three passes in training, one in prediction; long sides are cut, and weigh in attention."""
    monkeypatch.setattr(capacity, "T4_FLOP_PER_SECOND", 1e12)
    lengths = np.array([100, 1000])
    config = read_config("roberta-base")
    tokens, attended = (100 + 512) / 2, (100**2 + 512**2) / 612
    forward = 12 * (2 * (4 * 768**2 + 2 * 768 * 3072) + 4 * 768 * attended) * tokens / 1e12 / 3600
    line = t4_plan.plan_backbone(config, 512, lengths)
    assert line[-2] == f"{6 * 51_729 * forward:.1f} / {8 * 51_729 * forward:.1f}"
    assert line[-1] == f"{2 * 25_000 * forward:.2f}"
    assert line[:2] == ["512", f"{16 * capacity.count_parameters(config) / 1e9:.1f}"]


def test_plan_has_every_backbone_at_the_lengths_it_takes():
    """768 tokens for DeBERTa and ModernBERT alone."""
    lines = [line.strip("| ").split(" | ") for line in t4_plan.make_plan(np.array([300])).splitlines() if "|" in line]
    found = {(line[0], line[1].replace("\u00a0", " ")) for line in lines[2:]}
    longer = {name for name, config in CONFIGS.items() if config["model_type"] in ("deberta-v2", "modernbert")}
    assert found == {(name, "512") for name in CONFIGS} | {(name, "768") for name in longer}
    assert len(longer) == 5


@pytest.mark.skipif(find_spec(MINILM_PACKAGE) is None, reason="counts tokens with MiniLM's tokenizer")
def test_committed_plan_is_of_this_code():
    """Memory and operations as they are computed now; `python report/studies/t4_plan.py` writes it anew."""
    committed = (t4_plan.FOLDER / "t4_plan.md").read_text(encoding="utf-8")
    now = t4_plan.make_plan(t4_plan.count_tokens())
    assert committed == now
