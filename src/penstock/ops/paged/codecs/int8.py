"""8-bit integers with a scale for each vector."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.ops.paged.codecs.contract import Codec, Stored
from penstock.policy import policy

#: Bytes of a vector's scale, a float32 behind its codes.
SCALE_BYTES = 4

#: Vectors whose step would be less than this are zero: 1 / step is finite for all others.
LEAST_STEP = torch.finfo(torch.float32).tiny


@policy("kv.codec", "int8")
class Int8(Codec):
    """A signed byte for each number, times a step for each token and head: the vector's largest magnitude / 127, in
    float32. A vector takes head_dim + 4 bytes.

    The CPU's kernel reads these blocks as they are, with the steps of a key multiplied to its score and those of a
    value to its weight.
    """

    def stored(self, head_dim: int, dtype: torch.dtype) -> Stored:
        return Stored(head_dim + SCALE_BYTES, torch.int8)

    def encode(self, vectors: Tensor, table: Tensor | None = None) -> Tensor:
        numbers = vectors.float()
        step = numbers.abs().amax(-1, keepdim=True) / 127
        # NaN is in the step, and so in all that is decoded.
        inverse = torch.where(step < LEAST_STEP, 0.0, 1 / step)
        codes = (numbers * inverse).round().nan_to_num(0, 0, 0).to(torch.int8)
        return torch.cat([codes, torch.where(step.isinf(), torch.nan, step).view(torch.int8)], -1)

    def decode(self, stored: Tensor, head_dim: int, dtype: torch.dtype, table: Tensor | None = None) -> Tensor:
        step = stored[..., head_dim:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        return (stored[..., :head_dim] * step).to(dtype)

    def bound(self, vectors: Tensor, table: Tensor | None = None) -> Tensor:
        # Half a step, and what float32 rounds: the step, its inverse, and two products.
        largest = vectors.abs().amax(-1, keepdim=True)
        return (largest / 254 * (1 + 2.0**-12) + 127 * LEAST_STEP).expand_as(vectors)
