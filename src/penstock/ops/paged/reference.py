"""The readable backend: one sequence after the other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from penstock.ops.attention import attend_rows, causal_mask
from penstock.ops.paged.contract import CacheShape, PagedAttention, PagedBatch, PagedCache
from penstock.policy import policy


class ReferenceCache(PagedCache):
    """Keys and values as [layers, 2, blocks, block_size, K, D]."""

    def allocate(self) -> None:
        shape = self.shape
        self._memory = torch.zeros(
            shape.layers,
            2,
            shape.blocks,
            shape.block_size,
            shape.kv_heads,
            shape.head_dim,
            dtype=shape.dtype,
            device=shape.device,
        )

    def plan(self, batch: PagedBatch, lane: int = 0) -> None:
        self._batch = batch

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        keys, values = self._memory[layer].flatten(1, 2)
        slots = self._batch.slots.to(key.device)
        keys[slots], values[slots] = key, value
        starts, out = self._batch.starts.tolist(), torch.empty_like(query)
        for index, length in enumerate(self._batch.lengths.tolist()):
            own = slice(starts[index], starts[index + 1])
            place = torch.arange(length)
            block = self._batch.tables[index].long()[place // self.shape.block_size]
            where = (block * self.shape.block_size + place % self.shape.block_size).to(key.device)
            mask = self._mask(index, own, place, window).to(key.device)
            rows = (x.unsqueeze(0) for x in (query[own], keys[where], values[where]))
            out[own] = attend_rows(*rows, scale=scale, mask=mask[None, None])[0]
        return out

    def _mask(self, sequence: int, own: slice, place: Tensor, window: int | None) -> Tensor:
        """Which tokens of a sequence, at all its places [S], its new ones see: bool [T, S]."""
        first, masks = len(place) - (own.stop - own.start), self._batch.masks
        if masks is None or sequence not in masks.sequences:
            return causal_mask(place[first:], place, window)
        index = int(np.searchsorted(masks.sequences, sequence))
        before, position = int(masks.before[index]), place.clone()
        position[first:] = torch.from_numpy(masks.positions[own])
        seen = causal_mask(place[first:], place)
        seen[before - first :, before:] = torch.from_numpy(masks.matrix(index))
        if window is not None:
            seen &= (position[first:, None] - position).abs() < window
        return seen

    def copy(self, sources: list[int], targets: list[int]) -> None:
        self._memory[:, :, targets] = self._memory[:, :, sources]

    def move(self, sources: list[int], targets: list[int]) -> None:
        tokens = self._memory.flatten(2, 3)
        tokens[:, :, targets] = tokens[:, :, sources]


@policy("attention.paged", "reference")
class Reference(PagedAttention):
    """Gathers each sequence's keys and values and attends to them, one sequence at a time, on any device."""

    def serves(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def open(self, shape: CacheShape) -> PagedCache:
        return ReferenceCache(shape)
