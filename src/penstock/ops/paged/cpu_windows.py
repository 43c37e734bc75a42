"""Windows in full precision as the native kernel has them.

The ring of a sequence is whole blocks, laid out as those of a plain cache: the block i of its places lies in block i
modulo the ring's. Where a batch has more new tokens of a sequence than its ring has places beside what they see of it,
they lie in blocks of their own while a layer is computed, with copies of what the ring has of their first window; the
last ones go to the ring behind it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from penstock.ops.paged.contract import CacheShape, PagedBatch

#: The longest vector of any processor, in bytes: the kernel reads so far past the end of a row.
PADDING = 64


@dataclasses.dataclass(frozen=True)
class PlannedWindows:
    """Where the windows of a batch lie. A slot is block * block_size + offset.

    Attributes:
        tables: int32 [B, M], in which block of the windows each block of a sequence is, as far as new tokens see it in
            full precision; blocks from :attr:`WindowBlocks.blocks` on are ``spilled`` ones.
        since: int32 [B], from which place on windows are counted.
        slots: int64 [N], of the new tokens.
        fetched: int64 [n, 2], from which slot to which keys and values are copied before attention.
        returned: int64 [m, 2], the same behind it.
        spilled: memory of the blocks behind the rings, of one layer.
    """

    tables: np.ndarray
    since: np.ndarray
    slots: np.ndarray
    fetched: np.ndarray
    returned: np.ndarray
    spilled: Tensor


class WindowBlocks:
    """The memory of windows: [layers, blocks, K, 2 * block_size * D], in the dtype of ``shape``, whose windows are
    whole blocks, those that are tentative too.

    Attributes:
        blocks: of all rings.
        window: tokens of one.
        memory: flat, with padding behind it.
    """

    def __init__(self, shape: CacheShape) -> None:
        residual = shape.residual
        assert residual is not None
        self._shape, self._residual, self.window = shape, residual, residual.tokens
        self._each = -(-residual.places // shape.block_size)
        self.blocks = residual.rings * self._each
        self.memory = self._padded(shape.layers * self.blocks)

    def _padded(self, blocks: int) -> Tensor:
        shape = self._shape
        numbers = blocks * shape.kv_heads * 2 * shape.block_size * shape.head_dim
        return torch.zeros(numbers + PADDING // shape.dtype.itemsize, dtype=shape.dtype)

    def plan(self, batch: PagedBatch) -> PlannedWindows:
        """Where those of ``batch`` lie, which has rings.

        Raises:
            IndexError: there is no such ring.
        """
        assert batch.rings is not None and batch.since is not None
        size, each, window = self._shape.block_size, self._each, self.window
        rings, since = batch.rings.numpy(), batch.since.numpy()
        if rings.size and not 0 <= rings.min() <= rings.max() < self._residual.rings:
            raise IndexError(f"a ring of {rings.tolist()} is none of {self._residual.rings}")
        lengths, counts = batch.lengths.numpy(), np.diff(batch.starts.numpy())
        computed = lengths - counts
        begin = np.maximum(since, computed - computed % window)
        first, behind = begin // size, -(-lengths // size)
        blocks = np.arange(batch.tables.shape[1])
        tables = rings[:, None] * each + blocks % each
        fetched, returned, spilled = [], [], 0
        for index in np.flatnonzero(behind - first > each):
            tables[index] = self.blocks + spilled + blocks - first[index]
            spilled += behind[index] - first[index]
            # What was computed of the first window; and of the new tokens as many as there are places.
            early = np.arange(begin[index], computed[index])
            late = np.arange(max(computed[index], lengths[index] - self._residual.places), lengths[index])
            fetched.append(np.stack([self._in_ring(rings[index], early), _slots(tables[index], early, size)], 1))
            returned.append(np.stack([_slots(tables[index], late, size), self._in_ring(rings[index], late)], 1))
        owner = np.repeat(np.arange(len(lengths)), counts)
        places = np.arange(len(batch.slots)) + (lengths - batch.starts.numpy()[1:])[owner]
        slots = tables[owner, places // size] * size + places % size
        none = [np.zeros((0, 2), np.int64)]
        return PlannedWindows(
            tables.astype(np.int32),
            since.astype(np.int32),
            slots.astype(np.int64),
            np.concatenate([*none, *fetched]).astype(np.int64),
            np.concatenate([*none, *returned]).astype(np.int64),
            self._padded(spilled),
        )

    def _in_ring(self, ring: int, places: np.ndarray) -> np.ndarray:
        """The slots of ``places`` in a ring."""
        return ring * self._each * self._shape.block_size + places % (self._each * self._shape.block_size)


def _slots(table: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
    """The slots of ``places`` in the blocks of a ``table``."""
    found: np.ndarray = table[places // size] * size + places % size
    return found
