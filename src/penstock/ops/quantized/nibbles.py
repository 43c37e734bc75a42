"""Codes of four bits, and the two orders in which they are stored.

*In pairs*, as files have them: uint8 [M, K / 2], the first of two in the low bits. *Interleaved*, as kernels on CUDA
read them fastest: int16 [M, K / 4], in which the 32 words of a block of 128 columns have its first 32 codes in their
lowest bits, the next 32 above these, and so on; half a block behind the last has 16 words, likewise. What is decoded of
a block's words at once has columns beside each other then, and is multiplied with rows of x as they are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

#: Columns of a block, and of those codes that have the same bits of its words.
BLOCK, PLANE = 128, 32

#: Codes that are brought into another order at a time.
PIECE = 1 << 26


def columns_of(values: Tensor) -> int:
    """How many codes a row of ``values`` has, in whichever order."""
    return values.shape[1] * 2 * values.element_size()


def codes(values: Tensor) -> Tensor:
    """Those of each row, from the first on: uint8 [M, K]."""
    if values.dtype == torch.uint8:
        return torch.stack([values & 15, values >> 4], -1).flatten(1)
    whole = values.shape[1] // PLANE * PLANE
    return _joined(_planes, values[:, :whole], values[:, whole:])


def paired(values: Tensor) -> Tensor:
    """The same codes in pairs, uint8 [M, K / 2]."""
    return values if values.dtype == torch.uint8 else _in_pieces(values, torch.uint8, _pairs)


def interleaved(values: Tensor) -> Tensor:
    """The same codes interleaved, int16 [M, K / 4]; in pairs, where K is no whole number of halves of blocks, or less
    than a block."""
    columns = columns_of(values)
    if values.dtype == torch.int16 or columns < BLOCK or columns % (BLOCK // 2):
        return values
    return _in_pieces(values, torch.int16, _words)


def arranged(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with their ``values`` in the order that kernels on their device want."""
    values = parts["values"]
    return {**parts, "values": paired(values) if values.device.type == "cpu" else interleaved(values)}


def _pairs(found: Tensor) -> Tensor:
    return found[:, 0::2] | found[:, 1::2] << 4


def _words(found: Tensor) -> Tensor:
    whole = found.shape[1] // BLOCK * BLOCK
    return _joined(_of_planes, found[:, :whole], found[:, whole:])


def _joined(order: Callable[[Tensor, int], Tensor], blocks: Tensor, half: Tensor) -> Tensor:
    """Whole blocks and half a one, where there are such, in another order."""
    parts = [order(part, size) for part, size in ((blocks, PLANE), (half, PLANE // 2)) if part.shape[1]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _of_planes(found: Tensor, size: int) -> Tensor:
    """The words of blocks whose planes have so many codes."""
    first, second, third, fourth = found.reshape(len(found), -1, BLOCK // PLANE, size).unbind(2)
    return torch.stack([first | second << 4, third | fourth << 4], -1).flatten(1).view(torch.int16)


def _planes(words: Tensor, size: int) -> Tensor:
    """The codes of these."""
    low, high = words.contiguous().view(torch.uint8).view(len(words), -1, size, 2).unbind(-1)
    return torch.stack([low & 15, low >> 4, high & 15, high >> 4], 2).flatten(1)


def _in_pieces(values: Tensor, dtype: torch.dtype, order: Callable[[Tensor], Tensor]) -> Tensor:
    """All of ``values``, some rows after the other: between the orders, a code takes a byte."""
    columns = columns_of(values)
    out = torch.empty(len(values), columns // (2 * dtype.itemsize), dtype=dtype, device=values.device)
    step = max(1, PIECE // columns)
    for start in range(0, len(values), step):
        out[start : start + step] = order(codes(values[start : start + step]))
    return out
