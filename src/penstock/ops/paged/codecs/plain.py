"""Keys and values as the model computes them."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.ops.paged.codecs.contract import Codec, Stored
from penstock.policy import policy


@policy("kv.codec", "plain")
class Plain(Codec):
    """Numbers of the model's own dtype."""

    def stored(self, head_dim: int, dtype: torch.dtype) -> Stored:
        return Stored(head_dim, dtype)

    def encode(self, vectors: Tensor, table: Tensor | None = None) -> Tensor:
        return vectors

    def decode(self, stored: Tensor, head_dim: int, dtype: torch.dtype, table: Tensor | None = None) -> Tensor:
        return stored

    def bound(self, vectors: Tensor, table: Tensor | None = None) -> Tensor:
        return torch.zeros_like(vectors)
