"""Which parameters learn at which rate, and the course of the rates."""

import re

import torch
from torch import nn

from prefcls_lib.config import RunConfig
from prefcls_lib.models.network import PreferenceModel

# Peak rate of the correction of a baseline as a share of the head's. It starts at a good prediction, which large first
# steps make worse: on 800 competition rows its tie logit drifted by 0.1 at the head's own rate.
CORRECTION_RATE_SHARE = 0.4
_LAYER = re.compile(r"\blayers?\.(\d+)\.")  # ModernBERT calls them layers


def make_optimizer(model: PreferenceModel, config: RunConfig, device: torch.device) -> torch.optim.AdamW:
    """Fused AdamW, in whose groups each encoder layer, the head and the correction have their own rates.

    The encoder's top layer has `learning_rate`, each layer below it `layer_decay` times that of the layer above, and
    what is before or beside the layers (embeddings, ELECTRA's projection, DeBERTa's `rel_embeddings`) one step less
    than the first layer (Clark et al. 2020, https://arxiv.org/abs/2003.10555, appendix B). `peak` keeps the rate that
    the schedule scales. Weight decay is 0.01, of biases and norms 0; 0 or 0.1 changed no loss (report/log.md).
    """
    num_layers = model.encoder.config.num_hidden_layers
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = not name.endswith("bias") and id(parameter) not in norms
        layer = _LAYER.search(name)
        depth = int(layer[1]) + 1 if layer else 0
        if name.startswith(("pooler.", "head.skip.", "encoder.final_norm.")):
            depth = num_layers  # a reward model's, pretrained with its encoder; what ModernBERT has above its layers
        peak = config.learning_rate * config.layer_decay ** (num_layers - depth)
        if name.startswith("head.") and not name.startswith("head.skip."):
            peak = config.head_learning_rate
            peak *= CORRECTION_RATE_SHARE if name.startswith("head.correction.") else 1
        new = {"params": [], "lr": peak, "peak": peak, "weight_decay": 0.01 if decays else 0.0}
        groups.setdefault((peak, decays), new)["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), fused=device.type in ("cuda", "cpu"))


def rate_factor(position: float, steps: int, records: list[dict], config: RunConfig) -> float:
    """Share of the peak learning rate: a linear warm-up, then by `config.schedule` linear to 0, or by plateaus: a tenth
    after every second validation in a row without a new best, as torch's ReduceLROnPlateau has it with patience 1.

    `position` goes from 0 (the first step) to `steps` (the end); `records` are the validations so far.
    """
    warmup_steps = round(steps * config.warmup_ratio)
    if position < warmup_steps:
        return (position + 1) / (warmup_steps + 1)
    if config.schedule == "linear":
        return (steps - position) / max(1, steps - warmup_steps)
    best, waited, share = float("inf"), 0, 1.0
    for loss in (record["valid_log_loss"] for record in records):
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited == 2:
            share, waited = share * 0.1, 0
    return share
