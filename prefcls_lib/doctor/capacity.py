"""What a device can run and hold, and how long it would take: pure arithmetic on a backbone's configuration."""

import os
import re
from pathlib import Path

import torch
from transformers import PretrainedConfig

# Bytes that the backward pass holds for a token and a layer in 16-bit autocast (a test counts them); fp32 takes twice
# as much. For each hidden unit; ELECTRA-large was measured at 24 layers x 1,024 units x 40 bytes = 0.98 MB a token.
BYTES_PER_UNIT = 40
# DeBERTa's attention is not fused. For each head: its probabilities in fp32 and in fp16 for every position of the side,
BYTES_PER_SCORE = 6
# and both of its relative terms in fp16 for every bucket, near and far, left and right.
BYTES_PER_BUCKET = 8
BYTES_PER_BOUNDARY = 4  # with gradient checkpointing: a layer's input, fp32, for each hidden unit
SHARE_USED = 0.85  # of the free memory
# Assumed for projections: what a T4 sustains in fp16 with these encoders, of its peak of 65. Nobody measured it here.
T4_FLOP_PER_SECOND = 15e12


def can_run(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether a torch with code for `built_for` (sm_75, compute_90, ...) runs on a GPU of `capability`.

    Machine code (sm_XY) runs on the same major number and the same or a higher minor one; portable code (compute_XY)
    on everything as new or newer.
    """
    for name in built_for:
        kind, number = re.fullmatch(r"(sm|compute)_(\d+)[a-z]*", name).groups()
        major, minor = divmod(int(number), 10)
        if kind == "compute" and capability >= (major, minor):
            return True
        if kind == "sm" and capability[0] == major and capability[1] >= minor:
            return True
    return False


def count_parameters(config: PretrainedConfig) -> int:
    """About how many parameters an encoder has: embeddings, and attention and feed-forward of every layer."""
    embedding = getattr(config, "embedding_size", config.hidden_size)
    return config.vocab_size * embedding + config.num_hidden_layers * _layer_weights(config)


def flop_per_token(config: PretrainedConfig, length: float) -> float:
    """Operations of a forward pass for one token of a side of `length` tokens: two for each weight, and attention's.

    DeBERTa's attention also compares each token with every bucket of distances, twice.
    """
    attention = 4 * config.hidden_size * length
    if config.model_type == "deberta-v2":
        attention += 8 * config.hidden_size * max(config.position_buckets, 0)
    return config.num_hidden_layers * (2 * _layer_weights(config) + attention)


def weight_bytes(config: PretrainedConfig) -> int:
    """Bytes of the weights on disk, fp32."""
    return 4 * count_parameters(config)


def state_bytes(config: PretrainedConfig) -> int:
    """Bytes of a checkpoint in training: weights and AdamW's two moments, fp32."""
    return 12 * count_parameters(config)


def bytes_per_token(config: PretrainedConfig, half: bool, length: int = 512, checkpointing: bool = False) -> int:
    """Bytes that the backward pass holds for each token of a side of `length` tokens.

    With gradient checkpointing: every layer's input, and all of the one layer that is being computed again.
    """
    layer = BYTES_PER_UNIT * config.hidden_size
    if config.model_type == "deberta-v2":
        per_head = BYTES_PER_SCORE * length + BYTES_PER_BUCKET * max(config.position_buckets, 0)
        layer += per_head * config.num_attention_heads
    layer *= 1 if half else 2
    if checkpointing:
        return layer + BYTES_PER_BOUNDARY * config.hidden_size * config.num_hidden_layers
    return layer * config.num_hidden_layers


def fixed_bytes(config: PretrainedConfig) -> int:
    """Bytes of weights, gradients and AdamW's two moments on the device, fp32."""
    return 16 * count_parameters(config)


def largest_micro_step(
    config: PretrainedConfig, free: int, half: bool, length: int = 512, checkpointing: bool = False
) -> int:
    """The most tokens of one micro-batch beside weights, gradients and optimizer state; 0: not even these fit."""
    left = SHARE_USED * free - fixed_bytes(config)
    return max(0, int(left / bytes_per_token(config, half, length, checkpointing)))


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # what a cache of files holds counts as free, which sysconf does not know
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _layer_weights(config: PretrainedConfig) -> int:
    hidden, inner = config.hidden_size, config.intermediate_size
    matrices = 3 if config.model_type == "modernbert" else 2  # its feed-forward is gated
    return 4 * hidden**2 + matrices * hidden * inner
