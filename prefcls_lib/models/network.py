"""PreferenceModel: one shared encoder for both sides, fused features, a symmetric head.

    u = pool(encoder(prompt, answer A)),  v = pool(encoder(prompt, answer B))            (B, H) each
    h(u, v) = MLP([u; v; u - v; u * v])                                                  (B, 3)
    concat head:     logits = h(u, v)
    symmetric head:  logits = (h(u, v) + P h(v, u)) / 2              P swaps A and B, so swapping the answers
                                                                     permutes the logits, exactly

On a baseline (`baselines/out_of_fold.py`) the hidden layer has a second output, the correction c, zero at the start:

    logits = offset + (c(u, v) + P c(v, u)) / 2                      offset: the baseline's log-odds (m, -m, t)
    auxiliary logits = (h(u, v) + P h(v, u)) / 2                     of a network without a baseline; in training only

The fusion is InferSent's (Conneau et al. 2017, https://arxiv.org/abs/1705.02364) with u - v signed, as in the study.

The cross-encoder reads both answers in one sequence, in one order and in the other, so attention reaches across them:

    u = pool(encoder(prompt, answer A, answer B)),  v = pool(encoder(prompt, answer B, answer A))
    h(u) = MLP(u)
    logits = (h(u) + P h(v)) / 2                                     exact under a swap; in training one random order

Started from a reward model (`reward.py`), whose score is s(u) = w u, a linear skip adds w (u - v) / T to the logit of
A minus that of B.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from prefcls_lib.config import RunConfig
from prefcls_lib.data.batching import pad_batch, to_device
from prefcls_lib.data.schema import NUM_CLASSES, SWAP

HEAD_WIDTH = 256


class PreferenceHead(nn.Module):
    """(u, v) -> logits, in fp32 whatever the autocast around it."""

    def __init__(self, hidden_size: int, config: RunConfig, skip: nn.Linear | None = None):
        super().__init__()
        self.symmetric = config.head == "symmetric"  # average both orders of A and B, or use one (the original's)
        self.is_cross = config.architecture == "cross"
        self.norm = nn.LayerNorm(hidden_size)
        self.hidden = nn.Linear((1 if self.is_cross else 4) * hidden_size, HEAD_WIDTH)
        self.dropout = nn.Dropout(config.dropout or 0.0)
        self.output = nn.Linear(HEAD_WIDTH, NUM_CLASSES)
        on_baseline = config.start_from not in ("none", None)
        self.correction = nn.Linear(HEAD_WIDTH, NUM_CLASSES) if on_baseline else None
        self.skip = skip  # (H) -> 1, a reward model's score

    def start_at_prior(self, prior: tuple[float, float, float]) -> None:
        """Zero the last weights and set the bias to log(prior), P(A) and P(B) averaged.

        The untrained model then predicts that prior for every row, so the first loss is its cross-entropy; on a
        baseline, it predicts what the baseline does, and the auxiliary output the prior.
        """
        win = (prior[0] + prior[1]) / 2
        with torch.no_grad():
            self.output.weight.zero_()
            self.output.bias.copy_(torch.tensor([math.log(win), math.log(win), math.log(prior[2])]))
            if self.correction is not None:
                self.correction.weight.zero_()
                self.correction.bias.zero_()

    def forward(self, u: Tensor, v: Tensor | None, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, 3), and the auxiliary logits (B, 3), from u, v (B, H).

        Without v (a cross-encoder in training) from the one order of A and B that u has. `offset`: (B, 3), a
        baseline's log-odds, if the head starts from one; else the logits are the auxiliary ones.
        """
        with torch.autocast(u.device.type, enabled=False):
            u, v = u.float(), None if v is None else v.float()
            auxiliary, correction = self._one_order(u, v)
            if self.symmetric and v is not None:
                swapped = self._one_order(v, u)
                auxiliary = (auxiliary + _swap_classes(swapped[0])) / 2
                correction = None if correction is None else (correction + _swap_classes(swapped[1])) / 2
            logits = auxiliary if correction is None else offset + correction
            if self.skip is not None:
                margin = self.skip(u - v) / 2  # (B, 1)
                margin = torch.cat([margin, -margin, torch.zeros_like(margin)], dim=1)
                auxiliary, logits = auxiliary + margin, logits + margin
            return logits, auxiliary

    def _one_order(self, u: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        u, v = self.norm(u), None if self.is_cross else self.norm(v)
        fused = [u] if self.is_cross else [u, v, u - v, u * v]  # (B, H) or (B, 4H) together
        hidden = self.dropout(nn.functional.gelu(self.hidden(torch.cat(fused, dim=1))))
        return self.output(hidden), None if self.correction is None else self.correction(hidden)


class PreferenceModel(nn.Module):
    """A shared encoder of transformers, with fp32 weights, and a head over its two embeddings.

    `pooler`, `skip`: a reward model's; without them the mean over real tokens, in fp32, is the embedding.
    """

    def __init__(
        self, config: RunConfig, encoder: nn.Module, pooler: nn.Module | None = None, skip: nn.Linear | None = None
    ):
        super().__init__()
        self.encoder, self.head = encoder, PreferenceHead(encoder.config.hidden_size, config, skip)
        self.pooler = pooler

    def embed(self, taken: list[int], length: int, token_ids: Sequence[np.ndarray], device: torch.device) -> Tensor:
        """Embeddings (S, H) fp32 of the sides `taken`, padded to `length`, which changes nothing."""
        batch = pad_batch(taken, length, token_ids, self.encoder.config.pad_token_id, device)
        types = {} if self.pooler is None else self.pooler.token_types(batch["input_ids"])
        hidden = self.encoder(**batch, **types).last_hidden_state
        return mean_pool(hidden, batch["attention_mask"]) if self.pooler is None else self.pooler(hidden)

    def embed_sides(
        self, token_ids: Sequence[np.ndarray], planned: list[tuple[list[int], int]], device: torch.device
    ) -> Tensor:
        """Embeddings (S, H) of sides in their order, computed in the padded batches of `plan_padded_batches`."""
        embeddings = torch.cat([self.embed(*batch, token_ids, device) for batch in planned])
        order = np.argsort(np.concatenate([taken for taken, _ in planned]))
        return embeddings[to_device(order, device)]


def _swap_classes(logits: Tensor) -> Tensor:
    """Logits (B, 3) with A and B in each other's place; logits[:, SWAP] would copy SWAP to the GPU."""
    return torch.stack([logits[:, i] for i in SWAP], dim=1)


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean over real tokens: hidden (S, T, H), attention_mask (S, T) -> (S, H) fp32."""
    mask = attention_mask.unsqueeze(-1).float()
    return (hidden.float() * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
