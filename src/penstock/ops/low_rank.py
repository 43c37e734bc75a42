"""Products with low-rank matrices, of which each row has its own, added to what is there: adapters in a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Rows of one adapter that are multiplied together at most.
CHUNK = 16


class LowRank(NamedTuple):
    """What the adapters in S slots add to a matrix [out, in]: pieces of its rows have an A and a B in each slot.

    Attributes:
        a: [pieces, S, rank, in].
        b: [S, rank, rows] of each piece, multiplied by its adapter's scale.
        ranges: where each piece's rows begin and end.
    """

    a: Tensor
    b: Sequence[Tensor]
    ranges: Sequence[tuple[int, int]]


class Wearing(Protocol):
    """Says which rows of a pass have which adapter."""

    def add(self, out: Tensor, x: Tensor, matrices: LowRank) -> Tensor:
        """``out`` [N, out] with what the adapter of each row adds for ``x`` [N, in]; of rows without one, as it is."""
        ...


@dataclasses.dataclass(frozen=True)
class Chunked:
    """Where the host knows whose rows are whose: rows of one adapter are gathered in chunks, a product for each.

    Attributes:
        slots: that of each of C chunks; a slice where they are in a row.
        grid: int64 [C * M], the rows that the chunks have; what fills a chunk up is any row.
        kept: int64 [K], the places of ``grid`` that fill nothing up.
        rows: int64 [K], the rows there.
    """

    slots: slice | Tensor
    grid: Tensor
    kept: Tensor
    rows: Tensor

    @classmethod
    def of(cls, owners: Tensor) -> Self | None:
        """Of rows whose slots, counted from 1, are ``owners`` int64 [N], 0 for none; None where all have none."""
        known = owners.numpy()
        rows = np.argsort(known, kind="stable")[(known == 0).sum() :]
        if not len(rows):
            return None
        present, first, own, counts = np.unique(known[rows], return_index=True, return_inverse=True, return_counts=True)
        size = min(CHUNK, int(counts.max()))
        chunks = -(-counts // size)
        within = np.arange(len(rows)) - first[own]
        kept = (chunks.cumsum() - chunks)[own] * size + within
        grid = np.full(int(chunks.sum()) * size, rows[0])
        grid[kept] = rows
        slots = np.repeat(present - 1, chunks)
        # In a row they are taken without a copy.
        straight = bool((np.diff(slots) == 1).all())
        taken = slice(int(slots[0]), int(slots[-1]) + 1) if straight else torch.from_numpy(slots)
        return cls(taken, *(torch.from_numpy(each) for each in (grid, kept, rows)))

    def add(self, out: Tensor, x: Tensor, matrices: LowRank) -> Tensor:
        chunks = len(matrices.a[0][self.slots])
        given = x[self.grid].view(chunks, -1, x.shape[1])
        for a, b, (begin, end) in zip(matrices.a, matrices.b, matrices.ranges, strict=True):
            found = torch.bmm(torch.bmm(given, a[self.slots].mT), b[self.slots])
            out[:, begin:end].index_add_(0, self.rows, found.flatten(0, 1)[self.kept])
        return out


@dataclasses.dataclass(frozen=True)
class Masked:
    """Where the host may not look, and a graph is to hold for whatever rows come: each row goes through the A of all
    slots, what belongs to others becomes zero, and what is left goes through the B of all. It reads every adapter once,
    as it must where a batch has all of them.

    Attributes:
        owners: int64 [N], the slots of the rows, counted from 1; 0 is none.
    """

    owners: Tensor

    def add(self, out: Tensor, x: Tensor, matrices: LowRank) -> Tensor:
        pieces, slots, rank, size = matrices.a.shape
        number = torch.arange(1, slots + 1, device=x.device)
        own = (self.owners[:, None] == number)[:, None, :, None]
        inner = F.linear(x, matrices.a.view(-1, size)).view(-1, pieces, slots, rank)
        inner = torch.where(own, inner, torch.zeros_like(inner)).view(-1, pieces, slots * rank)
        added, at = [], 0
        for piece, (begin, end) in enumerate(matrices.ranges):
            if begin > at:
                added.append(out.new_zeros(()).expand(len(x), begin - at))
            added.append(inner[:, piece] @ matrices.b[piece].view(slots * rank, end - begin))
            at = end
        if at < out.shape[1]:
            added.append(out.new_zeros(()).expand(len(x), out.shape[1] - at))
        return out + (added[0] if len(added) == 1 else torch.cat(added, 1))


def wearing(owners: Tensor) -> Wearing | None:
    """Of rows with ``owners`` int64 [N], on whichever device they are; None where the host sees that all have none."""
    return Masked(owners) if owners.is_cuda else Chunked.of(owners)
