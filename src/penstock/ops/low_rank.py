"""Products with low-rank matrices, of which each row has its own, added to what is there: adapters in a batch."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.library import custom_op

from penstock.ops import native

SOURCE = Path(__file__).with_name("low_rank_kernel.cpp")

#: Rows of one adapter that are multiplied together at most.
CHUNK = 16
#: Parts of a sum over what goes in, on CUDA: a few rows alone do not fill a device.
SPLITS = 8


class _Matrices(ctypes.Structure):
    """Those of a :class:`LowRank`, as the native code knows them."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.POINTER(ctypes.c_void_p)),
        ("ranges", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_int64) for name in ("pieces", "slots", "rank", "size")),
    )


@dataclasses.dataclass(frozen=True)
class LowRank:
    """What the adapters in S slots add to a matrix [out, in]: pieces of its rows have an A and a B in each slot.

    Attributes:
        a: [pieces, S, rank, in].
        b: [S, rank, rows] of each piece, multiplied by its adapter's scale.
        ranges: where each piece's rows begin and end.
    """

    a: Tensor
    b: Sequence[Tensor]
    ranges: Sequence[tuple[int, int]]

    @functools.cached_property
    def described(self) -> _Matrices:
        """The same for native code. Nothing is copied: numbers that are written later are there."""
        b = (ctypes.c_void_p * len(self.b))(*(each.data_ptr() for each in self.b))
        ranges = (ctypes.c_int64 * (2 * len(self.b)))(*(end for each in self.ranges for end in each))
        return _Matrices(self.a.data_ptr(), b, ranges, *self.a.shape)


class Wearing(Protocol):
    """Says which rows of a pass have which adapter."""

    def begin(self, x: Tensor, matrices: LowRank) -> Tensor | None:
        """Begins with what does not need the product that is added to, beside which it runs; what :meth:`add` is told
        of it."""
        ...

    def add(self, out: Tensor, x: Tensor, matrices: LowRank, begun: Tensor | None = None) -> Tensor:
        """``out`` [N, out] with what the adapter of each row adds for ``x`` [N, in]; of rows without one, as it is.
        ``begun`` is what :meth:`begin` has returned for them."""
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

    def begin(self, x: Tensor, matrices: LowRank) -> None:
        return None

    def add(self, out: Tensor, x: Tensor, matrices: LowRank, begun: Tensor | None = None) -> Tensor:
        chunks = len(matrices.a[0][self.slots])
        given = x[self.grid].view(chunks, -1, x.shape[1])
        for a, b, (begin, end) in zip(matrices.a, matrices.b, matrices.ranges, strict=True):
            found = torch.bmm(torch.bmm(given, a[self.slots].mT), b[self.slots])
            out[:, begin:end].index_add_(0, self.rows, found.flatten(0, 1)[self.kept])
        return out


@dataclasses.dataclass(frozen=True)
class Native:
    """Where the host knows whose rows are whose, and native code knows the dtype: one call for a matrix, in which the
    rows of an adapter share its numbers. A row's bits do not depend on the others.

    Attributes:
        owners: int64 [N], the slots of the rows, counted from 1; 0 is none.
    """

    owners: Tensor

    def begin(self, x: Tensor, matrices: LowRank) -> None:
        return None

    def add(self, out: Tensor, x: Tensor, matrices: LowRank, begun: Tensor | None = None) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        owners, places = self.owners, (x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0))
        described = ctypes.addressof(matrices.described)
        _kernel()(owners.data_ptr(), len(owners), *places, described, torch.get_num_threads())
        return out


