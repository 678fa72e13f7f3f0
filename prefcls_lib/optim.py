"""Parameter groups and the learning rate schedule."""

import torch
from torch import nn

from prefcls_lib.config import RunConfig
from prefcls_lib.model import PreferenceModel

# Peak rate of the head's linear path from the structure features. They are few and standardised, so it is a logistic
# regression trained by AdamW: at this rate 25 steps reach what scikit-learn's fit reaches, at 5e-4 they do not.
WIDE_LEARNING_RATE = 1e-2


def parameter_groups(model: PreferenceModel, config: RunConfig) -> list[dict]:
    """AdamW's groups: encoder, head and its linear path with their own rates; no weight decay on biases and norms.

    Every trainable parameter is in exactly one group. `peak` keeps the rate that the schedule scales.
    """
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = not name.endswith("bias") and id(parameter) not in norms
        peak = config.learning_rate
        if name.startswith("head."):
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


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Share of the peak rate at `step` (0 = first): linear warm-up over the first share of steps, then linear to 0."""
    warmup_steps = round(total_steps * warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (total_steps - step) / max(1, total_steps - warmup_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's peak rate by `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
