"""The native products with quantized matrices; see ``cpu_kernel.cpp``."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from penstock.ops import native
from penstock.ops.linear import outruns_libraries
from penstock.ops.quantized import nibbles

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")

#: Columns that are decoded at a time: all sizes of rows and groups are multiples of it.
UNIT = 32

#: Up to so many rows of x the native product is the faster one; above, a library multiplies with what is dequantized,
#: unless our kernels outrun it anyhow.
FEW = 64


def serves(x: Tensor, columns: int, group: int | None) -> bool:
    """Whether ``x`` [N, K] is multiplied natively with a matrix of so many columns, in groups of ``group``."""
    fits = columns % UNIT == 0 and (group is None or _fits(group))
    here = not x.is_cuda and x.dtype in (torch.float32, torch.bfloat16) and fits and native.serves(SOURCE)
    return here and (x.shape[0] <= FEW or outruns_libraries())


def _fits(group: int) -> bool:
    """Whether a group is of so many whole units that a shift finds it."""
    return group >= UNIT and group.bit_count() == 1


def product(
    kind: str,
    x: Tensor,
    values: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    table: Tensor | None = None,
    *,
    group: int | None = None,
) -> Tensor:
    """``x`` [N, K] times the transpose of a matrix [M, K]: [N, M] in the dtype of ``x``, computed in float32.

    Args:
        kind: the native function, which says how the matrix is stored.
        values: its rows as they are stored, [M, ...].
        scale: float32 [M, k] of the groups of columns, where they are not within ``values``.
        offset: the same, added.
        table: float32, the numbers that codes stand for.
        group: columns of a group; None: all of them.
    """
    rows = x.float().contiguous()
    if kind in ("int4", "table4"):
        values = nibbles.paired(values)
    (count, columns), height = x.shape, values.shape[0]
    values = values.contiguous()
    kept = [part if part is None else part.contiguous() for part in (scale, offset, table)]
    out = torch.empty(count, height)
    pointers = [None if part is None else part.data_ptr() for part in kept]
    groups, shift = (1, 63) if scale is None or group is None else (scale.shape[1], group.bit_length() - 1)
    sizes = (count, height, columns, values.nbytes // max(1, height), groups, shift, torch.get_num_threads())
    places = rows.data_ptr(), values.data_ptr(), *pointers, out.data_ptr()
    _function(f"{kind}_product", len(places), len(sizes))(*places, *sizes)
    return out if x.dtype is torch.float32 else out.to(x.dtype)


def numbers(kind: str, blocks: Tensor, columns: int) -> Tensor:
    """What ``blocks`` uint8 [M, bytes of a row] of ggml's type ``kind`` stand for: float32 [M, columns]."""
    blocks = blocks.contiguous()
    (height, size), out = blocks.shape, torch.empty(len(blocks), columns)
    sizes = height, columns, size, torch.get_num_threads()
    _function(f"{kind}_numbers", 2, len(sizes))(blocks.data_ptr(), out.data_ptr(), *sizes)
    return out


@functools.cache
def _function(name: str, places: int, sizes: int) -> native.Function:
    """The function, which takes so many addresses and then so many numbers."""
    return native.Function(native.load(SOURCE), name, [*[ctypes.c_void_p] * places, *[ctypes.c_int64] * sizes])
