"""Parameter groups: who learns at which rate."""

import re

import torch
from torch import nn

from prefcls_lib.config import RunConfig
from prefcls_lib.models.network import PreferenceModel

# Peak rate of the head's linear path from the structure features. They are few and standardised, so it is a logistic
# regression trained by AdamW: at this rate 25 steps reach what scikit-learn's fit reaches, at 5e-4 they do not.
WIDE_LEARNING_RATE = 1e-2
_LAYER = re.compile(r"\blayers?\.(\d+)\.")  # ModernBERT calls them layers


def parameter_groups(model: PreferenceModel, config: RunConfig) -> list[dict]:
    """AdamW's groups: each encoder layer, the head and its linear path have their own rates.

    The encoder's top layer has `learning_rate`, each layer below it `layer_decay` times that of the layer above, and
    what stands before or beside the layers (embeddings, ELECTRA's projection, DeBERTa's `rel_embeddings`) one step less
    than the first layer (Clark et al. 2020, https://arxiv.org/abs/2003.10555, appendix B). Biases and norms are not
    decayed. Every trainable parameter is in exactly one group. `peak` keeps the rate that the schedule scales.
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
            peak = WIDE_LEARNING_RATE if name.startswith("head.wide.") else config.head_learning_rate
        group = groups.setdefault(
            (peak, decays),
            {"params": [], "lr": peak, "peak": peak, "weight_decay": config.weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(model: PreferenceModel, config: RunConfig, device: torch.device) -> torch.optim.AdamW:
    """Fused AdamW over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, config), fused=device.type in ("cuda", "cpu"))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's peak rate by `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
