"""4-bit integers with a scale and an offset for each group of channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from penstock.ops.paged.codecs.contract import Codec, Stored
from penstock.policy import policy

#: Groups whose step would be less than this are constant: 1 / step is finite for all others.
LEAST_STEP = torch.finfo(torch.float32).tiny


@policy("kv.codec", "int4")
class Int4(Codec):
    """Half a byte for each number: so many steps above the least of its ``group`` of neighbouring channels. Step and
    least number of a group are bfloat16, rounded so that the steps from one reach over the whole group. A vector takes
    ceil(head_dim / 2) + 4 ceil(head_dim / group) bytes.

    Groups are of one token, for keys as for values. KIVI (Liu et al., 2024) has groups of many tokens in one channel
    for keys, whose outliers lie in few channels. A token would have to wait in full precision for the others of its
    group then, and a block that is cut amidst a group would have to be computed again. Not built: that.
    """

    group: PositiveInt = 32

    def stored(self, head_dim: int, dtype: torch.dtype) -> Stored:
        return Stored(-(-head_dim // 2) + 4 * -(-head_dim // self.group), torch.uint8)

    def encode(self, vectors: Tensor, table: Tensor | None = None) -> Tensor:
        groups = self._grouped(vectors.float())
        low, step = self._scales(groups)
        inverse = torch.where(step < LEAST_STEP, 0.0, 1 / step)
        codes = ((groups - low) * inverse).round().clamp(0, 15).nan_to_num(0).to(torch.uint8).flatten(-2)
        even = F.pad(codes[..., : vectors.shape[-1]], (0, vectors.shape[-1] % 2))
        scales = torch.cat([low, step], -1).flatten(-2).to(torch.bfloat16).view(torch.uint8)
        return torch.cat([even[..., ::2] | even[..., 1::2] << 4, scales], -1)

    def decode(self, stored: Tensor, head_dim: int, dtype: torch.dtype, table: Tensor | None = None) -> Tensor:
        size = -(-head_dim // 2)
        codes = torch.stack([stored[..., :size] & 15, stored[..., :size] >> 4], -1).flatten(-2)[..., :head_dim]
        beside = stored[..., size:].clone(memory_format=torch.contiguous_format)
        scales = beside.view(torch.bfloat16).float().view(*stored.shape[:-1], -1, 2)
        numbers = scales[..., :1] + self._grouped(codes.float()) * scales[..., 1:]
        return numbers.flatten(-2)[..., :head_dim].to(dtype)

    def bound(self, vectors: Tensor, table: Tensor | None = None) -> Tensor:
        # Half a step, and what float32 rounds.
        groups = self._grouped(vectors.float())
        _, step = self._scales(groups)
        half = (step / 2 * (1 + 2.0**-10) + 15 * LEAST_STEP).expand_as(groups).flatten(-2)[..., : vectors.shape[-1]]
        return half.double() + vectors.abs() * 2.0**-22

    def _grouped(self, vectors: Tensor) -> Tensor:
        """Vectors [..., D] as [..., groups, group]; where they do not fill the last group, their last number does."""
        missing = -vectors.shape[-1] % self.group
        filled = torch.cat([vectors, vectors[..., -1:].expand(*vectors.shape[:-1], missing)], -1)
        return filled.view(*vectors.shape[:-1], -1, self.group)

    @staticmethod
    def _scales(groups: Tensor) -> tuple[Tensor, Tensor]:
        """The least number and the step of each group, [..., groups, 1]: numbers of bfloat16."""
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        low = -_raised(-low)
        return low, _raised((high - low) / 15)


def _raised(numbers: Tensor) -> Tensor:
    """float32 ``numbers`` rounded up to bfloat16, whose bits are the upper half."""
    bits = torch.where(numbers.isnan(), torch.nan, numbers).view(torch.int32)
    return (torch.where(numbers > 0, bits + 0xFFFF, bits) & -0x10000).view(torch.float32)
