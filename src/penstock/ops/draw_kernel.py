"""The kernels that draw tokens: one sums the weights of chunks, the other finds each row's chunk and its token.

What a row is given depends on nothing but the row: both have one shape for any number of rows, and none of it is chosen
by timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Chunks that a program sums.
LINES = 8


@triton.jit  # type: ignore[untyped-decorator]
def _heat(temperature, row, tiny: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.maximum(tl.load(temperature + row), tiny).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def chunk_kernel(  # type: ignore[no-untyped-def]
    scores, stride, temperature, floor, tops, sums, ties, size, chunks,
    tiny: tl.constexpr, length: tl.constexpr, lines: tl.constexpr,
):  # fmt: skip
    """Of each chunk of ``scores`` [R, size]: the largest in ``tops``, the sum of the weights above the ``floor``,
    counted from it, in ``sums``, and how many are at the floor in ``ties``; [R, chunks] each."""
    row, own = tl.program_id(0).to(tl.int64), tl.program_id(1) * lines + tl.arange(0, lines)
    at = own[:, None] * length + tl.arange(0, length)[None, :]
    given = tl.load(scores + row * stride + at, at < size, -float("inf")).to(tl.float32)
    least = tl.load(floor + row)
    top = tl.max(given, 1)
    # Nothing is left of a chunk that is forbidden as a whole.
    finite = tl.where(top > -float("inf"), top, 0.0)
    weight = tl.where(given > least, tl.exp((given - finite[:, None]) / _heat(temperature, row, tiny)), 0.0)
    place, there = row * chunks + own, own < chunks
    tl.store(tops + place, top, there)
    tl.store(sums + place, tl.sum(weight, 1), there)
    tl.store(ties + place, tl.sum((given == least).to(tl.int32), 1), there)


@triton.jit  # type: ignore[untyped-decorator]
def token_kernel(  # type: ignore[no-untyped-def]
    scores, stride, temperature, uniform, floor, most, tops, sums, ties, tokens, size, chunks,
    tiny: tl.constexpr, below: tl.constexpr, length: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """``tokens`` int64 [R], from what :func:`chunk_kernel` found; ``width`` holds the chunks."""
    row, own = tl.program_id(0).to(tl.int64), tl.arange(0, width)
    heat, least, most = _heat(temperature, row, tiny), tl.load(floor + row), tl.load(most + row)
    place, there = row * chunks + own, own < chunks
    line, tied = tl.load(tops + place, there, -float("inf")), tl.load(ties + place, there, 0)
    # Counted from the largest, scores stay numbers however small the temperature is.
    top = tl.max(line, 0)
    before = (tl.cumsum(tied, 0) - tied).to(tl.int64)
    stay = tl.minimum(tl.maximum(most - before, 0), tied.to(tl.int64)).to(tl.float32)
    weight = tl.load(sums + place, there, 0.0) * tl.exp((line - top) / heat) + stay * tl.exp((least - top) / heat)
    reached = tl.cumsum(weight.to(tl.float64), 0)
    # Rounding may lift an aim to the sum itself, which nothing exceeds, and what has no weight is never drawn.
    whole = tl.max(reached, 0)
    aim = tl.minimum(tl.load(uniform + row) * whole, whole * below)
    chunk = tl.min(tl.where((reached > aim) & (weight > 0), own, chunks - 1), 0)
    passed = tl.max(tl.where(own < chunk, reached, 0.0), 0)
    earlier = tl.sum(tl.where(own == chunk, before, 0), 0)
    at = chunk * length + tl.arange(0, length)
    given = tl.load(scores + row * stride + at, at < size, -float("inf")).to(tl.float32)
    level = (given == least).to(tl.int32)
    left = (given > least) | ((level > 0) & (earlier + tl.cumsum(level, 0) <= most))
    weight = tl.where(left, tl.exp((given - top) / heat), 0.0)
    inside = tl.cumsum(weight.to(tl.float64), 0)
    rest = tl.minimum(aim - passed, tl.max(inside, 0) * below)
    # Of scores that are not numbers, some token is as good as another, but one it must be.
    tl.store(tokens + row, tl.min(tl.where((inside > rest) & (weight > 0), at, size - 1), 0).to(tl.int64))


def drawn(
    logits: Tensor,
    temperature: Tensor,
    uniform: Tensor,
    score: Tensor,
    ties: Tensor,
    *,
    chunk: int,
    tiny: float,
    below: float,
) -> Tensor:
    """What :func:`penstock.ops.draw.draw_softmax` gives above a floor of these ``score`` and ``ties``.

    Args:
        chunk: tokens whose weights are summed before anything is cumulated, a power of two.
        tiny: stands for a temperature of 0.
        below: how close an aim may come to the sum of all weights, as a share of it.
    """
    rows, size = logits.shape
    chunks = triton.cdiv(size, chunk)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tops, sums = torch.empty((2, rows, chunks), device=logits.device).unbind()
    tied = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    common = (logits, logits.stride(0), temperature.contiguous())
    chunk_kernel[rows, triton.cdiv(chunks, LINES)](
        *common, score, tops, sums, tied, size, chunks, tiny=tiny, length=chunk, lines=LINES
    )
    token_kernel[rows,](
        *common, uniform.contiguous(), score, ties, tops, sums, tied, tokens, size, chunks,
        tiny=tiny, below=below, length=chunk, width=triton.next_power_of_2(chunks),
    )  # fmt: skip
    return tokens
