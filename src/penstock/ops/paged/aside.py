"""Vectors of tokens that lie in the host's memory, beside blocks of the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.ops.paged.contract import CacheShape


class Aside:
    """Room in the host's memory for a vector of ``each`` tokens, in all layers and KV heads, beside each block of a
    cache.

    What lies there belongs to whoever holds the block, is copied with it, and is written anew when the block is: nobody
    has to count it. Only what was written once takes memory. It is not pinned, as it may be much larger than the
    device's memory; what is read is gathered by the host before it goes over the bus.
    """

    def __init__(self, shape: CacheShape, each: int) -> None:
        self._shape, self._each = shape, each
        numbers, dtype = shape.codec.stored(shape.head_dim, shape.dtype)
        self._memory = torch.empty(shape.layers, shape.blocks * each, shape.kv_heads, numbers, dtype=dtype)

    def read(self, slots: Tensor, layer: int, tokens: Tensor) -> Tensor:
        """The vectors [*, K, D] of ``tokens`` int64 [*, K] in ``layer``, each KV head its own, of a sequence whose
        places are in ``slots`` int64. On CUDA this waits for the device, which chose them."""
        shape = self._shape
        rows = self._rows(slots, tokens.cpu()) * shape.kv_heads + torch.arange(shape.kv_heads)
        stored = self._memory[layer].flatten(0, 1)[rows].to(shape.device)
        return shape.codec.decode(stored, shape.head_dim, shape.dtype)

    def write(self, slots: Tensor, vectors: Tensor) -> None:
        """Puts ``vectors`` [layers, K, n, D] in place of those of the first n tokens of a sequence whose places are in
        ``slots``."""
        rows = self._rows(slots, torch.arange(vectors.shape[2]))
        self._memory[:, rows] = self._shape.codec.encode(vectors.transpose(1, 2)).cpu()

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Whole blocks were copied."""
        blocks = self._memory.view(len(self._memory), -1, self._each, *self._memory.shape[2:])
        blocks[:, targets] = blocks[:, sources]

    def _rows(self, slots: Tensor, tokens: Tensor) -> Tensor:
        size = self._shape.block_size
        blocks = slots[::size].cpu() // size
        return blocks[tokens // self._each] * self._each + tokens % self._each
