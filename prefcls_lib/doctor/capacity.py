"""What a device can run and hold: arithmetic on a backbone's configuration."""

import psutil
import torch
from transformers import PretrainedConfig

# Bytes that the backward pass holds for a token and a layer in 16-bit autocast (a test counts them), in fp32 twice as
# much: for each hidden unit, and for each unit of the feed-forward's inner width, which is gated in ModernBERT.
BYTES_PER_UNIT, BYTES_PER_INNER = {"deberta-v2": 32}, {"modernbert": 8}  # all other model types: 24 and 4
# DeBERTa's and MPNet's attention is not fused. For each head: its probabilities in fp32 and in fp16 for every position,
# and both of DeBERTa's relative terms in fp16 for every bucket, near and far, left and right.
BYTES_PER_SCORE, BYTES_PER_BUCKET = 6, 8
BYTES_PER_BOUNDARY = 4  # for each hidden unit: the input of the first layer; with checkpointing, of every layer, fp32
SHARE_USED = 0.9  # of the free memory; the rest is for fragmentation, NCCL, and the buffers of the gradient reduction


def count_parameters(config: PretrainedConfig) -> int:
    """About how many parameters an encoder has: embeddings, and attention and feed-forward of every layer."""
    embedding = getattr(config, "embedding_size", config.hidden_size)
    return config.vocab_size * embedding + config.num_hidden_layers * layer_weights(config)


def disk_bytes(config: PretrainedConfig, models: int, at_once: int) -> int:
    """Most bytes that a run of `models` has on disk while `at_once` are in training and the others are saved.

    A model in training has two checkpoints while it writes a new one, each of four copies of its weights, in fp32: the
    weights, AdamW's two moments, and the best weights so far.
    """
    return 4 * count_parameters(config) * (models - at_once + 8 * at_once)


def bytes_per_token(config: PretrainedConfig, half: bool, length: int = 512, checkpointing: bool = False) -> int:
    """Bytes for each token of a side of `length` tokens at the peak, which is where the backward pass starts.

    What all layers hold, and half as much as one layer that its backward pass needs for a moment. With gradient
    checkpointing: every layer's input, and all of the one layer that is being computed again.
    """
    layer = BYTES_PER_UNIT.get(config.model_type, 24) * config.hidden_size
    layer += BYTES_PER_INNER.get(config.model_type, 4) * config.intermediate_size
    if config.model_type in ("deberta-v2", "mpnet"):
        per_head = BYTES_PER_SCORE * length + BYTES_PER_BUCKET * max(getattr(config, "position_buckets", 0), 0)
        layer += per_head * config.num_attention_heads
    layer *= 1 if half else 2
    boundary = BYTES_PER_BOUNDARY * config.hidden_size
    layers = config.num_hidden_layers
    return boundary * layers + layer * 3 // 2 if checkpointing else boundary + layer * (2 * layers + 1) // 2


def fixed_bytes(config: PretrainedConfig, half: bool) -> int:
    """Bytes on the device whatever the batch: weights, gradients and AdamW's two moments, fp32.

    In 16-bit autocast also a copy of every layer's weights, which is kept from the forward to the backward pass.
    """
    return 16 * count_parameters(config) + (2 * config.num_hidden_layers * layer_weights(config) if half else 0)


def largest_micro_batch(
    config: PretrainedConfig, free: int, half: bool, length: int = 512, checkpointing: bool = False
) -> int:
    """The most tokens of one micro-batch with `free` bytes on the device; 0: not even the weights fit."""
    left = SHARE_USED * free - fixed_bytes(config, half)
    return max(0, int(left / bytes_per_token(config, half, length, checkpointing)))


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device; on a CPU what caches of files hold counts as free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def layer_weights(config: PretrainedConfig) -> int:
    """Weights of one layer's matrices."""
    hidden, inner = config.hidden_size, config.intermediate_size
    matrices = 3 if config.model_type == "modernbert" else 2  # its feed-forward is gated
    return 4 * hidden**2 + matrices * hidden * inner
