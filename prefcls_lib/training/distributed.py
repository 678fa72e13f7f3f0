"""One job over several processes (accelerate over torch.distributed): each has the whole model and a share of the work.

Every process takes its share of each optimizer step's pairs, the gradients are summed, and all take the same step; so
the result is that of one process, whatever their number. In one process nothing here does anything.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

# Of a scaled gradient that is sent in fp16. At the scaler's first 2^16, what a weight has summed over the tokens would
# overflow from 1 on; so it may be 16, and is exact to 0.1 % down to 1.5e-8.
FP16_SHARE = 1 / 16


def share_weights(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Give every process the weights of process 0."""
    if accelerator.num_processes > 1:
        for tensor in model.state_dict().values():
            broadcast(tensor)


def sum_gradients(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Sum the gradients of all processes; a parameter that one of them has not used counts as zero there.

    Where the loss is scaled they travel in fp16, half the bytes. What overflows there is skipped as in a backward pass.
    """
    if accelerator.num_processes == 1:
        return
    for parameter in (p for p in model.parameters() if p.requires_grad):
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if accelerator.scaler is None:
            torch.distributed.all_reduce(grad)
        else:
            half = (grad * FP16_SHARE).half()
            torch.distributed.all_reduce(half)
            grad.copy_(half).div_(FP16_SHARE)
        parameter.grad = grad


def sum_counts(
    loss_sum: torch.Tensor, counts: list[float], accelerator: Accelerator
) -> tuple[torch.Tensor, list[float]]:
    """The loss of a step, and other counts of it, summed over the processes."""
    if accelerator.num_processes == 1:
        return loss_sum, counts
    summed = torch.tensor([0.0, *counts], dtype=torch.float64, device=accelerator.device)
    summed[0] = loss_sum
    torch.distributed.all_reduce(summed)
    return summed[0], summed[1:].tolist()
