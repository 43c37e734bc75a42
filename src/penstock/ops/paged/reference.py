"""The readable backend: one sequence after the other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from penstock.core import pages
from penstock.ops.attention import PLAIN, Extras, attend_rows, causal_mask
from penstock.ops.paged.aside import Aside
from penstock.ops.paged.codecs.contract import Codec
from penstock.ops.paged.contract import (
    ALL_LAYERS,
    NEEDS,
    CacheShape,
    PagedAttention,
    PagedBatch,
    PagedCache,
    slots_onward,
)
from penstock.ops.paged.residual import Rings
from penstock.ops.paged.view import Packed
from penstock.policy import policy


class ReferenceCache(PagedCache):
    """Keys and values as [layers, 2, blocks, block_size, K, n], or keys alone where they are latent; n numbers are what
    the codec stores for a vector. A sequence's keys and values are decoded each time that they are attended to."""

    def allocate(self) -> None:
        shape = self.shape
        count, dtype = shape.codec.stored(shape.head_dim, shape.dtype)
        if shape.view is not None and (each := shape.view.aside(shape.block_size)):
            self.aside = Aside(shape, each)
        # While nothing is served, the cache has one block, and no windows.
        self._rings = None if shape.residual is None or shape.blocks == 1 else Rings(shape)
        sizes = (shape.layers, shape.parts, shape.blocks, shape.block_size, shape.kv_heads, count)
        self._memory = pages.zeros(sizes, dtype, shape.device)

    def plan(self, batch: PagedBatch, lane: int = 0) -> None:
        super().plan(batch, lane)
        self._batch = batch
        if self._rings is not None:
            self._rings.plan(batch)

    @property
    def advances(self) -> bool:
        return True

    def advance(self, places: Tensor, more: Tensor, nowhere: int) -> None:
        batch, places, more = self._batch, places.cpu(), more.cpu()
        slots = slots_onward(batch.tables, places, more, self.shape.block_size, nowhere)
        self.plan(dataclasses.replace(batch, lengths=batch.lengths + more.int(), slots=slots))

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
        for part, vectors in enumerate((key, value)[: self.shape.parts]):
            stored[part, slots] = self.shape.codec.encode(vectors, self.shape.table(layer, part))
        starts, out = self._batch.starts.tolist(), query.new_empty(*query.shape[:-1], value.shape[-1])
        for index, length in enumerate(self._batch.lengths.tolist()):
            own = slice(starts[index], starts[index + 1])
            place = torch.arange(length)
            block = self._batch.tables[index].long()[place // self.shape.block_size]
            where = block * self.shape.block_size + place % self.shape.block_size
            if self._batch.packed is not None and (packed := int(self._batch.packed[index])):
                out[own] = self._attend_packed(layer, query[own], index, where, packed, scale)
                continue
            for rows, keys, values in self._read(layer, index, own, where.to(key.device), key, value):
                out[rows] = self._attend(index, rows, query[rows], keys, values, scale, window, extras)
        if self._rings is not None:
            for part, vectors in enumerate((key, value)[: self.shape.parts]):
                self._rings.write(layer, part, vectors)
        self.see_contexts(self._batch, layer, query, out, scale)
        self.weigh(self._batch, layer, query, scale, window, extras)
        return out

    def _read(
        self, layer: int, index: int, own: slice, where: Tensor, key: Tensor, value: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Of the new tokens of a sequence, the rows ``own``, whose places are in the slots ``where``: rows, and the
        keys and values [S, K, D] that these read, of all tokens up to the last of them."""
        keys, values = self._decoded(layer, where)
        residual, batch, rings = self.shape.residual, self._batch, self._rings
        if residual is None or rings is None or batch.rings is None or batch.since is None:
            yield own, keys, values
            return
        length, ring, since = len(where), int(batch.rings[index]), int(batch.since[index])
        computed = length - (own.stop - own.start)
        for begin, first, behind in residual.runs(computed, length, since):
            early = max(begin, computed)
            new = slice(own.start + early - computed, own.start + behind - computed)
            whole = []
            for part, coded, fresh in ((0, keys, key), (self.shape.parts - 1, values, value)):
                kept = rings.read(layer, part, ring, begin, early)[..., : coded.shape[-1]]
                whole.append(torch.cat([coded[:begin], kept, fresh[new]]))
            yield slice(own.start + first - computed, new.stop), whole[0], whole[1]

    def _attend(
        self,
        index: int,
        rows: slice,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        window: int | None,
        extras: Extras,
    ) -> Tensor:
        """Attention [T, H, D] of new tokens in a row, which are ``rows`` of the batch, to the ``keys`` and ``values``
        [S, K, D] of all tokens of their sequence up to the last of them."""
        length, found = len(keys), []
        dense = self._dense(index, len(query), length)
        if dense:
            mask = self._mask(index, rows, torch.arange(length), window, extras.chunk).to(query.device)[:dense]
            given = (x.unsqueeze(0) for x in (query[:dense], keys, values))
            found.append(attend_rows(*given, scale=scale, mask=mask[None, None], extras=extras)[0])
        if dense < len(query):
            assert self.shape.selection is not None
            rest = query[dense:]
            found.append(self.shape.selection.attend(rest, keys, values, length - len(rest), scale))
        return torch.cat(found)

    def _dense(self, index: int, count: int, length: int) -> int:
        """How many of the ``count`` new tokens of a sequence, which come first, read all before them."""
        if self._batch.given is None:
            return count
        given = int(self._batch.given[index])
        return min(max(0, given - (length - count)), count)

    def _attend_packed(self, layer: int, query: Tensor, index: int, where: Tensor, tokens: int, scale: float) -> Tensor:
        """Attention [T, H, D] of a sequence whose places are in the slots ``where``, of which so many ``tokens`` share
        the first."""
        view = self.shape.view
        assert view is not None
        own, on_device = slice(*self._batch.starts[index : index + 2].tolist()), where.to(query.device)
        packed = Packed(tokens, functools.partial(self._vectors, layer, on_device), self.fetch(where))
        rest, found = self._decoded(layer, on_device[view.places(tokens) :]), []
        behind = self._mask(index, own, torch.arange(len(rest[0])), None, None).to(query.device)
        for seen in view.seen(layer, query, packed, scale):
            keys, values = (
                torch.cat([early, late.expand(len(early), -1, -1, -1)], 1)
                for early, late in zip((seen.keys, seen.values), rest, strict=True)
            )
            mask = torch.nn.functional.pad(behind[seen.rows], (seen.keys.shape[1], 0), value=True)
            # Rows of a batch are queries that see the same.
            rows, seen_by = (each.reshape(len(keys), -1, *each.shape[1:]) for each in (query[seen.rows], mask))
            found.append(attend_rows(rows, keys, values, scale=scale, mask=seen_by.unsqueeze(1)).flatten(0, 1))
        return torch.cat(found)

    def _decoded(self, layer: int, where: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values [S, K, D] of the tokens in the slots ``where``."""
        places = torch.arange(len(where))
        found = [self._vectors(layer, where, part, layer, places) for part in range(self.shape.parts)]
        return found[0], found[-1][..., : self.shape.latent]

    def _vectors(self, layer: int, where: Tensor, part: int, layers: Tensor | int, places: Tensor) -> Tensor:
        """The keys (0) or values (1) [n, K, D] that lie in ``layers`` at ``places`` of a sequence in the slots
        ``where``, decoded as ``layer``'s."""
        shape, stored = self.shape, self._memory.flatten(2, 3)[layers, part, where[places]]
        return shape.codec.decode(stored, shape.head_dim, shape.dtype, shape.table(layer, part))

    def _mask(self, sequence: int, own: slice, place: Tensor, window: int | None, chunk: int | None) -> Tensor:
        """Which tokens of a sequence, at all its places [S], its new ones see: bool [T, S]."""
        first, masks = len(place) - (own.stop - own.start), self._batch.masks
        if masks is None or sequence not in masks.sequences:
            return causal_mask(place[first:], place, window, chunk)
        index = int(np.searchsorted(masks.sequences, sequence))
        # Where tokens share places, there are more of them before the mask than it says.
        more = len(place) - int(self._batch.lengths[sequence])
        before, position = int(masks.before[index]) + more, place.clone()
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
        if self.aside is not None:
            self.aside.copy(sources, targets)

    def codes(self, slots: Tensor, layers: slice = ALL_LAYERS) -> list[Tensor]:
        found = self._memory[layers].flatten(2, 3)[:, :, slots.to(self.shape.device)].transpose(2, 3)
        return list(found.unbind(1))

    def put(self, slots: Tensor, codes: Sequence[Tensor]) -> None:
        tokens, where = self._memory.flatten(2, 3), slots.to(self.shape.device)
        for part, own in enumerate(codes):
            tokens[:, part, where] = own.transpose(1, 2)


@policy("attention.paged", "reference")
class Reference(PagedAttention):
    """Gathers each sequence's keys and values and attends to them, one sequence at a time, on any device, in any
    codec."""

    knows: ClassVar[frozenset[str]] = frozenset(NEEDS)

    def serves(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def reads(self, codec: Codec) -> str | None:
        return None

    def open(self, shape: CacheShape) -> PagedCache:
        return ReferenceCache(shape)
