"""Attention in which each query walks its keys in pieces of fixed size: what its kernels are told of a batch.

Tokens of a sequence come in tiles, and their keys in pieces. An item of work is a tile against all of its pieces, or,
where there are too few tiles to keep the device busy, against one of them. Both give the same bits: a piece's softmax
begins anew, and states are merged in order by the same arithmetic.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.core.devices import upload
from penstock.ops.attention import PLAIN, Extras
from penstock.ops.paged.contract import CacheShape, PagedBatch, StepShape, slots_onward
from penstock.ops.paged.masks import Masks
from penstock.ops.paged.walk_kernel import FIELDS, KEYS, PIECE, ROWS, merge_kernel, walk_kernel

#: Stands for no window, and for a chunk that has everything; places are added to it, in 32 bits.
UNBOUNDED = 2**30

#: Numbers of a value up to which tiles are :data:`ROWS` by :data:`KEYS`; above, what a tile has found would not fit in
#: registers.
USUAL_VALUES = 256

#: Items of work, with those of other key heads, from which on a device is busy.
ENOUGH = 512

#: Numbers, in all, that states of items are kept in at most.
MOST_PARTS = 2**26


class Tiling(NamedTuple):
    """What a tile is, by the shape of a cache alone: the bits of a row depend on it.

    Attributes:
        rows: query rows: some tokens, and of each a share of the query heads of a key head.
        keys: how many are looked at together.
        share: query heads of a key head in a tile.
        shares: how many make up those of a key head; the last may be smaller.
    """

    rows: int
    keys: int
    share: int
    shares: int

    @classmethod
    def of(cls, groups: int, values: int) -> Tiling:
        """Where a key head has ``groups`` query heads, and a value so many numbers."""
        rows, keys = (ROWS, KEYS) if values <= USUAL_VALUES else (ROWS // 4, KEYS // 2)
        shares = -(-groups // rows)
        return cls(rows, keys, -(-groups // shares), shares)

    @classmethod
    def on(cls, shape: CacheShape) -> Tiling:
        """That of a cache."""
        return cls.of(shape.heads // shape.kv_heads, shape.latent or shape.head_dim)

    @property
    def tokens(self) -> int:
        """Those of a tile."""
        return self.rows // self.share


class Walk(NamedTuple):
    """A batch as the kernels take it, int32, on the device.

    Attributes:
        items: [I, FIELDS]: the row of the table; the first token, and how many, 0 for no item; the place of the first
            in its sequence; the sequence's length; the pieces, and the one behind; where the state goes, or -1; how
            many tokens are before the mask; and where its matrix begins.
        tiles: [T, 4], of those whose pieces are items of their own: the first token, how many, the first state, and how
            many of them.
        tables: [B, M].
        positions: [N], and ``seen``, uint8, as of :class:`Masks`; None without any.
        slots: how many states there are.
        most: rows of a tile whose state is kept.
    """

    items: Tensor
    tiles: Tensor
    tables: Tensor
    positions: Tensor | None
    seen: Tensor | None
    slots: int
    most: int

    def attend(
        self,
        query: Tensor,
        memory: Tensor,
        out: Tensor,
        *,
        scale: float,
        window: int | None,
        extras: Extras = PLAIN,
    ) -> None:
        """Attention of the walk's tokens: query [N, H, D] and out [N, H, V], over memory [blocks, 2, block_size, K, D]
        with V = D, or over [blocks, 1, block_size, K, D] of keys whose first V numbers are their values."""
        _, parts, block, heads, dim = memory.shape
        values, groups = out.shape[-1], query.shape[1] // heads
        tiling, log2e = Tiling.of(groups, values), math.log2(math.e)
        states = torch.empty((self.slots, heads * tiling.shares, 2, self.most), dtype=torch.float32, device=out.device)
        found = torch.empty((*states.shape[:2], self.most, values), dtype=torch.float32, device=out.device)
        positions, seen, sinks = (self.items if x is None else x for x in (self.positions, self.seen, extras.sinks))
        capped, sunk = extras.cap is not None, extras.sinks is not None
        # Scores are in powers of two, those that are bent too.
        factor, cap = (scale * log2e, 0.0) if extras.cap is None else (scale / extras.cap, extras.cap * log2e)
        window, chunk = (UNBOUNDED if each is None else each for each in (window, extras.chunk))
        # What is multiplied and added is never fused: whether it is could differ from one variant to another.
        options = {"num_warps": 4, "num_stages": 2 if out.dtype.itemsize < 4 else 1, "enable_fp_fusion": False}
        grid = heads * tiling.shares
        walk_kernel[(len(self.items), grid)](
            query, memory, out, found, states, sinks, self.items, self.tables, positions, seen, factor, cap, window,
            chunk, self.tables.shape[1], self.most, heads, groups, tiling.share, values, dim - values, _power(values),
            _power(dim - values), parts == 1, block, tiling.rows, tiling.keys, PIECE, FIELDS,
            self.positions is not None, capped, sunk, **options,
        )  # fmt: skip
        if len(self.tiles):
            merge_kernel[(len(self.tiles), grid)](
                out, found, states, sinks, self.tiles, self.most, heads, groups, tiling.share, values, _power(values),
                _power(self.most), sunk, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip


def _power(count: int) -> int:
    """The lanes that so many numbers take."""
    return max(16, 1 << (count - 1).bit_length()) if count else 16


def walk_of(batch: PagedBatch, shape: CacheShape, sequences: np.ndarray | None = None) -> Walk:
    """The walk of ``batch``, or of some of its ``sequences``."""
    sequences = np.arange(len(batch.lengths)) if sequences is None else sequences
    tiling, masks = Tiling.on(shape), batch.masks
    tiles = _tiles(batch, sequences, tiling.tokens, masks)
    pieces = -(-tiles[:, 4] // PIECE)
    most = int(tiles[:, 2].max(initial=1)) * tiling.share
    split = not _busy(len(tiles), shape) and _room(int(pieces.sum()), most, shape)
    items, shared = _items(tiles, np.where(split, pieces, 1), pieces)
    tables = batch.tables.numpy()
    packed = upload(np.concatenate([items.ravel(), shared.ravel(), tables.ravel()]).astype(np.int32), shape.device)
    on_device = packed.split_with_sizes([items.size, shared.size, tables.size])
    positions, seen = (None, None) if masks is None else _masked(masks, shape.device)
    slots = int(shared[:, 3].sum())
    items_there, shared_there, tables_there = on_device
    return Walk(
        items_there.view(-1, FIELDS), shared_there.view(-1, 4), tables_there.view(tables.shape), positions, seen, slots,
        most,
    )  # fmt: skip


class FixedWalk:
    """Walks of batches of one ``shape`` that lie in the same memory each time.

    Args:
        shape: of the batches.
        cache: of the memory of keys and values.
        pages: most blocks of a sequence.
    """

    def __init__(self, shape: StepShape, cache: CacheShape, pages: int) -> None:
        self._cache, self._tiling, sequences = cache, Tiling.on(cache), shape.singles + shape.others
        self._tiles = sequences + shape.tokens // self._tiling.tokens
        most = self._tiling.share * (self._tiling.tokens if shape.others else 1)
        pieces = -(-pages * cache.block_size // PIECE)
        split = not _busy(self._tiles, cache) and _room(self._tiles * pieces, most, cache)
        self._most, self._onward = pieces, shape.onward
        self._pieces = pieces if split else 1
        shared, rows = self._tiles if self._pieces > 1 else 0, shape.rows if shape.masked else 0
        self._sizes = [self._tiles * self._pieces * FIELDS, shared * 4, sequences * pages, rows]
        self._memory = torch.zeros(sum(self._sizes), dtype=torch.int32, device=cache.device)
        items, tiles, tables, positions = self._memory.split_with_sizes(self._sizes)
        # Of so many tokens, none of which is in a mask over more than so many.
        seen = torch.zeros(shape.tokens * shape.masked, dtype=torch.uint8, device=cache.device)
        self.walk = Walk(
            items.view(-1, FIELDS),
            tiles.view(-1, 4),
            tables.view(-1, pages),
            positions if shape.masked else None,
            seen if shape.masked else None,
            shared * self._pieces,
            most,
        )

    def fill(self, batch: PagedBatch) -> None:
        """Writes the walk of ``batch`` in place of the last one."""
        host, masks = np.zeros(len(self._memory), np.int32), batch.masks
        items, shared, tables, positions = np.split(host, np.cumsum(self._sizes[:3]))
        tiles = _tiles(batch, np.arange(len(batch.lengths)), self._tiling.tokens, masks)
        # Those too that it may come to on its way. A piece without keys changes nothing.
        pieces = np.minimum(-(-(tiles[:, 4] + self._onward) // PIECE), self._most)
        own_items, own_tiles = _items(tiles, np.where(self._pieces > 1, pieces, 1), pieces, even=self._pieces > 1)
        items[: own_items.size], shared[: own_tiles.size] = own_items.ravel(), own_tiles.ravel()
        width = batch.tables.shape[1]
        tables.reshape(self.walk.tables.shape)[: len(batch.lengths), :width] = batch.tables.numpy()
        if self.walk.seen is not None:
            positions[:] = _in_a_row(batch) if masks is None else masks.positions
            seen = np.zeros(0, np.uint8) if masks is None else masks.seen.view(np.uint8)
            self.walk.seen[: len(seen)].copy_(upload(seen, self._cache.device))
        self._memory.copy_(upload(host, self._cache.device))

    def advance(self, places: Tensor, more: Tensor, nowhere: int, slots: Tensor) -> None:
        """See :meth:`~penstock.ops.paged.contract.PagedCache.advance`; where the new tokens go is put into ``slots``
        int64 [B]."""
        items = self.walk.items
        items[:, 3:5] += more.int()[items[:, 0].long()].unsqueeze(1)  # the token's place, and the length
        slots.copy_(slots_onward(self.walk.tables, places, more, self._cache.block_size, nowhere))


def _in_a_row(batch: PagedBatch) -> np.ndarray:
    """The positions int64 [N] of tokens that are in a row."""
    starts, lengths = batch.starts.numpy().astype(np.int64), batch.lengths.numpy().astype(np.int64)
    counts = np.diff(starts)
    found: np.ndarray = np.arange(starts[-1]) + np.repeat(lengths - starts[1:], counts)
    return found


def _busy(tiles: int, shape: CacheShape) -> bool:
    """Whether so many keep a device busy without cutting their keys."""
    return tiles * shape.kv_heads * Tiling.on(shape).shares >= ENOUGH


def _room(slots: int, most: int, shape: CacheShape) -> bool:
    """Whether states of so many items, of so many rows each, may be kept."""
    numbers = shape.kv_heads * Tiling.on(shape).shares * (shape.latent or shape.head_dim)
    return slots * most * numbers <= MOST_PARTS


def _tiles(batch: PagedBatch, sequences: np.ndarray, per_tile: int, masks: Masks | None) -> np.ndarray:
    """Of each tile: the sequence, its first token, how many it has, the place of the first, the sequence's length, how
    many tokens are before its mask, and where that begins; int64 [T, 7]."""
    starts, lengths = batch.starts.numpy().astype(np.int64), batch.lengths.numpy().astype(np.int64)
    before, offsets = lengths.copy(), np.zeros_like(lengths)
    if masks is not None:
        before[masks.sequences], offsets[masks.sequences] = masks.before, masks.offsets[:-1]
    counts = np.diff(starts)[sequences]
    each = -(-counts // per_tile)
    owner = np.repeat(sequences, each)
    number = np.arange(each.sum()) - np.repeat(each.cumsum() - each, each)
    token = starts[owner] + number * per_tile
    tokens = np.minimum(per_tile, starts[owner + 1] - token)
    place = lengths[owner] - (starts[owner + 1] - token)
    return np.stack([owner, token, tokens, place, lengths[owner], before[owner], offsets[owner]], 1)


def _items(
    tiles: np.ndarray, each: np.ndarray, pieces: np.ndarray, even: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The items and the shared tiles of a walk where tile i has ``each[i]`` items: all its ``pieces`` in one, or one
    for each. ``even`` shares those of a single piece too."""
    owner = np.repeat(np.arange(len(tiles)), each)
    first = np.arange(len(owner)) - np.repeat(each.cumsum() - each, each)
    split = (each > 1) | even
    slot = np.where(split[owner], np.cumsum(split[owner]) - 1, -1)
    last = np.where(split[owner], first + 1, pieces[owner])
    items = np.column_stack([tiles[owner, :5], first, last, slot, tiles[owner, 5:]])
    counts = each[split]
    shared = np.column_stack([tiles[split][:, 1:3], counts.cumsum() - counts, counts])
    return items, shared


def _masked(masks: Masks, device: torch.device) -> tuple[Tensor, Tensor]:
    return upload(masks.positions.astype(np.int32), device), upload(masks.seen.view(np.uint8), device)