@dataclasses.dataclass(frozen=True)
class Sorted:
    """Where the host may not look, on CUDA, and a graph is to hold for whatever rows come: they are sorted on the
    device, once for a pass, and two kernels for a matrix read each adapter for its own rows alone (the two steps are
    those of Punica's and S-LoRA's kernels, Chen et al. 2023, Sheng et al. 2023; the tiles of sorted rows are those of
    our experts).

    Attributes:
        order: int32 [N], the rows by their slots, 0 for none.
        tiles: int32 [N, 4], what some of them that lie together have in common: their slot, the place of the first of
            them in that order, where those of the slot end, and which row the first is.
    """

    order: Tensor
    tiles: Tensor

    @classmethod
    def of(cls, owners: Tensor, slots: int) -> Self:
        """Of rows whose slots, of so many, are ``owners`` int64 [N]."""
        return cls(*_sorted(owners, slots + 1))

    def begin(self, x: Tensor, matrices: LowRank) -> Tensor:
        begun: Tensor = _narrow(x.contiguous(), self.order, self.tiles, matrices.a)
        return begun

    def add(self, out: Tensor, x: Tensor, matrices: LowRank, begun: Tensor | None = None) -> Tensor:
        begun = self.begin(x, matrices) if begun is None else begun
        begins = [begin for begin, _ in matrices.ranges]
        _widen(out, x, begun, self.order, self.tiles, list(matrices.b), begins)
        return out


@custom_op("penstock::sorted_rows", mutates_args=())
def _sorted(owners: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    from penstock.ops.low_rank_kernel import sorted_tiles

    return sorted_tiles(owners.contiguous(), groups)


@_sorted.register_fake
def _(owners: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    size = owners.shape[0]
    return owners.new_empty(size, dtype=torch.int32), owners.new_empty(size, 4, dtype=torch.int32)


@functools.cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """The stream on which the first of the two kernels runs: it has little to compute, and waits as long as others."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@custom_op("penstock::narrow_low_rank", mutates_args=())
def _narrow(x: Tensor, order: Tensor, tiles: Tensor, a: Tensor) -> Tensor:
    from penstock.ops.low_rank_kernel import narrow

    inner, stream = _room(x, a), _beside(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        narrow(inner, x, order, tiles, a)
    return inner


@_narrow.register_fake
def _(x: Tensor, order: Tensor, tiles: Tensor, a: Tensor) -> Tensor:
    return _room(x, a)


def _room(x: Tensor, a: Tensor) -> Tensor:
    """Where what ``a`` [pieces, slots, width, size] makes of ``x`` [N, size] goes, in parts of a sum. ``len`` would
    make a number of an N that is to be any."""
    return x.new_empty(SPLITS, a.shape[0], x.shape[0], a.shape[2], dtype=torch.float32)


@custom_op("penstock::widen_low_rank", mutates_args=("out",))
def _widen(
    out: Tensor, x: Tensor, inner: Tensor, order: Tensor, tiles: Tensor, b: Sequence[Tensor], begins: Sequence[int]
) -> None:
    # x is not read: whoever has it may not write to its memory before the other stream is done.
    from penstock.ops.low_rank_kernel import widen

    torch.cuda.current_stream(out.device).wait_stream(_beside(out.device))
    widen(out, inner, order, tiles, b, begins)


@_widen.register_fake
def _(
    out: Tensor, x: Tensor, inner: Tensor, order: Tensor, tiles: Tensor, b: Sequence[Tensor], begins: Sequence[int]
) -> None:
    return None


def wearing(owners: Tensor, slots: int, natively: bool) -> Wearing | None:
    """Of rows with ``owners`` int64 [N], of so many ``slots``, on whichever device they are, whose numbers
    :func:`native code takes <takes>`, or not; None where the host sees that all have none."""
    if owners.is_cuda:
        return Sorted.of(owners, slots)
    if not owners.any():
        return None
    return Native(owners.contiguous()) if natively else Chunked.of(owners)


def takes(like: Tensor) -> bool:
    """Whether native code adds to rows of the dtype of ``like``, on its device. It is compiled now, where it has not
    been."""
    return not like.is_cuda and like.dtype is torch.float32 and native.serves(SOURCE)


@functools.cache
def _kernel() -> native.Function:
    place, number = ctypes.c_void_p, ctypes.c_int64
    types: list[Any] = [place, number, place, number, place, number, place, number]
    return native.Function(native.load(SOURCE), "add", types)
