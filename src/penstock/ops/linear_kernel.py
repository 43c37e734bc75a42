"""The kernel for a few rows times a large matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows of the matrix that a program multiplies, and how much of each it reads at a time: on an H100 the fastest, or
#: within 4% of it, for all matrices of models with hidden sizes from 1,024 to 4,096.
ROWS, PIECE = 2, 1024


@triton.jit  # type: ignore[untyped-decorator]
def few_rows_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, out, height,
    count: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, piece: tl.constexpr, biased: tl.constexpr,
):  # fmt: skip
    """out [count, height] = x [count, size] times the transpose of weight [height, size], for up to four rows of x; one
    program for ``rows`` rows of the weight, which it reads once. Products are summed lane by lane, and lanes at the
    end. Each row of x has a sum of its own: with one more dimension, tiles would change hands between threads."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    lanes = tl.arange(0, piece)
    inside_rows = row < height
    base = weight + row[:, None].to(tl.int64) * size
    a = tl.zeros((rows, piece), tl.float32)
    b, c, d = a, a, a
    for start in range(0, size, piece):
        at = start + lanes
        inside = at < size
        w = tl.load(base + at[None, :], inside_rows[:, None] & inside[None, :], 0.0, eviction_policy="evict_first")
        w = w.to(tl.float32)
        a += w * tl.load(x + at, inside, 0.0).to(tl.float32)[None, :]
        if count > 1:
            b += w * tl.load(x + size + at, inside, 0.0).to(tl.float32)[None, :]
        if count > 2:
            c += w * tl.load(x + 2 * size + at, inside, 0.0).to(tl.float32)[None, :]
        if count > 3:
            d += w * tl.load(x + 3 * size + at, inside, 0.0).to(tl.float32)[None, :]
    added = tl.load(bias + row, inside_rows, 0.0).to(tl.float32) if biased else tl.zeros((rows,), tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + row, (tl.sum(a, 1) + added).to(kind), inside_rows)
    if count > 1:
        tl.store(out + height + row, (tl.sum(b, 1) + added).to(kind), inside_rows)
    if count > 2:
        tl.store(out + 2 * height + row, (tl.sum(c, 1) + added).to(kind), inside_rows)
    if count > 3:
        tl.store(out + 3 * height + row, (tl.sum(d, 1) + added).to(kind), inside_rows)


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[N, M] from ``x`` [N, K] and ``weight`` [M, K], both contiguous, and ``bias`` [M]; N is at most four."""
    count, height = x.shape[0], weight.shape[0]
    out = torch.empty((count, height), dtype=x.dtype, device=x.device)
    few_rows_kernel[(triton.cdiv(height, ROWS),)](
        x, weight, bias, out, height, count, x.shape[1], ROWS, PIECE, bias is not None, num_warps=4
    )
    return out
