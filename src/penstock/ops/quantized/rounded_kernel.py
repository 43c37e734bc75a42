"""The kernel that rounds rows to 8-bit floating point, and products of it with itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: The largest number of e4m3, and the smallest scale: a row of zeros has one, too.
MOST, LEAST = 448.0, 1e-12

#: Rows that a library multiplies in e4m3 are so many whole ones.
WHOLE = 16


@triton.jit  # type: ignore[untyped-decorator]
def round_kernel(  # type: ignore[no-untyped-def]
    x, values, scale, size, groups, group, along,
    most: tl.constexpr, least: tl.constexpr, padded: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """values float8_e4m3fn [N, size], each times its ``group``'s scale, of x [N, size]: one program a row, ``padded``
    groups of ``width`` columns side by side. The scales of a group lie side by side, and the next group's are ``along``
    from there."""
    row = tl.program_id(0).to(tl.int64)
    part, lane = tl.arange(0, padded)[:, None], tl.arange(0, width)[None, :]
    at = part * group + lane
    inside = (part < groups) & (lane < group) & (at < size)
    own = tl.load(x + row * size + at, inside, 0.0).to(tl.float32)
    factor = tl.maximum(tl.max(tl.abs(own), 1) / most, least)
    found = own / factor[:, None]
    found = tl.minimum(tl.maximum(found, -most), most)
    tl.store(values + row * size + at, found.to(tl.float8e4nv), inside)
    places = tl.arange(0, padded)
    tl.store(scale + row + places.to(tl.int64) * along, factor, places < groups)


def rounded(x: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """``x`` [N, K], contiguous, as float8_e4m3fn [P, K], and the scale float32 [P, k] of each ``group`` of columns
    (None: of each row): what takes the largest number to the largest of e4m3. P is N rounded up to whole 16, as the
    library's products want it, and what the rows behind N hold is not defined. The scales of a group are contiguous."""
    count, size = x.shape
    width = size if group is None else group
    groups, whole = triton.cdiv(size, width), triton.cdiv(count, WHOLE) * WHOLE
    values = torch.empty(whole, size, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(groups, whole, dtype=torch.float32, device=x.device)
    padded = triton.next_power_of_2(groups), triton.next_power_of_2(width)
    warps = 4 if padded[0] * padded[1] <= 4096 else 8 if padded[0] * padded[1] <= 8192 else 16
    round_kernel[(count,)](x, values, scale, size, groups, width, whole, MOST, LEAST, *padded, num_warps=warps)
    return values, scale.T


def product(x: Tensor, values: Tensor, scale: Tensor, group: int | None) -> Tensor:
    """``x`` bfloat16 [N, K], its rows rounded in ``group``s, times the transpose of ``values`` float8_e4m3fn [M, K]
    with scales float32 [M, k]: bfloat16 [N, M]. By a library, which adds up so that no bits are lost in between; it
    wants the scales of a group of columns contiguous, and others are copied so."""
    given, factors = rounded(x, group)
    found = torch._scaled_mm(
        given, values.T, factors, scale.T.contiguous(), out_dtype=torch.bfloat16, use_fast_accum=False
    )
    return found[: len(x)]
