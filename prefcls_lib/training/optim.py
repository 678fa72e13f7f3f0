"""Which parameters learn at which rate; the plan in steps: rates, validations, and how many steps fit into the time."""

import re

import numpy as np
import torch
from torch import nn

from prefcls_lib.config import RunConfig
from prefcls_lib.models.network import PreferenceModel

# Peak rate of the head's linear path from the structure features. They are few and standardised, so it is a logistic
# regression trained by AdamW: at this rate 25 steps reach what scikit-learn's fit reaches, at 5e-4 they do not.
WIDE_LEARNING_RATE = 1e-2
# Peak rate of the correction of a baseline as a share of the head's. It starts at a good prediction, which large first
# steps make worse: on 800 competition rows its tie logit drifted by 0.1 at the head's own rate.
CORRECTION_RATE_SHARE = 0.4
PACE_STEPS = 5  # steps whose pace is measured before a time budget is planned,
PACE_SHARE = 0.1  # or fewer, where they take more than this share of it
_LAYER = re.compile(r"\blayers?\.(\d+)\.")  # ModernBERT calls them layers


def parameter_groups(model: PreferenceModel, config: RunConfig) -> list[dict]:
    """AdamW's groups: each encoder layer, the head and its linear path have their own rates.

    The encoder's top layer has `learning_rate`, each layer below it `layer_decay` times that of the layer above, and
    what is before or beside the layers (embeddings, ELECTRA's projection, DeBERTa's `rel_embeddings`) one step less
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
            peak *= CORRECTION_RATE_SHARE if name.startswith("head.correction.") else 1
        group = groups.setdefault(
            (peak, decays),
            {"params": [], "lr": peak, "peak": peak, "weight_decay": config.weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(model: PreferenceModel, config: RunConfig, device: torch.device) -> torch.optim.AdamW:
    """Fused AdamW over `parameter_groups`.

    Its moments are there before the first step, so memory runs out in a micro-batch if it does, and not in an update.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, config), fused=device.type in ("cuda", "cpu"))
    for group in optimizer.param_groups:
        for p in group["params"]:
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": torch.zeros((), device=device), **moments}
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's peak rate by `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def rate_factor(step: int, total_steps: int, steps_per_epoch: int, records: list[dict], config: RunConfig) -> float:
    """Share of the peak learning rate at `step` (0 = first), by `config.schedule`.

    Args:
        step, total_steps, steps_per_epoch: the position of the run.
        records: the validations so far; "plateau" looks at those at the end of an epoch.
        config: `schedule` and `warmup_ratio`.
    """
    if config.schedule == "plateau":
        per_epoch = [record["valid_log_loss"] for record in records if float(record["epoch"]).is_integer()]
        planned = steps_per_epoch * config.num_epochs  # a plan that was cut short does not warm up faster
        return plateau_factor(per_epoch) * min(1.0, (step + 1) / (1 + config.warmup_ratio * planned))
    return learning_rate_factor(step, total_steps, config.warmup_ratio)


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Share of the peak rate at `step` (0 = first): linear warm-up over the first share of steps, then linear to 0."""
    warmup_steps = round(total_steps * warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (total_steps - step) / max(1, total_steps - warmup_steps)


def plateau_factor(losses: list[float], patience: int = 1, factor: float = 0.1) -> float:
    """Share of the peak rate after validations with these losses, as torch's ReduceLROnPlateau has it.

    After more than `patience` validations without a new best, the rate is cut to `factor` of what it was.
    """
    best, waited, share = float("inf"), 0, 1.0
    for loss in losses:
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited > patience:
            share, waited = share * factor, 0
    return share


def validation_steps(config: RunConfig, steps_per_epoch: int, total_steps: int) -> set[int]:
    """Step counts after which to validate: evenly spread over each epoch, its end included; and the last step."""
    parts = min(config.validations_per_epoch, steps_per_epoch)
    ends = [round(steps_per_epoch * part / parts) for part in range(1, parts + 1)]
    steps = {epoch * steps_per_epoch + end for epoch in range(config.num_epochs) for end in ends}
    return {step for step in steps if step < total_steps} | {total_steps}


class Pace:
    """Tokens a second of a session's steps. The first is left out: a GPU loads its kernels in it."""

    def __init__(self):
        self.steps: list[tuple[int, float]] = []  # tokens and seconds of each

    @property
    def tokens_per_second(self) -> float:
        """Over all steps but the first."""
        tokens, seconds = np.sum(self.steps[1:] or self.steps, axis=0)
        return tokens / max(seconds, 1e-9)

    def is_due(self, step: int, total_steps: int, time_left: float) -> bool:
        """Whether to plan at `step`: after PACE_STEPS (fewer, if they are slow), then after each hundredth."""
        done, used = len(self.steps), sum(seconds for _, seconds in self.steps)
        if done < PACE_STEPS:
            return used >= PACE_SHARE * (used + time_left)
        return done == PACE_STEPS or step % max(1, total_steps // 100) == 0


def steps_in_time(step: int, ahead: np.ndarray, validations: set[int], valid_tokens: int, tokens_left: float) -> int:
    """The total steps for which there is time after `step`, with the validations on the way and one after the last.

    Args:
        step: steps done.
        ahead: (S,) tokens of each planned step after `step`.
        validations: planned step counts after which to validate, of `valid_tokens` each.
        tokens_left: what can be computed in the time left.
    """
    is_validated = np.isin(np.arange(step + 1, step + 1 + len(ahead)), list(validations))
    needed = np.cumsum(ahead) + valid_tokens * (np.cumsum(is_validated) + ~is_validated)
    return step + int(np.count_nonzero(needed <= tokens_left))
