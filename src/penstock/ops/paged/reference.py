"""The readable backend: one sequence after the other."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from penstock.ops.attention import PLAIN, Extras, attend_rows, causal_mask
from penstock.ops.paged.contract import NEEDS, CacheShape, PagedAttention, PagedBatch, PagedCache
from penstock.policy import policy


class ReferenceCache(PagedCache):
    """Keys and values as [layers, 2, blocks, block_size, K, D], or keys alone where they are latent."""

    def allocate(self) -> None:
        shape = self.shape
        self._memory = torch.zeros(
            shape.layers,
            2 if shape.latent is None else 1,
            shape.blocks,
            shape.block_size,
            shape.kv_heads,
            shape.head_dim,
            dtype=shape.dtype,
            device=shape.device,
        )

    def plan(self, batch: PagedBatch, lane: int = 0) -> None:
        super().plan(batch, lane)
        self._batch = batch

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        extras: Extras = PLAIN,
    ) -> Tensor:
        self.note(layer, query, scale)
        slots, stored = self._batch.slots.to(key.device), self._memory[layer].flatten(1, 2)
        stored[0, slots] = key
        if self.shape.latent is None:
            stored[1, slots] = value
        keys, values = stored[0], stored[-1, ..., : self.shape.latent]
        starts, out = self._batch.starts.tolist(), query.new_empty(*query.shape[:-1], values.shape[-1])
        for index, length in enumerate(self._batch.lengths.tolist()):
            own = slice(starts[index], starts[index + 1])
            place = torch.arange(length)
            block = self._batch.tables[index].long()[place // self.shape.block_size]
            where = (block * self.shape.block_size + place % self.shape.block_size).to(key.device)
            mask = self._mask(index, own, place, window, extras.chunk).to(key.device)
            rows = (x.unsqueeze(0) for x in (query[own], keys[where], values[where]))
            out[own] = attend_rows(*rows, scale=scale, mask=mask[None, None], extras=extras)[0]
        return out

    def _mask(self, sequence: int, own: slice, place: Tensor, window: int | None, chunk: int | None) -> Tensor:
        """Which tokens of a sequence, at all its places [S], its new ones see: bool [T, S]."""
        first, masks = len(place) - (own.stop - own.start), self._batch.masks
        if masks is None or sequence not in masks.sequences:
            return causal_mask(place[first:], place, window, chunk)
        index = int(np.searchsorted(masks.sequences, sequence))
        before, position = int(masks.before[index]), place.clone()
        position[first:] = torch.from_numpy(masks.positions[own])
        seen = causal_mask(place[first:], place)
        seen[before - first :, before:] = torch.from_numpy(masks.matrix(index))
        if window is not None:
            seen &= (position[first:, None] - position).abs() < window
        if chunk is not None:
            seen &= position[first:, None] // chunk == position // chunk
        return seen

    def copy(self, sources: list[int], targets: list[int]) -> None:
        self._memory[:, :, targets] = self._memory[:, :, sources]

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        found = self._memory.flatten(2, 3)[:, :, slots.to(self.shape.device)].transpose(2, 3)
        return found[:, 0], found[:, -1, ..., : self.shape.latent]

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        tokens, where = self._memory.flatten(2, 3), slots.to(self.shape.device)
        tokens[:, 0, where] = keys.transpose(1, 2)
        if self.shape.latent is None:
            tokens[:, 1, where] = values.transpose(1, 2)


@policy("attention.paged", "reference")
class Reference(PagedAttention):
    """Gathers each sequence's keys and values and attends to them, one sequence at a time, on any device."""

    knows: ClassVar[frozenset[str]] = frozenset(NEEDS)

    def serves(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def open(self, shape: CacheShape) -> PagedCache:
        return ReferenceCache(shape)
