"""The kernel that makes plain numbers of a matrix in few bits, for products with so many rows that a library's are the
faster ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows and columns of the matrix that a program decodes.
ROWS, COLUMNS = 8, 256


@triton.jit  # type: ignore[untyped-decorator]
def plain_kernel(  # type: ignore[no-untyped-def]
    values, scale, offset, out, height, size, groups, group,
    halved: tl.constexpr, shifted: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """out [height, size]; one program for a tile of it. The values are ``halved`` where two of them are in a byte."""
    row, at = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1) * columns + tl.arange(0, columns)
    inside = (row < height)[:, None] & (at < size)[None, :]
    line = row.to(tl.int64)[:, None]
    if halved:
        raw = tl.load(values + line * (size // 2) + (at // 2)[None, :], inside, 0).to(tl.int32)
        number = (((raw >> (4 * (at % 2))[None, :]) & 15) - 8).to(tl.float32)
    else:
        number = tl.load(values + line * size + at[None, :], inside, 0.0).to(tl.float32)
    number *= tl.load(scale + line * groups + (at // group)[None, :], inside, 0.0)
    if shifted:
        number += tl.load(offset + line * groups + (at // group)[None, :], inside, 0.0)
    tl.store(out + line * size + at[None, :], number.to(out.dtype.element_ty), inside)


def plain(kind: str, values: Tensor, scale: Tensor, offset: Tensor | None, group: int, size: int) -> Tensor:
    """The matrix bfloat16 [M, ``size``] of its parts, as of :func:`~penstock.ops.quantized.packed_kernel.product`."""
    height = values.shape[0]
    out = torch.empty(height, size, dtype=torch.bfloat16, device=values.device)
    plain_kernel[(triton.cdiv(height, ROWS), triton.cdiv(size, COLUMNS))](
        values, scale, scale if offset is None else offset, out, height, size, scale.shape[1], group,
        kind == "int4", offset is not None, ROWS, COLUMNS, num_warps=4,
    )  # fmt: skip
    return out
