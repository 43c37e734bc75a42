"""Multi-head latent attention, DeepSeek-V2's (2024): keys and values of all heads from one short vector a token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from penstock.models.attention import AttentionContext
from penstock.models.config import DecoderConfig, LatentConfig
from penstock.models.linear import Linear
from penstock.models.norms import RMSNorm
from penstock.models.rotary import Turns
from penstock.ops.rotary import rotate

#: Of the norms of the short vectors, whatever the model's other norms have.
EPS = 1e-6


class LatentAttention(nn.Module):
    """Attention whose keys and values are products of a short vector, the latent.

    Where keys and values are kept for later tokens, it is the latent that is kept, and attended to, as the one key head
    of all queries: each head's matrix from latent to key is multiplied with its query, and that to value with what it
    has found. Elsewhere keys and values are expanded, which takes fewer operations a pair of tokens.
    """

    def __init__(self, config: DecoderConfig, latent: LatentConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.latent, self.scale = layer, config.heads, latent, config.scale
        self.interleaved = config.rope.interleaved
        bias, size = config.qkv_bias, config.heads * (latent.plain + latent.rotated)
        if latent.query_rank is None:
            self.query = Linear(config.hidden, size, bias=False)
        else:
            self.query_down = Linear(config.hidden, latent.query_rank, bias=bias)
            self.query_norm = RMSNorm(latent.query_rank, EPS)
            self.query_up = Linear(latent.query_rank, size, bias=False)
        self.down = Linear(config.hidden, latent.rank + latent.rotated, bias=bias)
        self.latent_norm = RMSNorm(latent.rank, EPS)
        # Whose parts multiply queries and what is found, and which stays a matrix of numbers therefore.
        self.up = nn.Linear(latent.rank, config.heads * (latent.plain + latent.value), bias=False)
        self.output = Linear(config.attended, config.hidden, bias=config.output_bias)

    def forward(self, x: Tensor, rotary: Turns, context: AttentionContext) -> Tensor:
        """What tokens [*T, hidden] take from each other, [*T, H * V]; ``output`` brings it back to [*T, hidden]."""
        latent, cos, sin = self.latent, *rotary[0]
        query = self.query(x) if latent.query_rank is None else self.query_up(self.query_norm(self.query_down(x)))
        plain, turned = query.unflatten(-1, (self.heads, -1)).split((latent.plain, latent.rotated), -1)
        short, shared = self.down(x).unsqueeze(-2).split((latent.rank, latent.rotated), -1)
        short = self.latent_norm(short)  # [*T, 1, rank]
        turned, shared = (rotate(each, cos, sin, self.interleaved) for each in (turned, shared))
        attend = self._attend_kept if context.keeps else self._attend_expanded
        return attend(plain, turned, short, shared, context).flatten(-2)

    def _attend_expanded(
        self, plain: Tensor, turned: Tensor, short: Tensor, shared: Tensor, context: AttentionContext
    ) -> Tensor:
        latent = self.latent
        expanded = self.up(short).squeeze(-2).unflatten(-1, (self.heads, -1))
        own, value = expanded.split((latent.plain, latent.value), -1)
        key = torch.cat([own, shared.expand(*own.shape[:-1], -1)], -1)
        query = torch.cat([plain, turned], -1)
        return context.attend(self.layer, query, key, value, scale=self.scale, window=None)

    def _attend_kept(
        self, plain: Tensor, turned: Tensor, short: Tensor, shared: Tensor, context: AttentionContext
    ) -> Tensor:
        latent = self.latent
        up = self.up.weight.to(plain.dtype).view(self.heads, -1, latent.rank)
        to_key, to_value = up[:, : latent.plain], up[:, latent.plain :]
        query = torch.cat([torch.einsum("...hp,hpr->...hr", plain, to_key), turned], -1)
        key = torch.cat([short, shared], -1)
        found = context.attend(self.layer, query, key, short, scale=self.scale, window=None)
        return torch.einsum("...hr,hvr->...hv", found, to_value)
