"""The kernels that look up log-probabilities: each row in pieces side by side, and then what the pieces found."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Scores of a piece, and warps of a program.
LANES, WARPS = 4096, 8
#: What is noted of a piece: the largest score; the sums of the weights, of the weighted scores and of the scores, all
#: counted from it; and how many are above the token's.
NOTES = 5
#: Stands for the score of a token that is forbidden, so that it comes before one that is not there.
LEAST = torch.finfo(torch.float32).min


@triton.jit  # type: ignore[untyped-decorator]
def piece_kernel(  # type: ignore[no-untyped-def]
    scores, tokens, wanted, notes, best, names, size, most,
    lanes: tl.constexpr, fields: tl.constexpr, least: tl.constexpr,
):  # fmt: skip
    """notes float32 [R, P, fields] of ``scores`` [R, size] in P pieces, and the best of each, as many as are ``wanted``
    and up to ``most``: their scores ``best`` float32 and ``names`` int32, of each row one behind the other."""
    row, piece, lane = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, lanes)
    code = tl.load(wanted + row)
    if code == 0:
        return
    count = tl.minimum((code // 2 - 1).to(tl.int32), most)
    at = piece * lanes + lane
    line = tl.load(scores + row * size + at, at < size, -float("inf")).to(tl.float32)
    own = tl.load(scores + row * size + tl.load(tokens + row)).to(tl.float32)
    top = tl.max(line, 0)
    # A piece may be forbidden as a whole.
    gap = line - tl.where(top > -float("inf"), top, 0.0)
    weight = tl.exp(gap)
    place = row * tl.num_programs(1) + piece
    note = notes + place * fields
    tl.store(note, top)
    tl.store(note + 1, tl.sum(weight, 0))
    tl.store(note + 2, tl.sum(tl.where(weight > 0, weight * gap, 0.0), 0))
    tl.store(note + 3, tl.sum(tl.where(at < size, gap, 0.0), 0))
    tl.store(note + 4, tl.sum((line > own).to(tl.float32), 0))
    line = tl.where((line == -float("inf")) & (at < size), least, line)
    own_best = row * tl.num_programs(1) * most + piece * count
    for number in range(count):
        score, which = tl.max(line, 0, return_indices=True)
        tl.store(best + own_best + number, score)
        tl.store(names + own_best + number, tl.minimum(piece * lanes + which, size - 1))
        line = tl.where(lane == which, -float("inf"), line)


@triton.jit  # type: ignore[untyped-decorator]
def row_kernel(  # type: ignore[no-untyped-def]
    scores, tokens, wanted, notes, best, names, table, size, pieces, most, evenly,
    lanes: tl.constexpr, fields: tl.constexpr, columns: tl.constexpr, least: tl.constexpr, width: tl.constexpr,
    room: tl.constexpr,
):  # fmt: skip
    """table int32 [R, columns + 2 most], from what is noted of ``pieces``; ``evenly`` is the logarithm of ``size``.
    ``width`` holds the pieces, and ``room`` the best of them all."""
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, width)
    code = tl.load(wanted + row)
    if code == 0:
        return
    count = tl.minimum((code // 2 - 1).to(tl.int32), most)
    note, there = notes + (row * pieces + place) * fields, place < pieces
    tops = tl.load(note, there, -float("inf"))
    top = tl.max(tops, 0)
    below = tl.where(tops > -float("inf"), tops - top, 0.0)
    masses = tl.load(note + 1, there, 0.0)
    shift = tl.where(tops > -float("inf"), tl.exp(below), 0.0)
    mass = tl.sum(masses * shift, 0)
    whole = tl.log(mass)
    token = tl.load(tokens + row)
    own = tl.load(scores + row * size + token).to(tl.float32)
    line = table + row * (columns + 2 * most)
    tl.store(line, token.to(tl.int32))
    tl.store(line + 1, tl.sum(tl.load(note + 4, there, 0.0).to(tl.int32), 0) + 1)
    tl.store(line + 2, (own - top - whole).to(tl.int32, bitcast=True))
    if code % 2 == 1:
        lean = tl.sum(shift * (tl.load(note + 2, there, 0.0) + masses * below), 0) / mass
        counts = tl.minimum(tl.maximum(size - place * lanes, 0), lanes).to(tl.float32)
        mean = tl.sum(tl.load(note + 3, there, 0.0) + counts * below, 0) / size
        tl.store(line + 3, (whole - lean).to(tl.int32, bitcast=True))
        tl.store(line + 4, (whole - mean - evenly).to(tl.int32, bitcast=True))
    else:
        tl.store(line + 3, 0)
        tl.store(line + 4, 0)
    # Pieces, and the best of each, are in order, so that of equal ones the first token is the first.
    lane = tl.arange(0, room)
    found = tl.load(best + row * pieces * most + lane, lane < pieces * count, -float("inf"))
    for number in range(count):
        score, which = tl.max(found, 0, return_indices=True)
        # Of scores that are not numbers, some token is as good as another, but one it must be.
        which = tl.minimum(which, pieces * count - 1)
        tl.store(line + columns + 2 * number, tl.load(names + row * pieces * most + which))
        logprob = tl.where(score == least, -float("inf"), score - top - whole)
        tl.store(line + columns + 2 * number + 1, logprob.to(tl.int32, bitcast=True))
        found = tl.where(lane == which, -float("inf"), found)


def logprob_rows(scores: Tensor, tokens: Tensor, wanted: Tensor, most: int, columns: int) -> Tensor:
    """The table of :func:`~penstock.ops.logprobs.wanted_table` of contiguous ``scores`` [R, V], with so many
    ``columns`` before the alternatives. A row of which nothing is wanted costs next to nothing."""
    (count, size), device = scores.shape, scores.device
    pieces = triton.cdiv(size, LANES)
    table = torch.empty(count, columns + 2 * most, dtype=torch.int32, device=device)
    notes = torch.empty(count, pieces, NOTES, device=device)
    best = torch.empty(count, pieces, max(most, 1), device=device)
    names = torch.empty(count, pieces, max(most, 1), dtype=torch.int32, device=device)
    if count:
        piece_kernel[(count, pieces)](
            scores, tokens, wanted, notes, best, names, size, most, LANES, NOTES, LEAST, num_warps=WARPS,
        )  # fmt: skip
        row_kernel[(count,)](
            scores, tokens, wanted, notes, best, names, table, size, pieces, most, math.log(size),
            LANES, NOTES, columns, LEAST, triton.next_power_of_2(pieces), triton.next_power_of_2(pieces * max(most, 1)),
            num_warps=4,
        )  # fmt: skip
    return table
