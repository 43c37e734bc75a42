"""The kernel that finds where rows are cut."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Scores that lie side by side in a piece of a row, how many such lines a piece has, and warps of a program.
LANES, LINES, WARPS = 4096, 4, 16


@triton.jit  # type: ignore[untyped-decorator]
def _key(score, narrow: tl.constexpr):  # type: ignore[no-untyped-def]
    """Integers in the order of float32 ``score``; of bfloat16 in float32 without the half that says nothing."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 is 0.0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return key >> 16 if narrow else key


@triton.jit  # type: ignore[untyped-decorator]
def _score(key, narrow: tl.constexpr):  # type: ignore[no-untyped-def]
    """The float32 with this int64 key."""
    wide = (key * 65536 + tl.where(key < 0, 65535, 0)).to(tl.int32) if narrow else key.to(tl.int32)
    return (wide ^ ((wide >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _piece(row, start, size, lanes: tl.constexpr, lines: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores of a ``row`` from ``start`` on, float32 [lines, lanes]; -inf behind its end."""
    at = start + tl.arange(0, lines)[:, None] * lanes + tl.arange(0, lanes)[None, :]
    return tl.load(row + at, at < size, -float("inf")).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _counts(  # type: ignore[no-untyped-def]
    row, size, a, b, c, narrow: tl.constexpr, lanes: tl.constexpr, lines: tl.constexpr
):  # fmt: skip
    """How many scores have a key of at least ``a``, ``b``, ``c``, each int32 [lanes] to be summed."""
    above_a = tl.zeros((lanes,), tl.int32)
    above_b, above_c = above_a, above_a
    for start in range(0, size, lanes * lines):
        key = _key(_piece(row, start, size, lanes, lines), narrow)
        above_a += tl.sum((key >= a).to(tl.int32), 0)
        above_b += tl.sum((key >= b).to(tl.int32), 0)
        above_c += tl.sum((key >= c).to(tl.int32), 0)
    return tl.sum(above_a, 0), tl.sum(above_b, 0), tl.sum(above_c, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _masses(  # type: ignore[no-untyped-def]
    row, size, top, cold, a, b, c, narrow: tl.constexpr, lanes: tl.constexpr, lines: tl.constexpr
):  # fmt: skip
    """The weight of the scores whose keys are at least ``a``, ``b``, ``c``, counted from ``top``: float64."""
    above_a = tl.zeros((lanes,), tl.float32)
    above_b, above_c = above_a, above_a
    for start in range(0, size, lanes * lines):
        score = _piece(row, start, size, lanes, lines)
        key, weight = _key(score, narrow), tl.exp((score - top) * cold)
        above_a += tl.sum(tl.where(key >= a, weight, 0.0), 0)
        above_b += tl.sum(tl.where(key >= b, weight, 0.0), 0)
        above_c += tl.sum(tl.where(key >= c, weight, 0.0), 0)
    return tl.sum(above_a.to(tl.float64), 0), tl.sum(above_b.to(tl.float64), 0), tl.sum(above_c.to(tl.float64), 0)


@triton.jit  # type: ignore[untyped-decorator]
def floor_kernel(  # type: ignore[no-untyped-def]
    scores, cuts, floors, ties, count, size,
    narrow: tl.constexpr, lanes: tl.constexpr, lines: tl.constexpr, many: tl.constexpr,
):  # fmt: skip
    """floors, ties [count] of scores [count, size] under cuts float64 [4, count]: temperature, top-k, top-p and min-p.
    One program a row, which looks for the floor among the keys: it keeps an interval [low, high) in which it lies, and
    asks at three places inside how much is above, until nothing is left to be asked."""
    own = tl.program_id(0)
    row = scores + own.to(tl.int64) * size
    temperature, top_k = tl.load(cuts + own), tl.load(cuts + count + own)
    top_p, min_p = tl.load(cuts + 2 * count + own), tl.load(cuts + 3 * count + own)
    tl.store(floors + own, -float("inf"))
    tl.store(ties + own, many)
    if (temperature <= 0) | ((top_k <= 0) & (top_p >= 1) & (min_p <= 0)):
        return
    lowest = _key(tl.full((lanes,), -float("inf"), tl.float32), narrow)
    best = lowest
    for start in range(0, size, lanes * lines):
        best = tl.maximum(best, tl.max(_key(_piece(row, start, size, lanes, lines), narrow), 0))
    least = tl.min(lowest, 0).to(tl.int64)
    end = tl.max(best, 0).to(tl.int64) + 1
    heat = tl.maximum(temperature, 1e-30)
    top, cold = _score(end - 1, narrow), (1 / heat).to(tl.float32)
    low, left = least, many
    if (top_k > 0) & (top_k < size):
        wanted = top_k.to(tl.int32)
        if wanted <= lanes:
            # The best of each lane are as many tokens: with k of them above it, a score is not above the k-th best.
            high = end
            while high - low > 1:
                middle = low + (high - low) // 2
                enough = tl.sum((best >= middle.to(tl.int32)).to(tl.int32), 0) >= wanted
                low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        high, exact = end, 0
        while (high - low > 1) & (exact == 0):
            a = low + (high - low) // 4
            b = low + (high - low) // 2
            c = low + 3 * (high - low) // 4
            above_a, above_b, above_c = _counts(
                row, size, a.to(tl.int32), b.to(tl.int32), c.to(tl.int32), narrow, lanes, lines
            )
            exact = ((above_a == wanted) | (above_b == wanted) | (above_c == wanted)).to(tl.int32)
            high = tl.where(above_a < wanted, a, tl.where(above_b < wanted, b, tl.where(above_c < wanted, c, high)))
            low = tl.where(above_a < wanted, low, tl.where(above_b < wanted, a, tl.where(above_c < wanted, b, c)))
    if top_p < 1:
        base = low.to(tl.int32)
        whole, _, _ = _masses(row, size, top, cold, base, base, base, narrow, lanes, lines)
        aim = top_p * whole
        # Tokens below this score do not have the rest of the probability even if all are there.
        rest = top.to(tl.float64) + heat * tl.log(0.5 * (1 - top_p) * whole / size)
        low = tl.maximum(low, tl.minimum(_key(rest.to(tl.float32), narrow).to(tl.int64), end - 1))
        high, above = end, 0.0 * whole
        while high - low > 1:
            a = low + (high - low) // 4
            b = low + (high - low) // 2
            c = low + 3 * (high - low) // 4
            above_a, above_b, above_c = _masses(
                row, size, top, cold, a.to(tl.int32), b.to(tl.int32), c.to(tl.int32), narrow, lanes, lines
            )
            above = tl.where(
                above_a < aim, above_a, tl.where(above_b < aim, above_b, tl.where(above_c < aim, above_c, above))
            )
            high = tl.where(above_a < aim, a, tl.where(above_b < aim, b, tl.where(above_c < aim, c, high)))
            # Also where scores are not numbers, the interval gets smaller.
            low = tl.where(above_a < aim, low, tl.where(above_b < aim, a, tl.where(above_c < aim, b, c)))
        weight = tl.exp((_score(low, narrow) - top) * cold).to(tl.float64)
        left = tl.where(weight > 0, tl.minimum(tl.maximum(tl.ceil((aim - above) / weight), 1), many), 1).to(tl.int32)
    floor = _score(low, narrow)
    share = (top.to(tl.float64) + heat * tl.log(min_p)).to(tl.float32) if min_p > 0 else floor
    tl.store(floors + own, tl.maximum(floor, share))
    tl.store(ties + own, tl.where(share > floor, many, left))


def floors(scores: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor]:
    """Of contiguous ``scores`` [R, V] under ``cuts`` float64 [4, R], the floor float32 [R], and how many that tie with
    it stay, int64 [R]."""
    from penstock.ops.cuts import MANY

    count, size = scores.shape
    score = torch.empty(count, dtype=torch.float32, device=scores.device)
    ties = torch.empty(count, dtype=torch.int64, device=scores.device)
    floor_kernel[(count,)](
        scores, cuts, score, ties, count, size, scores.dtype == torch.bfloat16, LANES, LINES, MANY, num_warps=WARPS
    )
    return score, ties
