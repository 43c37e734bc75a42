"""The kernel that finds where rows are cut."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.ops.draw import MANY

#: Scores that lie side by side in a piece of a row, how many such lines a piece has, and warps of a program.
LANES, LINES, WARPS = 4096, 4, 16
#: Lanes that are kept in registers, where so few have all that top-k leaves.
FEW = 256


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


@triton.jit
def _quarters(low, high):  # type: ignore[no-untyped-def]
    """Three keys that divide the interval [low, high)."""
    return low + (high - low) // 4, low + (high - low) // 2, low + 3 * (high - low) // 4


@triton.jit  # type: ignore[untyped-decorator]
def _thirds(low, high, narrow: tl.constexpr):  # type: ignore[no-untyped-def]
    """Three keys inside the interval [low, high): its middle, and by value a third and two, in order. Scores are more
    even in value; but where a few lie far off, half of the keys is gone each time all the same."""
    down, up, half = _score(low, narrow), _score(high - 1, narrow), low + (high - low) // 2
    one = tl.minimum(tl.maximum(_key(down + (up - down) * 0.333, narrow).to(tl.int64), low + 1), high - 1)
    two = tl.minimum(tl.maximum(_key(down + (up - down) * 0.667, narrow).to(tl.int64), low + 1), high - 1)
    least, most = tl.minimum(one, two), tl.maximum(one, two)
    return tl.minimum(least, half), tl.maximum(least, tl.minimum(most, half)), tl.maximum(most, half)


@triton.jit
def _narrowed(low, high, a, b, c, at_a, at_b, at_c, wanted):  # type: ignore[no-untyped-def]
    """The part of [low, high) in which what is above falls below what is ``wanted``. Also where scores are not numbers,
    it is smaller."""
    end = tl.where(at_a < wanted, a, tl.where(at_b < wanted, b, tl.where(at_c < wanted, c, high)))
    return tl.where(at_a < wanted, low, tl.where(at_b < wanted, a, tl.where(at_c < wanted, b, c))), end


@triton.jit
def _count_floor(keys, low, high, wanted):  # type: ignore[no-untyped-def]
    """The largest key in [low, high) that ``wanted`` of ``keys`` reach."""
    while high - low > 1:
        a, b, c = _quarters(low, high)
        at_a = tl.sum((keys >= a.to(tl.int32)).to(tl.int32))
        at_b = tl.sum((keys >= b.to(tl.int32)).to(tl.int32))
        at_c = tl.sum((keys >= c.to(tl.int32)).to(tl.int32))
        low, high = _narrowed(low, high, a, b, c, at_a, at_b, at_c, wanted)
    return low


@triton.jit  # type: ignore[untyped-decorator]
def _count_floor_of_row(  # type: ignore[no-untyped-def]
    row, size, low, high, wanted, narrow: tl.constexpr, lanes: tl.constexpr, lines: tl.constexpr
):  # fmt: skip
    """The same of all scores of a ``row``, or a smaller key that exactly as many reach."""
    exact = 0
    while (high - low > 1) & (exact == 0):
        a, b, c = _quarters(low, high)
        above_a = tl.zeros((lanes,), tl.int32)
        above_b, above_c = above_a, above_a
        for start in range(0, size, lanes * lines):
            key = _key(_piece(row, start, size, lanes, lines), narrow)
            above_a += tl.sum((key >= a.to(tl.int32)).to(tl.int32), 0)
            above_b += tl.sum((key >= b.to(tl.int32)).to(tl.int32), 0)
            above_c += tl.sum((key >= c.to(tl.int32)).to(tl.int32), 0)
        at_a, at_b, at_c = tl.sum(above_a, 0), tl.sum(above_b, 0), tl.sum(above_c, 0)
        exact = ((at_a == wanted) | (at_b == wanted) | (at_c == wanted)).to(tl.int32)
        low, high = _narrowed(low, high, a, b, c, at_a, at_b, at_c, wanted)
    return low


@triton.jit
def _mass_floor(keys, weights, low, high, aim):  # type: ignore[no-untyped-def]
    """The largest key in [low, high) at which ``weights`` reach ``aim`` together, and what those above it have."""
    above = 0.0 * aim
    while high - low > 1:
        a, b, c = _quarters(low, high)
        at_a = tl.sum(tl.where(keys >= a.to(tl.int32), weights, 0.0)).to(tl.float64)
        at_b = tl.sum(tl.where(keys >= b.to(tl.int32), weights, 0.0)).to(tl.float64)
        at_c = tl.sum(tl.where(keys >= c.to(tl.int32), weights, 0.0)).to(tl.float64)
        above = tl.where(at_a < aim, at_a, tl.where(at_b < aim, at_b, tl.where(at_c < aim, at_c, above)))
        low, high = _narrowed(low, high, a, b, c, at_a, at_b, at_c, aim)
    return low, above


@triton.jit  # type: ignore[untyped-decorator]
def _masses(  # type: ignore[no-untyped-def]
    row, size, top, cold, a, b, c, lanes: tl.constexpr, lines: tl.constexpr
):  # fmt: skip
    """The weight of the scores of a ``row`` that reach the scores ``a``, ``b``, ``c``, counted from ``top``: float64.
    Scores are compared, not keys, which would have to be made of all."""
    above_a = tl.zeros((lanes,), tl.float32)
    above_b, above_c = above_a, above_a
    for start in range(0, size, lanes * lines):
        score = _piece(row, start, size, lanes, lines)
        weight = tl.exp2((score - top) * cold)
        above_a += tl.sum(tl.where(score >= a, weight, 0.0), 0)
        above_b += tl.sum(tl.where(score >= b, weight, 0.0), 0)
        above_c += tl.sum(tl.where(score >= c, weight, 0.0), 0)
    return tl.sum(above_a.to(tl.float64), 0), tl.sum(above_b.to(tl.float64), 0), tl.sum(above_c.to(tl.float64), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _mass_floor_of_row(  # type: ignore[no-untyped-def]
    row, size, top, cold, low, high, aim, narrow: tl.constexpr, lanes: tl.constexpr, lines: tl.constexpr
):  # fmt: skip
    """As :func:`_mass_floor`, of all scores of a ``row``."""
    above = 0.0 * aim
    while high - low > 1:
        a, b, c = _thirds(low, high, narrow)
        at_a, at_b, at_c = _masses(
            row, size, top, cold, _score(a, narrow), _score(b, narrow), _score(c, narrow), lanes, lines
        )
        above = tl.where(at_a < aim, at_a, tl.where(at_b < aim, at_b, tl.where(at_c < aim, at_c, above)))
        low, high = _narrowed(low, high, a, b, c, at_a, at_b, at_c, aim)
    return low, above


@triton.jit  # type: ignore[untyped-decorator]
def floor_kernel(  # type: ignore[no-untyped-def]
    scores, cuts, floors, ties, picked, count, size,
    narrow: tl.constexpr, lanes: tl.constexpr, lines: tl.constexpr, depth: tl.constexpr,
    few: tl.constexpr, many: tl.constexpr,
):  # fmt: skip
    """floors, ties [count] of scores [count, size] under cuts float64 [4, count]: temperature, top-k, top-p and min-p.
    ``picked`` [count, few] is room for notes.

    One program a row, which looks for the floor among the keys: it keeps an interval [low, high) in which it lies, and
    asks at three places inside how much is above, until nothing is left to be asked. Score s is in lane s % lanes. The
    best of each lane are as many tokens, so what the k-th best of these does not reach, top-k cuts; and what reaches
    it is in k lanes, or a few more that tie, which registers can hold. Without top-k, the best few tokens are looked at
    in the same way, and the whole row only if they do not have the share."""
    own, lane = tl.program_id(0), tl.arange(0, lanes)
    row = scores + own.to(tl.int64) * size
    temperature, top_k = tl.load(cuts + own), tl.load(cuts + count + own)
    top_p, min_p = tl.load(cuts + 2 * count + own), tl.load(cuts + 3 * count + own)
    tl.store(floors + own, -float("inf"))
    tl.store(ties + own, many)
    if (temperature <= 0) | ((top_k <= 0) & (top_p >= 1) & (min_p <= 0)):
        return
    lowest = tl.full((lanes,), -float("inf"), tl.float32)
    best = lowest
    for start in range(0, size, lanes * lines):
        best = tl.maximum(best, tl.max(_piece(row, start, size, lanes, lines), 0))
    best = _key(best, narrow)
    low, end = tl.min(_key(lowest, narrow), 0).to(tl.int64), tl.max(best, 0).to(tl.int64) + 1
    heat = tl.maximum(temperature, 1e-30)
    top, cold = _score(end - 1, narrow), (1.4426950408889634 / heat).to(tl.float32)
    left, above, aim, share = many, 0.0 * heat, 0.0 * heat, top_p < 1
    limited = (top_k > 0) & (top_k < size)
    if limited | share:
        # Half of the room, since some may tie with the last.
        wanted = tl.where(limited, top_k, few // 2).to(tl.int32)
        reached, least = low, _score(low, narrow)
        if wanted <= lanes:
            reached = _count_floor(best, low, end, wanted)
        mine = (best >= reached.to(tl.int32)).to(tl.int32)
        number = tl.sum(mine, 0)
        if number <= few:
            tl.store(picked + own * few + tl.cumsum(mine, 0) - 1, lane, mine > 0)
            tl.debug_barrier()
            place = tl.arange(0, few)
            which = tl.load(picked + own * few + place, place < number, 0)
            at = which[:, None] + tl.arange(0, depth)[None, :] * lanes
            kept = tl.load(row + at, (place < number)[:, None] & (at < size), -float("inf")).to(tl.float32)
            keys = _key(kept, narrow)
            if limited:
                low = _count_floor(keys, reached, end, wanted)
                reached = low
            weights = tl.where(keys >= reached.to(tl.int32), tl.exp2((kept - top) * cold), 0.0)
            mass = tl.sum(weights).to(tl.float64)
            if share:
                whole = mass
                if not limited:
                    whole, _, _ = _masses(row, size, top, cold, least, least, least, lanes, lines)
                aim = top_p * whole
                # Of all tokens, the best few nearly always have the share.
                if mass >= aim:
                    low, above = _mass_floor(keys, weights, reached, end, aim)
                    share = top_p > 1
                    left = 0
        elif limited:
            low = _count_floor_of_row(row, size, reached, end, wanted, narrow, lanes, lines)
    if share:
        least = _score(low, narrow)
        whole, _, _ = _masses(row, size, top, cold, least, least, least, lanes, lines)
        aim = top_p * whole
        # Tokens below this score do not have the rest of the probability even if all are there.
        rest = top.to(tl.float64) + heat * tl.log(0.5 * (1 - top_p) * whole / size)
        low = tl.maximum(low, tl.minimum(_key(rest.to(tl.float32), narrow).to(tl.int64), end - 1))
        low, above = _mass_floor_of_row(row, size, top, cold, low, end, aim, narrow, lanes, lines)
        left = 0
    floor = _score(low, narrow)
    if left == 0:
        weight = tl.exp2((floor - top) * cold).to(tl.float64)
        left = tl.where(weight > 0, tl.minimum(tl.maximum(tl.ceil((aim - above) / weight), 1), many), 1).to(tl.int32)
    shortest = (top.to(tl.float64) + heat * tl.log(min_p)).to(tl.float32) if min_p > 0 else floor
    tl.store(floors + own, tl.maximum(floor, shortest))
    tl.store(ties + own, tl.where(shortest > floor, many, left))


def floors(scores: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor]:
    """Of contiguous ``scores`` [R, V] under ``cuts`` float64 [4, R], the floor float32 [R], and how many that tie with
    it stay, int64 [R]."""
    count, size = scores.shape
    score = torch.empty(count, dtype=torch.float32, device=scores.device)
    ties = torch.empty(count, dtype=torch.int64, device=scores.device)
    picked = torch.empty(count, FEW, dtype=torch.int32, device=scores.device)
    floor_kernel[(count,)](
        scores, cuts, score, ties, picked, count, size,
        scores.dtype == torch.bfloat16, LANES, LINES, triton.next_power_of_2(triton.cdiv(size, LANES)), FEW, MANY,
        num_warps=WARPS,
    )  # fmt: skip
    return score, ties
