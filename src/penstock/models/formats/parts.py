"""What the quantization methods' tensors have in common."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.core.errors import ModelError


def part(module: str, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor of ``module`` that must be there."""
    if name not in tensors:
        raise ModelError(f"{module} lacks {name}", hint="Is the checkpoint complete?")
    return tensors[name]


def scales(module: str, scale: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """The ``scale`` of each row, float32 [M, k], from those of blocks of ``block`` rows and columns: [m, k]."""
    rows, columns = shape
    wanted = (-(-rows // block[0]), -(-columns // block[1]))
    alike = (wanted, wanted[:1]) if wanted[1] == 1 else (wanted,)  # one for each row may have no columns
    if tuple(scale.shape) not in alike and not scale.numel() == wanted[0] * wanted[1] == 1:
        raise ModelError(f"the scales of {module} are {list(scale.shape)}, but its matrix needs {list(wanted)}")
    return scale.float().view(wanted).repeat_interleave(block[0], 0)[:rows].contiguous()


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` numbers of each row of int32 ``words`` [M, n], of ``bits`` bits each, from the lowest on and
    across words where ``bits`` does not divide 32: uint8 [M, count]."""
    raw = words.contiguous().view(torch.uint8)
    if bits == 8:
        return raw[:, :count]
    singles = torch.stack([raw >> bit & 1 for bit in range(8)], -1).flatten(1)[:, : count * bits]
    weights = 2 ** torch.arange(bits, dtype=torch.uint8)
    return (singles.view(-1, count, bits) * weights).sum(-1, dtype=torch.uint8)


def pairs(words: Tensor, count: int) -> Tensor:
    """The first ``count`` numbers of 4 bits, an even number of them, of each row of int32 ``words`` [M, n], from the
    lowest bits on, as they lie there two in a byte: uint8 [M, count / 2]."""
    return words.contiguous().view(torch.uint8)[:, : count // 2].contiguous()


def nibbles(values: Tensor) -> Tensor:
    """Numbers from 0 to 15, uint8 [M, K], two in a byte, the first in its low bits: [M, K / 2]."""
    return (values[:, ::2] | values[:, 1::2] << 4).contiguous()
