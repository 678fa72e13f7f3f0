"""What a backbone needs: its parameters, what the backward pass holds, its operations, and the plan for a T4."""

import weakref
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel, PretrainedConfig

from prefcls_lib.data.batching import PADDED_TOKENS
from prefcls_lib.doctor import capacity
from prefcls_lib.models.backbones import MINILM_PACKAGE
from prefcls_lib.models.recipes import choose_recipe
from prefcls_lib.runtime.files import read_json, write_json
from report.studies import t4_plan

CONFIGS = {path.stem: read_json(path)["config"] for path in Path(__file__).parents[1].glob("report/backbones/*.json")}
LENGTHS = defaultdict(lambda: (512,), dict.fromkeys(("deberta-v2", "modernbert"), (512, 768)))
T4 = capacity.T4_BYTES


def read_config(name: str, **changes: object) -> PretrainedConfig:
    return AutoConfig.for_model(**{**CONFIGS[name], **changes})


@pytest.mark.parametrize(
    ("name", "millions"),
    [("deberta-v3-small", 141), ("deberta-v3-base", 184), ("deberta-v3-large", 434), ("modernbert-base", 149),
     ("modernbert-large", 395), ("ettin-encoder-150m", 149), ("ettin-encoder-400m", 395), ("xlm-roberta-base", 278),
     ("mdeberta-v3-base", 278), ("all-mpnet-base-v2", 109)],
)  # fmt: skip
def test_configurations_have_the_published_size(name, millions):
    """Parameters counted on the model, without its pooler, and those that the plan is made from."""
    with torch.device("meta"):
        encoder = AutoModel.from_config(read_config(name))
    real = sum(p.numel() for name, p in encoder.named_parameters() if not name.startswith("pooler"))
    assert real / 1e6 == pytest.approx(millions, rel=0.005)
    assert capacity.count_parameters(read_config(name)) == pytest.approx(real, rel=0.01)


class Autocast(TorchFunctionMode):
    """CUDA's autocast and fused attention on the meta device, where no kernel runs; `torch.autocast` skips it there."""

    HALF = (functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm)
    FULL = (functional.layer_norm, functional.softmax, torch.softmax, torch.Tensor.softmax)

    def __init__(self):
        super().__init__()
        self.copies: dict[torch.nn.Parameter, torch.Tensor] = {}  # autocast makes one copy of a weight, not one a batch

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.scaled_dot_product_attention:
            return FusedAttention.apply(*(self.cast(value, torch.float16) for value in args[:3]))
        if function in self.HALF:
            args = [self.cast(value, torch.float16) for value in args]
        elif function in self.FULL:
            args = [self.cast(value, torch.float32) for value in args]
        return function(*args, **(kwargs or {}))

    def cast(self, value, dtype):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if isinstance(value, torch.nn.Parameter):
            if value not in self.copies:
                self.copies[value] = value.to(dtype)
            return self.copies[value]
        return value.to(dtype)


class FusedAttention(torch.autograd.Function):
    """Keeps what memory-efficient attention keeps: its inputs, its output, and a sum for each row of scores."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


class CountPeak(TorchDispatchMode):
    """Bytes of all tensors on the meta device that were made since, now and at their most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) and tensor.is_meta else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage._cdata)
        return output

    def forget(self, key):
        self.now -= self.sizes.pop(key)


