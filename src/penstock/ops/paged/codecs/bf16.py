"""bfloat16, whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.ops.paged.codecs.contract import Codec, Stored
from penstock.policy import policy


@policy("kv.codec", "bf16")
class Bf16(Codec):
    """Numbers rounded to bfloat16: half the bytes of a model in float32."""

    def stored(self, head_dim: int, dtype: torch.dtype) -> Stored:
        return Stored(head_dim, torch.bfloat16)

    def encode(self, vectors: Tensor, table: Tensor | None = None) -> Tensor:
        return vectors.to(torch.bfloat16)

    def decode(self, stored: Tensor, head_dim: int, dtype: torch.dtype, table: Tensor | None = None) -> Tensor:
        return stored.to(dtype)

    def bound(self, vectors: Tensor, table: Tensor | None = None) -> Tensor:
        # Half a unit in the last of 8 bits; the least step is 2^-133.
        return vectors.abs() * 2.0**-8 + 2.0**-134
