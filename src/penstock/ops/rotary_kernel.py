"""The kernel that norms and rotates queries and keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Heads of a token that a program works on.
HEADS = 8


@triton.jit  # type: ignore[untyped-decorator]
def rotate_kernel(  # type: ignore[no-untyped-def]
    query, key, new_query, new_key, cos, sin, query_scale, key_scale, eps,
    query_token, query_head, key_token, key_head, heads, kv_heads, half,
    width: tl.constexpr, padded: tl.constexpr, normed: tl.constexpr,
):  # fmt: skip
    """One program for ``width`` heads of a token: of the query where its number is below the query's share of them, of
    the key else. Inputs have strides, outputs are contiguous; cos and sin are [tokens, half]. All in float32."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of_query = part < tl.cdiv(heads, width)
    if of_query:
        source, target, scale = query + token * query_token, new_query, query_scale
        step, count, first = query_head, heads, part * width
    else:
        source, target, scale = key + token * key_token, new_key, key_scale
        step, count, first = key_head, kv_heads, (part - tl.cdiv(heads, width)) * width
    head, lane = first + tl.arange(0, width), tl.arange(0, padded)
    inside = (head < count)[:, None] & (lane < half)[None, :]
    at = source + head[:, None] * step + lane[None, :]
    a, b = tl.load(at, inside, 0.0).to(tl.float32), tl.load(at + half, inside, 0.0).to(tl.float32)
    if normed:
        each = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * half) + eps)[:, None]
        a *= each * tl.load(scale + lane, lane < half, 0.0).to(tl.float32)[None, :]
        b *= each * tl.load(scale + half + lane, lane < half, 0.0).to(tl.float32)[None, :]
    c = tl.load(cos + token * half + lane, lane < half, 0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * half + lane, lane < half, 0.0).to(tl.float32)[None, :]
    to = target + (token * count + head[:, None]) * 2 * half + lane[None, :]
    tl.store(to, (a * c - b * s).to(target.dtype.element_ty), inside)
    tl.store(to + half, (b * c + a * s).to(target.dtype.element_ty), inside)


def rotate_both(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, scales: tuple[Tensor, Tensor] | None, eps: float
) -> tuple[Tensor, Tensor]:
    """What :func:`~penstock.ops.rotary.rotate_heads` gives, for tensors on a CUDA device."""
    tokens, half = query.shape[:-2], query.shape[-1] // 2
    rows = [x.flatten(0, -3) for x in (query, key)]
    angles = [x.expand(*tokens, 1, half).reshape(-1, half) for x in (cos, sin)]
    new = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key)]
    heads, kv_heads = query.shape[-2], key.shape[-2]
    grid = (rows[0].shape[0], triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS))
    strides = (step for x in rows for step in x.stride()[:2])
    query_scale, key_scale = scales or rows
    rotate_kernel[grid](
        *rows, *new, *angles, query_scale, key_scale, eps, *strides, heads, kv_heads, half,
        HEADS, triton.next_power_of_2(half), scales is not None, num_warps=2,
    )  # fmt: skip
    return new[0], new[1]
