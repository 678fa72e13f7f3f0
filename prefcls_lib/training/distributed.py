"""One model trained by several processes (accelerate over torch.distributed), each with a share of the rows.

Every process takes its share of each optimizer step's pairs, the gradients are summed, and all take the same step; so
the result is that of one process, whatever their number. In one process nothing here does anything.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast


def share_weights(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Give every process the weights of process 0."""
    if accelerator.num_processes > 1:
        for tensor in model.state_dict().values():
            broadcast(tensor)


def sum_gradients(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Sum the gradients of all processes; a parameter that one of them has not used counts as zero there."""
    if accelerator.num_processes == 1:
        return
    for parameter in (p for p in model.parameters() if p.requires_grad):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)


def sum_counts(loss_sum: torch.Tensor, counts: list[float], accelerator: Accelerator) -> tuple[torch.Tensor, list]:
    """The loss of a step, and other counts of it, summed over the processes."""
    if accelerator.num_processes == 1:
        return loss_sum, counts
    summed = torch.tensor([0.0, *counts], dtype=torch.float64, device=accelerator.device)
    summed[0] = loss_sum
    torch.distributed.all_reduce(summed)
    return summed[0], summed[1:].tolist()
