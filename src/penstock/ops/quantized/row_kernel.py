"""The kernel for one row times a matrix of integers in 4 bits, interleaved: matrix units would wait for 8 rows at
least, and whoever feeds them for each other. Here every thread reads numbers of the matrix, and multiplies them one by
one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.ops.quantized.nibbles import BLOCK, PLANE
from penstock.ops.quantized.packed_kernel import factors

#: Rows of the matrix that a program multiplies, how many blocks of each it reads at a time, and its warps: measured on
#: an H200, for the matrices of Qwen3-8B. Threads that have 8 words of each row have the same numbers of x for all.
ROWS, BLOCKS, WARPS = 4, 8, 1


@triton.jit
def raised_integers(words):  # type: ignore[no-untyped-def]
    """The four integers in each word of 16 bits, which are stored with 8 added, from the lowest bits on: in float32,
    halved and 12 more than that. They are written into the mantissa of 8, whose fourth bit is worth a half."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a;
        shl.b32 a, $8, 19;
        lop3.b32 $0, a, 0x00780000, 0x41000000, 0xea;
        shl.b32 a, $8, 3;
        lop3.b32 $1, a, 0x00780000, 0x41000000, 0xea;
        shl.b32 a, $8, 15;
        lop3.b32 $2, a, 0x00780000, 0x41000000, 0xea;
        shr.b32 a, $8, 1;
        lop3.b32 $3, a, 0x00780000, 0x41000000, 0xea;
        shl.b32 a, $8, 11;
        lop3.b32 $4, a, 0x00780000, 0x41000000, 0xea;
        shr.b32 a, $8, 5;
        lop3.b32 $5, a, 0x00780000, 0x41000000, 0xea;
        shl.b32 a, $8, 7;
        lop3.b32 $6, a, 0x00780000, 0x41000000, 0xea;
        shr.b32 a, $8, 9;
        lop3.b32 $7, a, 0x00780000, 0x41000000, 0xea;
        }
        """,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [words], (tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def row_kernel(  # type: ignore[no-untyped-def]
    x, values, scale, offset, out, height, stored, whole, groups, down, along,
    group: tl.constexpr, shifted: tl.constexpr, rows: tl.constexpr, blocks: tl.constexpr,
    wide: tl.constexpr,
):  # fmt: skip
    """out [height] = x times the transpose of a matrix of ``whole`` blocks a row, whose words are values [height,
    stored]; a group is ``group`` columns, of whole blocks. One program for ``rows`` rows of the matrix."""
    row = (tl.program_id(0) * rows + tl.arange(0, rows))[:, None, None]
    part, lane = tl.arange(0, blocks)[None, :, None], tl.arange(0, wide)[None, None, :]
    total = tl.zeros((rows, blocks, wide), tl.float32)
    for start in range(0, whole, blocks):
        block = start + part
        there = block < whole
        words = tl.load(values + row.to(tl.int64) * stored + block * wide + lane, (row < height) & there, 0)
        factor, added = factors(
            scale, offset, row, (row < height) & there, block * (4 * wide) // group, groups, down, along, shifted
        )
        from_x = x + block * 4 * wide + lane
        a, b = tl.load(from_x, there, 0.0).to(tl.float32), tl.load(from_x + wide, there, 0.0).to(tl.float32)
        c = tl.load(from_x + 2 * wide, there, 0.0).to(tl.float32)
        d = tl.load(from_x + 3 * wide, there, 0.0).to(tl.float32)
        first, second, third, fourth = raised_integers(words)
        total += 2 * factor * (first * a + second * b + third * c + fourth * d)
        total += (added - 24 * factor) * (a + b + c + d)
    line = tl.program_id(0) * rows + tl.arange(0, rows)
    tl.store(out + line, tl.sum(tl.sum(total, 2), 1).to(out.dtype.element_ty), line < height)


def serves(kind: str, x: Tensor, values: Tensor, group: int) -> bool:
    """Whether the kernel multiplies ``x`` [N, K] with such a matrix, as of :func:`~.packed_kernel.product`."""
    return (
        kind == "int4"
        and len(x) == 1
        and values.dtype == torch.int16
        and x.shape[1] % BLOCK == 0
        and group % BLOCK == 0
    )


def product(x: Tensor, values: Tensor, scale: Tensor, offset: Tensor | None, group: int) -> Tensor:
    """As of :func:`~penstock.ops.quantized.packed_kernel.product`, where this kernel :func:`serves`."""
    height = values.shape[0]
    out = torch.empty(1, height, dtype=torch.bfloat16, device=x.device)
    row_kernel[(triton.cdiv(height, ROWS),)](
        x, values, scale, scale if offset is None else offset, out,
        height, values.shape[1], x.shape[1] // BLOCK, scale.shape[1], *scale.stride(),
        group, offset is not None, ROWS, BLOCKS, PLANE, num_warps=WARPS,
    )  # fmt: skip
    return out
