"""The kernels in which each query walks its keys in pieces of fixed size, from the first on."""

from __future__ import annotations

import triton
import triton.language as tl

#: Query rows of a tile, keys that are looked at together, and keys after which a row's softmax begins anew. All of this
#: is the same for every batch: the bits of a row depend on it.
ROWS, KEYS, PIECE = 64, 64, 1024

#: Numbers that describe an item of work.
FIELDS = 10


@triton.jit
def merged(top, weight, total, other_top, other_weight, other_total):  # type: ignore[no-untyped-def]
    """Softmax over two disjoint sets of keys, from its state over each. A set without keys changes nothing at all."""
    new = tl.maximum(top, other_top)
    base = tl.where(new == float("-inf"), 0.0, new)
    ours, theirs = tl.exp2(top - base), tl.exp2(other_top - base)
    weight = weight * ours + other_weight * theirs
    total = total * ours[:, None] + other_total * theirs[:, None]
    return new, weight, total


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """The hyperbolic tangent, float32: near 0, where the quotient would lose digits, by its series."""
    square = x * x
    series = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    shrunk = tl.exp2(-2 * 1.4426950408889634 * tl.abs(x))
    quotient = (1 - shrunk) / (1 + shrunk)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))


@triton.jit  # type: ignore[untyped-decorator]
def walk_kernel(  # type: ignore[no-untyped-def]
    query, memory, out, parts, states, sinks, items, tables, positions, seen, scale, cap, window, chunk, width, most,
    heads: tl.constexpr, groups: tl.constexpr, share: tl.constexpr, values: tl.constexpr, rest: tl.constexpr,
    padded: tl.constexpr, padded_rest: tl.constexpr, latent: tl.constexpr, block: tl.constexpr, rows: tl.constexpr,
    keys: tl.constexpr, piece: tl.constexpr, fields: tl.constexpr, masked: tl.constexpr, capped: tl.constexpr,
    sunk: tl.constexpr,
):  # fmt: skip
    """One program for an item of work, some tokens of a sequence against some pieces of its keys, and a ``share`` of
    the ``groups`` query heads of a key head, of which the last may have fewer.

    query is [N, heads * groups, dim] and out [N, heads * groups, values]; memory is [blocks, 2, block, heads, dim] with
    dim = values, or, where it is ``latent``, [blocks, 1, block, heads, dim] with dim = values + rest. An item that has
    all pieces writes ``out``, any other its state: ``parts`` [slots, S, most, values], and ``states`` [slots, S, 2,
    most], the largest score and the weight, of the S shares. Scores are in powers of two."""
    shares: tl.constexpr = (groups + share - 1) // share
    dim: tl.constexpr = values + rest
    stored: tl.constexpr = 1 if latent else 2
    item, head = items + tl.program_id(0) * fields, tl.program_id(1) // shares
    sequence, token, tokens = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    if tokens == 0:
        return
    place, length, first, last = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    slot, before, offset = tl.load(item + 7), tl.load(item + 8), tl.load(item + 9)

    row, lane = tl.arange(0, rows), tl.arange(0, padded)
    own, group = row // share, tl.program_id(1) % shares * share + row % share
    valid = (own < tokens) & (group < groups)
    at = (token + own).to(tl.int64) * heads * groups + head * groups + group
    inside = valid[:, None] & (lane < values)[None, :]
    q = tl.load(query + at[:, None] * dim + lane[None, :], inside, 0.0)
    if rest > 0:
        more = tl.arange(0, padded_rest)
        q_rest = tl.load(
            query + at[:, None] * dim + values + more[None, :], valid[:, None] & (more < rest)[None, :], 0.0
        )

    # Which places a row may see; those at or behind `before` by the mask's leave alone.
    here = place + own
    end = tl.where(valid, here + 1, 0)
    position = here
    if masked:
        position = tl.load(positions + token + own, valid, 0)
        end = tl.where(valid & (here >= before), length, end)
    low = tl.maximum(tl.maximum(position + 1 - window, 0), position // chunk * chunk)
    lowest, highest = tl.min(tl.where(valid, low, length)), tl.max(end)

    all_top = tl.full((rows,), float("-inf"), tl.float32)
    all_weight = tl.zeros((rows,), tl.float32)
    all_total = tl.zeros((rows, padded), tl.float32)
    for number in range(tl.maximum(first, lowest // piece), tl.minimum(last, tl.cdiv(highest, piece))):
        top = tl.full((rows,), float("-inf"), tl.float32)
        weight = tl.zeros((rows,), tl.float32)
        total = tl.zeros((rows, padded), tl.float32)
        start = tl.maximum(number * piece, lowest // keys * keys)
        for begin in range(start, tl.minimum((number + 1) * piece, highest), keys):
            other = begin + tl.arange(0, keys)
            known = other < highest
            page = tl.load(tables + sequence * width + other // block, known, 0).to(tl.int64)
            source = memory + ((page * stored * block + other % block) * heads + head) * dim
            numbers = known[:, None] & (lane < values)[None, :]
            if latent:
                v = tl.load(source[:, None] + lane[None, :], numbers, 0.0)
                scores = tl.dot(q, tl.trans(v), input_precision="ieee")
                if rest > 0:
                    k_rest = tl.load(
                        source[None, :] + values + more[:, None], known[None, :] & (more < rest)[:, None], 0.0
                    )
                    scores = tl.dot(q_rest, k_rest, scores, input_precision="ieee")
            else:
                k = tl.load(source[None, :] + lane[:, None], known[None, :] & (lane < values)[:, None], 0.0)
                scores = tl.dot(q, k, input_precision="ieee")
            scores = cap * tanh(scores * scale) if capped else scores * scale
            visible = (other[None, :] < end[:, None]) & (other[None, :] >= low[:, None])
            if masked:  # noqa: SIM102 (known when the kernel is compiled)
                if begin + keys > before:
                    both = (here >= before)[:, None] & (other >= before)[None, :] & visible
                    cell = offset + (here - before)[:, None] * (length - before) + (other - before)[None, :]
                    their = tl.load(positions + token + other - place, known & (other >= before), 0)
                    near = tl.abs(position[:, None] - their[None, :]) < window
                    near = near & ((position // chunk)[:, None] == (their // chunk)[None, :])
                    # Not `visible`: Triton cannot compile that for fp32 with one stage.
                    hidden = both & ~(near & (tl.load(seen + cell, both, 0) != 0))
                    scores = tl.where(hidden, float("-inf"), scores)
            scores = tl.where(visible, scores, float("-inf"))
            new = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(scores - base[:, None])
            factor = tl.exp2(top - base)
            weight = weight * factor + tl.sum(p, 1)
            if not latent:
                v = tl.load(source[:, None] + block * heads * dim + lane[None, :], numbers, 0.0)
            total = tl.dot(p.to(v.dtype), v, total * factor[:, None], input_precision="ieee")
            top = new
        all_top, all_weight, all_total = merged(all_top, all_weight, all_total, top, weight, total)

    if slot < 0:
        if sunk:
            sink = tl.load(sinks + head * groups + group, valid, 0.0).to(tl.float32) * 1.4426950408889634
            all_top, all_weight, all_total = merged(all_top, all_weight, all_total, sink, 1.0, 0.0)
        found = (all_total / all_weight[:, None]).to(out.dtype.element_ty)
        tl.store(out + at[:, None] * values + lane[None, :], found, inside)
    else:
        where = slot * heads * shares + tl.program_id(1)
        target = parts + (where.to(tl.int64) * most + row[:, None]) * values + lane[None, :]
        tl.store(target, all_total, inside)
        tl.store(states + where * 2 * most + row, all_top, valid)
        tl.store(states + (where * 2 + 1) * most + row, all_weight, valid)


@triton.jit  # type: ignore[untyped-decorator]
def merge_kernel(  # type: ignore[no-untyped-def]
    out, parts, states, sinks, tiles, most,
    heads: tl.constexpr, groups: tl.constexpr, share: tl.constexpr, values: tl.constexpr, padded: tl.constexpr,
    rows: tl.constexpr, sunk: tl.constexpr,
):  # fmt: skip
    """One program for the tokens that share items, and a share of a key head: merges their states in order, and then
    with the sinks, each a key more, whose value is nothing."""
    shares: tl.constexpr = (groups + share - 1) // share
    tile, head = tiles + tl.program_id(0) * 4, tl.program_id(1) // shares
    token, tokens, slot, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    if tokens == 0:
        return
    row, lane = tl.arange(0, rows), tl.arange(0, padded)
    own, group = row // share, tl.program_id(1) % shares * share + row % share
    valid = (own < tokens) & (group < groups)
    inside = valid[:, None] & (lane < values)[None, :]
    top = tl.full((rows,), float("-inf"), tl.float32)
    weight = tl.zeros((rows,), tl.float32)
    total = tl.zeros((rows, padded), tl.float32)
    for number in range(slot, slot + count):
        where = number * heads * shares + tl.program_id(1)
        state = states + where * 2 * most + row
        part = tl.load(parts + (where.to(tl.int64) * most + row[:, None]) * values + lane[None, :], inside, 0.0)
        other_top, other_weight = tl.load(state, valid, float("-inf")), tl.load(state + most, valid, 0.0)
        top, weight, total = merged(top, weight, total, other_top, other_weight, part)
    if sunk:
        sink = tl.load(sinks + head * groups + group, valid, 0.0).to(tl.float32) * 1.4426950408889634
        top, weight, total = merged(top, weight, total, sink, 1.0, 0.0)
    at = (token + own).to(tl.int64) * heads * groups + head * groups + group
    tl.store(out + at[:, None] * values + lane[None, :], (total / weight[:, None]).to(out.dtype.element_ty), inside)
