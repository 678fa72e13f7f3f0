"""The plan of a training run in steps: the learning rate at each, where to validate, and how many fit into the time."""

from prefcls_lib.config import RunConfig

PACE_STEPS = 5  # steps whose pace is measured before a time budget is planned,
PACE_SHARE = 0.1  # or fewer, where they take more than this share of it


def rate_factor(step: int, total_steps: int, steps_per_epoch: int, records: list[dict], config: RunConfig) -> float:
    """Share of the peak learning rate at `step` (0 = first), by `config.schedule`.

    Args:
        step, total_steps, steps_per_epoch: where the run stands.
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


def steps_in_time(
    step: int, total_steps: int, validations: int, left: float, step_seconds: float, validation_seconds: float
) -> int:
    """The total steps that fit into the `left` seconds after `step`; never more than planned, never fewer than done.

    Args:
        step, total_steps: done and planned.
        validations: still planned.
        left: seconds until training must be over.
        step_seconds, validation_seconds: what one takes, as measured.
    """
    needed = (total_steps - step) * step_seconds + validations * validation_seconds
    if needed <= left or total_steps == step:
        return total_steps
    share = max(0.0, left - validation_seconds) / max(needed - validation_seconds, 1e-9)
    return step + int((total_steps - step) * min(1.0, share))
