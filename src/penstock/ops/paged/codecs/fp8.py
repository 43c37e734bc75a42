"""8-bit floating point with a scale for each head."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.ops.paged.codecs.contract import LearnedCodec, Stored
from penstock.policy import policy

E4M3 = torch.float8_e4m3fn

#: The largest number of e4m3, and the step of its smallest.
LARGEST, SMALLEST_STEP = 448.0, 2.0**-9


@policy("kv.codec", "fp8")
class Fp8(LearnedCodec):
    """Numbers in e4m3, a byte each, times a scale for each head of each layer, of keys and of values, that is learned
    before the first request: the head's largest magnitude in the text is half of what can be held. Larger ones than
    that are cut off.

    The scales belong to heads, not to tokens, so that kernels for fp8 can read the blocks: on CUDA devices a key's
    scale goes to the query, and a value's to the output; on CPUs they go to scores and weights.
    """

    def stored(self, head_dim: int, dtype: torch.dtype) -> Stored:
        return Stored(head_dim, torch.uint8)

    def learn(self, vectors: Tensor) -> Tensor:
        largest = vectors.float().abs().amax((0, 2))
        return torch.where(largest > 0, 2 * largest / LARGEST, 1.0)

    def encode(self, vectors: Tensor, table: Tensor | None = None) -> Tensor:
        assert table is not None
        numbers = vectors.float() / table[:, None]
        finite = numbers.clamp(-LARGEST, LARGEST).masked_fill_(numbers.isinf(), torch.nan)
        return finite.to(E4M3).view(torch.uint8)

    def decode(self, stored: Tensor, head_dim: int, dtype: torch.dtype, table: Tensor | None = None) -> Tensor:
        assert table is not None
        return (stored.contiguous().view(E4M3).float() * table[:, None]).to(dtype)

    def bound(self, vectors: Tensor, table: Tensor | None = None) -> Tensor:
        assert table is not None
        # Half a unit in the last of 4 bits, or half the smallest step; float32 rounds the quotient and the product.
        size, scale = vectors.abs(), table[:, None].double()
        within = torch.maximum(size * 2.0**-4, scale * SMALLEST_STEP / 2) + size * 2.0**-22
        return torch.maximum(within, size - LARGEST * scale + size * 2.0**-22)
