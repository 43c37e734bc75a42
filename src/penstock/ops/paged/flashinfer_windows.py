"""Windows in full precision with FlashInfer's kernels: attention to what is coded and to the windows, each by itself,
put together by their log-sum-exp.

New tokens are cut where windows begin: a piece of a sequence sees the places before its window in their blocks, all of
them, and those of its window in the sequence's ring, whose every place is a page. Where a batch has more new tokens of
a sequence than fit into its ring with what they see of it, the window's keys and values are put together in memory of
their own, before the ring is written to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.core.devices import pinned, upload
from penstock.ops.paged.contract import CacheShape, PagedBatch
from penstock.ops.paged.residual import Rings


class Gathered(NamedTuple):
    """Windows that do not fit into rings: so many pages; which of them come from places of rings, and which from new
    tokens, int64."""

    pages: int
    of_rings: Tensor
    rings: Tensor
    of_tokens: Tensor
    tokens: Tensor


class Part(NamedTuple):
    """Rows of a batch, int64, and the wrapper that attends for them."""

    rows: Tensor
    wrapper: Any


class Parts(NamedTuple):
    """What is attended to of a planned batch: blocks, rings, and windows that are gathered; None where nothing is."""

    coded: Part | None
    ring: Part | None
    gathered: Part | None
    source: Gathered | None


class Pieces(NamedTuple):
    """New tokens of one sequence and one window, all arrays int64 [P]: the first row and the one behind, the sequence,
    where the window begins, and the place behind the last token."""

    first: np.ndarray
    behind: np.ndarray
    sequence: np.ndarray
    begin: np.ndarray
    end: np.ndarray

    def chosen(self, which: np.ndarray) -> Pieces:
        return Pieces(*(each[which] for each in self))

    @property
    def rows(self) -> np.ndarray:
        """All of them, int64."""
        return spread(self.first, self.behind)


class WindowedAttention:
    """Plans and computes attention over a cache with :class:`~penstock.ops.paged.residual.Rings`.

    Args:
        shape: of the cache.
        workspace: for partial results, uint8.
        kept: the dtype of the numbers in blocks.
    """

    def __init__(self, shape: CacheShape, workspace: Tensor, kept: torch.dtype) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        self._shape, self._kept = shape, kept
        # Those of one kind tell the logarithms to one base.
        self._wrappers = [BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2") for _ in range(3)]
        self._parts = Parts(None, None, None, None)

    def plan(self, batch: PagedBatch) -> None:
        """What is attended to next is ``batch``, which has rings."""
        assert batch.rings is not None and self._shape.residual is not None
        rings, places = batch.rings.numpy().astype(np.int64), self._shape.residual.places
        pieces = pieces_of(batch, self._shape.residual.tokens)
        starts, lengths = batch.starts.numpy().astype(np.int64), batch.lengths.numpy().astype(np.int64)
        computed, first = lengths - np.diff(starts), np.full(len(lengths), np.iinfo(np.int64).max)
        np.minimum.at(first, pieces.sequence, pieces.begin)
        over = (lengths - np.minimum(first, lengths) > places)[pieces.sequence]
        coded, ring, gathered = (
            pieces.chosen(np.flatnonzero(which)) for which in (pieces.begin > 0, ~over, over)
        )  # fmt: skip
        pages = spread(ring.begin, ring.end) % places + np.repeat(rings[ring.sequence] * places, ring.end - ring.begin)
        own, owner = spread(gathered.begin, gathered.end), np.repeat(gathered.sequence, gathered.end - gathered.begin)
        early = own < computed[owner]
        self._parts = Parts(
            self._plan_coded(batch, coded),
            self._plan_window(1, ring, pages),
            self._plan_window(2, gathered, np.arange(len(own))),
            Gathered(
                len(own),
                *self._on_device(np.flatnonzero(early), (rings[owner] * places + own % places)[early]),
                *self._on_device(np.flatnonzero(~early), (own - computed[owner] + starts[owner])[~early]),
            )
            if len(own)
            else None,
        )

    def _plan_coded(self, batch: PagedBatch, pieces: Pieces) -> Part | None:
        size, tables = self._shape.block_size, batch.tables.numpy()[pieces.sequence]
        counts = -(-pieces.begin // size)
        blocks = tables[np.arange(tables.shape[1]) < counts[:, None]]
        return self._planned(0, pieces, counts, blocks, pieces.begin - (counts - 1) * size, size, causal=False)

    def _plan_window(self, number: int, pieces: Pieces, pages: np.ndarray) -> Part | None:
        counts = pieces.end - pieces.begin
        return self._planned(number, pieces, counts, pages, np.ones_like(counts), 1, causal=True)

    def _planned(
        self,
        number: int,
        pieces: Pieces,
        counts: np.ndarray,
        pages: np.ndarray,
        last: np.ndarray,
        size: int,
        causal: bool,
    ) -> Part | None:
        """A plan of the ``pieces``, of which each sees so many of the ``pages`` of ``size`` tokens, the ``last`` of
        them as far as that."""
        shape, rows = self._shape, pieces.behind - pieces.first
        if not len(rows):
            return None
        wrapper, lengths = self._wrappers[number], (counts - 1) * size + last
        starts, ends, behind, seen = (
            pinned(each.astype(np.int32), shape.device) for each in (_edges(rows), _edges(counts), last, lengths)
        )
        wrapper.plan(
            starts,
            ends,
            upload(pages.astype(np.int32), shape.device),
            behind,
            num_qo_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim_qk=shape.head_dim,
            page_size=size,
            causal=causal,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype if causal else self._kept,
            # Need not be computed again then, nor copied from memory that is not pinned.
            seq_lens=seen,
            max_token_per_sequence=int(rows.max()),
        )
        (index,) = self._on_device(pieces.rows)
        return Part(index, wrapper)

    def _on_device(self, *arrays: np.ndarray) -> tuple[Tensor, ...]:
        return tuple(upload(each.astype(np.int64), self._shape.device) for each in arrays)

    def attend(
        self,
        layer: int,
        query: Tensor,
        scaled: Tensor,
        key: Tensor,
        value: Tensor,
        memory: Tensor,
        rings: Rings,
        scales: Tensor | None,
    ) -> Tensor:
        """Attention [N, H, D] of the planned batch, whose ``key`` and ``value`` [N, K, D] are in the blocks of
        ``memory`` already, and are written to ``rings``.

        Args:
            layer: of the cache.
            query: [N, H, D], for windows.
            scaled: the same, for codes.
            key, value: as they were computed.
            memory: of the layer, as kernels read it.
            rings: the windows.
            scales: what attention to codes is multiplied by, [H, 1]; None is nothing.
        """
        parts, source = self._parts, self._gather(layer, key, value, rings)
        for part, vectors in enumerate((key, value)):
            rings.write(layer, part, vectors)
        out = torch.empty_like(query)
        logs = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        windows = tuple(rings.memory[layer, part].flatten(0, 1).unsqueeze(1) for part in (0, 1))
        for each, pages in ((parts.ring, windows), (parts.gathered, source)):
            if each is not None:
                out[each.rows], logs[each.rows] = each.wrapper.run(query[each.rows], pages, return_lse=True)
        if parts.coded is not None:
            self._add(parts.coded, scaled, memory, scales, out, logs)
        return out

    def _gather(self, layer: int, key: Tensor, value: Tensor, rings: Rings) -> tuple[Tensor, Tensor] | None:
        """The keys and the values [n, 1, K, D] of windows that do not fit into rings."""
        own = self._parts.source
        if own is None:
            return None
        found = []
        for part, vectors in enumerate((key, value)):
            pages = vectors.new_empty((own.pages, 1, *vectors.shape[1:]))
            pages[own.of_rings, 0] = rings.memory[layer, part].flatten(0, 1)[own.rings]
            pages[own.of_tokens, 0] = vectors[own.tokens]
            found.append(pages)
        return found[0], found[1]

    def _add(
        self, part: Part, scaled: Tensor, memory: Tensor, scales: Tensor | None, out: Tensor, logs: Tensor
    ) -> None:
        """Puts attention to windows and to what is coded together in ``out``, whose log-sum-exp are ``logs``."""
        from flashinfer import merge_state

        coded, sums = part.wrapper.run(scaled[part.rows], memory, return_lse=True)
        if scales is not None:
            coded = coded.mul_(scales)
        out[part.rows], _ = merge_state(out[part.rows], logs[part.rows], coded, sums)


def pieces_of(batch: PagedBatch, window: int) -> Pieces:
    """The new tokens of ``batch``, whose windows have so many places, cut where those begin."""
    assert batch.since is not None
    starts, lengths = batch.starts.numpy().astype(np.int64), batch.lengths.numpy().astype(np.int64)
    counts = np.diff(starts)
    owner = np.repeat(np.arange(len(lengths)), counts)
    places = np.arange(len(owner)) + (lengths - starts[1:])[owner]
    cut = np.ones(len(owner), bool)
    cut[1:] = (np.diff(owner) > 0) | (np.diff(places // window) != 0)
    first = np.flatnonzero(cut)
    behind, sequence = np.append(first[1:], len(owner)), owner[first]
    begin = np.maximum(batch.since.numpy().astype(np.int64)[sequence], places[first] // window * window)
    return Pieces(first, behind, sequence, begin, places[behind - 1] + 1)


def spread(first: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """All numbers from each of ``first`` up to that of ``behind``, one after the other."""
    counts = behind - first
    found: np.ndarray = np.arange(counts.sum()) + np.repeat(first - (counts.cumsum() - counts), counts)
    return found


def _edges(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], counts.cumsum()])
