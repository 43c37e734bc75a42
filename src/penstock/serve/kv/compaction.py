"""Compresses the caches of sequences on the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from penstock.ops.paged.contract import PagedCache
from penstock.ops.paged.view import Packed
from penstock.ops.paged.watch import Watch
from penstock.serve.kv.policies.contract import Cached, CachePolicy

#: Numbers of an attention matrix that are in memory at a time; layers that do not fit together are computed in turn.
SCORES = 1 << 26


@dataclasses.dataclass(frozen=True)
class Compaction:
    """A cache that is compressed, as data.

    Attributes:
        slot: of the sequence.
        computed: tokens of its text that are.
        known: of how many of the first tokens in the cache a number is remembered.
        packed: how many tokens share the first places, see :meth:`CachePolicy.packed`.
        sources: int64 [n], the places in the memory where its tokens are, see :attr:`PagedBatch.slots`.
        targets: int64 [m], where those that are kept go.
    """

    slot: int
    computed: int
    known: int
    packed: int
    sources: np.ndarray
    targets: np.ndarray


class Compactor:
    """Applies a ``policy`` to the caches of sequences.

    Args:
        cache: of the model, with a watch where the policy asks for queries.
        policy: says what stays.
    """

    def __init__(self, cache: PagedCache, policy: CachePolicy) -> None:
        self._cache, self._policy = cache, policy
        self._drawn = torch.zeros(0)
        self.resize()

    @classmethod
    def of(cls, cache: PagedCache, policy: CachePolicy, slots: int, tokens: int) -> Compactor | None:
        """One for a ``cache`` whose batches have up to ``slots`` sequences and ``tokens`` tokens; None where the
        ``policy`` keeps all."""
        if not policy.compresses:
            return None
        if policy.watches:
            cache.watch = Watch(cache.shape, slots, policy.watches, tokens)
        return cls(cache, policy)

    def resize(self) -> None:
        """The cache has another number of blocks: nothing is remembered."""
        shape = self._cache.shape
        if self._policy.remembers:
            places = shape.blocks * shape.block_size
            self._drawn = torch.zeros(shape.layers, shape.kv_heads, places, device=shape.device)

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Whole blocks were copied."""
        if self._policy.remembers:
            blocks = self._drawn.view(*self._drawn.shape[:2], -1, self._cache.shape.block_size)
            blocks[:, :, targets] = blocks[:, :, sources]

    def compact(self, work: Compaction) -> None:
        """Compresses the cache of a sequence. All that it has is read before anything is written."""
        sources, targets = (
            torch.from_numpy(each).to(self._cache.shape.device) for each in (work.sources, work.targets)
        )
        keys, values = self._cache.read(sources)
        if work.packed:
            keys, values = self._unpacked(keys, values, sources, work.packed)
        drawn = self._read(sources, work.known)
        kept = [
            self._policy.compress(
                Cached(keys[own], values[own], attention, None if drawn is None else drawn[own]), len(targets)
            )
            for own, attention in self._attention(keys, work)
        ]
        self._cache.write(targets, torch.cat([each.keys for each in kept]), torch.cat([each.values for each in kept]))
        if self._cache.aside is not None:
            self._cache.aside.write(targets, torch.cat([each.aside for each in kept if each.aside is not None]))
        if self._policy.remembers:
            self._drawn[:, :, targets] = torch.cat([each.drawn for each in kept if each.drawn is not None])

    def _unpacked(self, keys: Tensor, values: Tensor, slots: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Those [layers, K, n, D] of all tokens in places with ``keys`` and ``values`` [layers, K, m, D], which are in
        ``slots``, and of which so many tokens share the first."""
        view = self._policy.view
        assert view is not None
        restored = view.restored(Packed.of(keys, values, tokens, self._cache.fetch(slots)))
        first = view.places(tokens)
        early, late = zip(restored, (keys[:, :, first:], values[:, :, first:]), strict=True)
        return torch.cat(early, 2), torch.cat(late, 2)

    def _read(self, sources: Tensor, known: int) -> Tensor | None:
        """What is remembered of the tokens: float32 [layers, K, n]."""
        if not self._policy.remembers:
            return None
        drawn = self._drawn.new_zeros(*self._drawn.shape[:2], len(sources))
        drawn[:, :, :known] = self._drawn[:, :, sources[:known]]
        return drawn

    def _attention(self, keys: Tensor, work: Compaction) -> Iterator[tuple[slice, Tensor | None]]:
        """Layers, and in these the attention of the last queries, as of :class:`Cached`."""
        watch, layers = self._cache.watch, len(keys)
        if watch is None:
            yield slice(0, layers), None
            return
        queries = watch.read(work.slot, work.computed)
        each = max(1, SCORES // (queries[0].numel() // queries.shape[-1] * keys.shape[2]))
        for first in range(0, layers, each):
            own = slice(first, first + each)
            scales = torch.tensor(watch.scales[own], device=keys.device).view(-1, 1, 1, 1, 1)
            yield own, attention(queries[own], keys[own], scales)


def attention(queries: Tensor, keys: Tensor, scales: Tensor | float) -> Tensor:
    """The attention float32 [L, K, q, n] of the last q tokens of a text, whose ``queries`` are [L, q, H, D], to the
    tokens with ``keys`` [L, K, n, D], averaged over the query heads that share a key head. The last q of the keys are
    those tokens' own."""
    layers, count, heads, dim = queries.shape
    grouped = queries.float().view(layers, count, keys.shape[1], heads // keys.shape[1], dim)
    scores = torch.einsum("lqkgd,lknd->lkgqn", grouped, keys.float()) * scales
    hidden = torch.ones(count, keys.shape[2], dtype=torch.bool, device=keys.device).triu(keys.shape[2] - count + 1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1).mean(2)
