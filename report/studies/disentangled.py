"""DeBERTa's disentangled attention through PyTorch's fused attention, exactly; `make gpu-check` compares the two.

It is not in the library: on a CPU it gains on short sides only (see log.md), and on a GPU it is not measured yet.

Transformers computes it eagerly, with gathers over (queries, keys) and the position tables repeated over the batch.
Here the two relative terms become one additive bias of `scaled_dot_product_attention`:

    scores[i, j] = (q_i k_j + q_i kr[i - j] + k_j qr[i - j]) / sqrt(3 d)          (He et al. 2021, arXiv 2006.03654)

kr and qr are looked up once for each of the 2 T - 1 distances, and the product of every query (key) with every distance
is shifted into place by a change of strides: no gather over T x T, and no scatter in the backward pass.
"""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention


def use_fused_attention(encoder: PreTrainedModel) -> None:
    """Let every attention of a DeBERTa-v3 encoder take the fused path."""
    for module in encoder.modules():
        if isinstance(module, DisentangledSelfAttention):
            module.__class__ = FusedDisentangledSelfAttention


class FusedDisentangledSelfAttention(DisentangledSelfAttention):
    """The same parameters and results, but for the attention weights, which it does not return."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, T, H), mask (B, 1, T, T), relative_pos (1, T, T), rel_embeddings (2 span, H)."""
        batch, length, _ = hidden_states.shape
        q, k, v = (
            self._split_heads(projection(hidden_states))  # (B, A, T, d)
            for projection in (self.query_proj, self.key_proj, self.value_proj)
        )
        # buckets of the distances T-1 ... -(T-1), from the first column and the first row of (T, T)
        buckets = torch.cat([relative_pos[0, :, 0].flip(0), relative_pos[0, 0, 1:]])
        table = self.pos_dropout(rel_embeddings)[(buckets + self.pos_ebd_size).clamp(0, 2 * self.pos_ebd_size - 1)]
        pos_key, pos_query = self.key_proj, self.query_proj
        if not self.share_att_key:
            pos_key, pos_query = self.pos_key_proj, self.pos_query_proj
        scale = 1 / math.sqrt(3 * q.shape[-1])
        q = q * scale
        kr = self._split_heads(pos_key(table)[None])[0]  # (A, 2T-1, d), distances falling
        qr = self._split_heads(pos_query(table)[None])[0].flip(1) * scale  # distances rising
        c2p = _shift(q @ kr.transpose(-1, -2))  # (B, A, T, T)
        p2c = _shift(k @ qr.transpose(-1, -2)).transpose(-1, -2)
        bias = (c2p + p2c).masked_fill(
            ~attention_mask[:, :, :1].bool(), -math.inf
        )  # a real query's keys: all real ones
        dropout = self.dropout.p if self.training else 0.0
        context = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=1.0)
        return context.transpose(1, 2).reshape(batch, length, -1), None

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, T, H) -> (B, A, T, d)"""
        return x.view(*x.shape[:2], self.num_attention_heads, -1).transpose(1, 2)


def _shift(products: Tensor) -> Tensor:
    """(..., T, 2T-1) -> (..., T, T): row i keeps its columns T-1-i ... 2T-2-i. Only strides change."""
    *batch, length, distances = products.shape
    if length == 1:
        return products
    flat = products.reshape(*batch, length * distances)
    return flat[..., length - 1 : length - 1 + length * (distances - 1)].view(*batch, length, distances - 1)[
        ..., :length
    ]