def count_peak(config: PretrainedConfig, tokens: int, length: int) -> int:
    """Most bytes of a step: `tokens` of full sides in padded batches, forward and backward; AdamW's state is there."""
    with CountPeak() as count:
        with torch.device("meta"):
            model = AutoModel.from_config(config).train()
        model.pooler = None
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)  # of the micro-batch before
        moments = [torch.empty_like(parameter) for parameter in model.parameters() for _ in range(2)]
        with Autocast() as autocast:
            total = 0.0
            for start in range(0, tokens, PADDED_TOKENS // length * length):
                sides = min(PADDED_TOKENS, tokens - start) // length
                ids = torch.ones(sides, length, dtype=torch.long, device="meta")
                mask = torch.ones_like(ids) if config.model_type == "deberta-v2" else None
                total = total + model(input_ids=ids, attention_mask=mask).last_hidden_state.float().sum()
            autocast.copies.clear()
        total.backward()
        del moments
    return count.peak


@pytest.mark.parametrize(
    ("name", "length"),
    [(name, length) for name, config in CONFIGS.items() for length in LENGTHS[config["model_type"]]],
)
def test_every_recipe_fits_a_t4(name, length, monkeypatch):
    """Counted on the meta device: at least 1 GiB of 14.6 is left, and the plan is within 4 % of the count."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # transformers 5.0 asks for meta's
    config = read_config(name, **{key: 0.0 for key in CONFIGS[name] if "dropout" in key})
    tokens = choose_recipe(config)["max_tokens_per_micro_step"] // length * length
    counted = count_peak(config, tokens, length)
    assert counted < T4 - 2**30
    assert capacity.peak_bytes(config, tokens, True, length) == pytest.approx(counted, rel=0.04)
    assert tokens >= 2 * length


@pytest.mark.parametrize(
    ("name", "gib"),
    [("deberta-v3-xsmall", 5.8), ("roberta-base", 4.9), ("electra-large-discriminator", 11.3),
     ("deberta-v3-large", 11.8)],
)  # fmt: skip
def test_peaks_are_those_of_an_independent_count(name, gib):
    """At the recipe's tokens and sides of 512, within 2 %: a reviewer counted them by another way."""
    config = read_config(name)
    tokens = choose_recipe(config)["max_tokens_per_micro_step"]
    assert capacity.peak_bytes(config, tokens, True) / 2**30 == pytest.approx(gib, rel=0.02)


def test_bytes_by_hand():
    """DeBERTa-v3-large at 768: a layer holds 48 bytes a unit (32, and 4 for each of the four times as many inner ones),
    and for each of 16 heads 6 x 768 and 8 x 256 bytes. ModernBERT-large: 24 bytes a unit, 8 for an inner one.

    24 and a half layers, and one input in fp32; ELECTRA-large checkpointed: 24 inputs and one and a half layers of 40
    bytes a unit, in fp32 twice as many.
    """
    layer = 48 * 1024 + 16 * (6 * 768 + 8 * 256)
    assert capacity.bytes_per_token(read_config("deberta-v3-large"), True, 768) == 24.5 * layer + 4 * 1024
    layer = 24 * 1024 + 8 * 2624
    assert capacity.bytes_per_token(read_config("modernbert-large"), True) == 28.5 * layer + 4 * 1024
    config = read_config("electra-large-discriminator")
    assert capacity.bytes_per_token(config, True, checkpointing=True) == 24 * 1024 * 4 + 1.5 * 1024 * 40
    assert capacity.bytes_per_token(config, False, checkpointing=True) == 24 * 1024 * 4 + 1.5 * 1024 * 80
    left = 0.9 * T4 - capacity.fixed_bytes(config, True)
    held = capacity.largest_micro_batch(config, T4, True, checkpointing=True)
    assert held == pytest.approx(left / (24 * 1024 * 4 + 1.5 * 1024 * 40), abs=1)


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
    monkeypatch.setattr(capacity, "T4_FLOP_PER_SECOND", (2e12, 1e12))
    lengths = np.array([100, 1000])
    config = read_config("roberta-base")
    tokens, attended = (100 + 512) / 2, (100**2 + 512**2) / 612
    forward = 12 * (2 * (4 * 768**2 + 2 * 768 * 3072) + 4 * 768 * attended) * tokens / 1e12 / 3600
    line = t4_plan.plan_backbone(config, 512, lengths)
    assert line[-2] == f"{3 * 51_729 * forward:.1f} to {6 * 51_729 * forward:.1f}"
    assert line[-1] == f"{25_000 * forward:.2f} to {2 * 25_000 * forward:.2f}"
    fixed = 16 * capacity.count_parameters(config) + 2 * 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert line[:2] == ["512", f"{fixed / 2**30:.1f}"]


def test_measured_pace_replaces_the_projection(tmp_path):
    """A run at 512 tokens on two T4: 2 x 51,729 x 300 tokens at 8,622 a second are one hour; 768 and CPUs stay."""
    for name, machine, pace in (("a", "2 x Tesla T4", 8_621.5), ("b", "x86_64 CPU, 2 threads", 100.0)):
        result = {"backbone": "google/ELECTRA-large-discriminator", "tokens_per_second": pace}
        write_json(tmp_path / name / "result.json", {**result, "versions": {"machine": machine}})
        write_json(tmp_path / name / "config.json", {"settings": {"max_length": 512}})
    assert t4_plan.measured_paces(tmp_path) == {("electra-large-discriminator", 512): (8_621.5, "2 x Tesla T4")}
    plan = t4_plan.make_plan(np.array([300]), tmp_path)
    assert plan.count("measured on 2 x") == 1
    (line,) = (line for line in plan.splitlines() if line.startswith("| electra"))
    assert "| 1.0, measured on 2 x Tesla T4 |" in line.replace("\u00a0", " ")


def test_plan_has_every_backbone_at_the_lengths_it_takes():
    """768 tokens for DeBERTa and ModernBERT alone."""
    lines = [line.strip("| ").split(" | ") for line in t4_plan.make_plan(np.array([300])).splitlines() if "|" in line]
    found = {(line[0], line[1].replace("\u00a0", " ")) for line in lines[2:]}
    longer = {name for name, config in CONFIGS.items() if config["model_type"] in ("deberta-v2", "modernbert")}
    assert found == {(name, "512") for name in CONFIGS} | {(name, "768") for name in longer}
    assert len(longer) == 9


@pytest.mark.skipif(find_spec(MINILM_PACKAGE) is None, reason="counts tokens with MiniLM's tokenizer")
def test_committed_plan_is_of_this_code():
    """Memory and operations as they are computed now; `python -m report.studies.t4_plan` writes it anew."""
    committed = (t4_plan.FOLDER / "t4_plan.md").read_text(encoding="utf-8")
    now = t4_plan.make_plan(t4_plan.count_tokens())
    assert committed == now
