"""One job over several processes (accelerate over torch.distributed): each has the whole model and a share of the work.

Every process takes its share of each optimizer step's pairs, the gradients are summed, and all take the same step; so
the result is that of one process, whatever their number. In one process nothing here does anything.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list

from prefcls_lib.data.batching import TokenCount

BUCKET_NUMBERS = 2**24  # gradients summed in one call: 64 MB of fp32


def share_weights(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Give every process the weights of process 0."""
    if accelerator.num_processes > 1:
        for tensor in model.state_dict().values():
            broadcast(tensor)


def sum_gradients(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Sum the gradients of all processes; a parameter that one of them has not used counts as zero there."""
    if accelerator.num_processes == 1:
        return
    buckets: list[list[torch.nn.Parameter]] = [[]]
    for parameter in model.parameters():
        if sum(p.numel() for p in buckets[-1]) > BUCKET_NUMBERS:
            buckets.append([])
        if parameter.requires_grad:
            buckets[-1].append(parameter)
    for bucket in filter(None, buckets):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        summed = accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "sum")
        for parameter, grad in zip(bucket, summed.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = grad.view_as(parameter)


def sum_counts(
    loss_sum: torch.Tensor, tokens: TokenCount, stop: bool, accelerator: Accelerator
) -> tuple[torch.Tensor, TokenCount, bool]:
    """Loss and tokens of a step summed over the processes, and whether any of them was asked to stop."""
    if accelerator.num_processes == 1:
        return loss_sum, tokens, stop
    counts = torch.tensor([tokens.real, tokens.computed, stop], dtype=torch.float64, device=accelerator.device)
    counts = accelerator.reduce(torch.cat([loss_sum.double().reshape(1), counts]), "sum")
    real, computed, stops = (int(x) for x in counts[1:])
    return counts[0], TokenCount(real, computed), stops > 0


def from_main_process(value: int, accelerator: Accelerator) -> int:
    """The value that process 0 has, in every process: clocks differ, and a plan must not."""
    return value if accelerator.num_processes == 1 else broadcast_object_list([value])[0]
