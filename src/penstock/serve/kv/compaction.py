"""Compresses the caches of sequences on the device."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as List

import numpy as np
import torch
from torch import Tensor

from penstock.ops.paged.contract import PagedCache
from penstock.ops.paged.view import Packed
from penstock.ops.paged.watch import Watch
from penstock.serve.kv.policies.contract import Cached, CachePolicy, Kept

#: Numbers of an attention matrix that are in memory at a time; layers that do not fit together are computed in turn. On
#: CPUs they stay in the processor's own memory.
SCORES = {"cpu": 1 << 22, "cuda": 1 << 26}

#: Numbers of keys and values that are; caches that do not fit together are compressed in turn.
VECTORS = 1 << 28


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

    Attributes:
        seconds: of the host that were spent on it so far; what was queued for a device may be computed later.
    """

    def __init__(self, cache: PagedCache, policy: CachePolicy) -> None:
        self.seconds = 0.0
        self._cache, self._policy = cache, policy
        self._most = SCORES.get(cache.shape.device.type, SCORES["cuda"])
        self._drawn = torch.zeros(0)
        self.resize()

    @classmethod
    def of(
        cls, cache: PagedCache, policy: CachePolicy, slots: int, tokens: int, tentative: int = 0
    ) -> Compactor | None:
        """One for a ``cache`` whose batches have up to ``slots`` sequences and ``tokens`` tokens, of which up to
        ``tentative`` of each sequence may be computed for nothing; None where the ``policy`` keeps all."""
        if not policy.compresses:
            return None
        if policy.watches:
            # A patient policy asks behind tokens that were taken back, whose queries are in the places of earlier ones.
            width = policy.watches + (tentative if policy.patient else 0)
            cache.watch = Watch(cache.shape, slots, width, tokens)
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

    def compact(self, works: List[Compaction]) -> None:
        """Compresses the caches of sequences: all that are due in a step, in a stage of its own before anything else is
        computed (FastCache [276]). What comes out is what one after the other would give, to the last bit where the
        product of two matrices does not depend on those beside it, as on CPUs. Those with equally many tokens are
        computed together, layer by layer, each head of each sequence by itself; all are read before any is written.

        Ours: which caches are compressed together is decided by what is due in a step, and caches of unequal lengths,
        which would need masks in every policy, are computed one after the other within the stage.
        """
        begun = time.perf_counter()
        for stage in self._stages(works):
            kept = [(alike, self._kept(alike)) for alike in self._alike(stage)]
            for alike, each in kept:
                self._write(alike, each)
        if works:
            self.seconds += time.perf_counter() - begun

    def _stages(self, works: List[Compaction]) -> Iterator[list[Compaction]]:
        """``works`` in order, in pieces that fit into memory, none of which touches what an earlier one of its piece
        writes, as it may where that one has lost its blocks again."""
        stage: list[Compaction] = []
        written: set[int] = set()
        share = 0.0
        for work in works:
            touched = {*self._blocks(work.sources), *self._blocks(work.targets)}
            if stage and (share + self._share(work) > 1 or not written.isdisjoint(touched)):
                yield stage
                stage, written, share = [], set(), 0.0
            stage.append(work)
            written.update(self._blocks(work.targets))
            share += self._share(work)
        if stage:
            yield stage

    def _alike(self, works: List[Compaction]) -> list[list[Compaction]]:
        """``works`` that can be computed together: as many tokens of each, as many that are kept, and as many queries,
        of which a short text has fewer. Where heads are laid together, each is by itself."""
        found: dict[tuple[int, ...], list[Compaction]] = {}
        for work in works:
            queries, view = min(self._policy.watches, work.computed), self._policy.view
            own = 0 if view is None or view.head_by_head else len(found)
            found.setdefault((len(work.sources), len(work.targets), work.packed, queries, own), []).append(work)
        return list(found.values())

    def _blocks(self, places: np.ndarray) -> list[int]:
        found: list[int] = np.unique(places // self._cache.shape.block_size).tolist()
        return found

    def _share(self, work: Compaction) -> float:
        """How much of what may be in memory at a time ``work`` takes."""
        shape, count = self._cache.shape, len(work.sources)
        scores = self._policy.watches * shape.heads * count
        return max(scores / self._most, 2 * shape.layers * shape.kv_heads * shape.head_dim * count / VECTORS)

    def _kept(self, works: List[Compaction]) -> Kept:
        """What is kept of caches of equal lengths: its rows are those of the first sequence's heads, then those of the
        next."""
        sources = self._joined([work.sources for work in works])
        keys, values = (_apart(each, len(works)) for each in self._cache.read(sources))
        missing: tuple[int, ...] = ()
        if packed := works[0].packed:
            keys, values = self._unpacked(keys, values, sources, packed)
            assert self._policy.view is not None
            missing = self._policy.view.missing(packed)
        drawn = self._read(sources, works)
        watched: Iterable[tuple[slice, Tensor | None]] = self._attention(keys, sources, works, missing)
        if self._policy.view is not None and self._cache.watch is not None:
            watched = [(slice(0, len(keys)), torch.cat([each for _, each in watched if each is not None]))]
        computed = works[0].computed
        kept = [
            self._policy.compress(
                Cached(keys[own], values[own], attention, None if drawn is None else drawn[own], computed, missing),
                len(works[0].targets),
            )
            for own, attention in watched
        ]
        remembered = [each.drawn for each in kept if each.drawn is not None]
        return Kept(
            torch.cat([each.keys for each in kept]),
            torch.cat([each.values for each in kept]),
            torch.cat(remembered) if self._policy.remembers else None,
            torch.cat([each.aside for each in kept if each.aside is not None]) if self._cache.aside else None,
        )

    def _write(self, works: List[Compaction], kept: Kept) -> None:
        targets = self._joined([work.targets for work in works])
        self._cache.write(targets, _end_to_end(kept.keys, len(works)), _end_to_end(kept.values, len(works)))
        if kept.aside is not None and self._cache.aside is not None:
            self._cache.aside.write(targets, kept.aside)
        if kept.drawn is not None:
            self._drawn[:, :, targets] = _end_to_end(kept.drawn, len(works))

    def _joined(self, places: List[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(places)).to(self._cache.shape.device)

    def _unpacked(self, keys: Tensor, values: Tensor, slots: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Those [layers, K, n, D] of all tokens in places with ``keys`` and ``values`` [layers, K, m, D], which are in
        ``slots``, and of which so many tokens share the first."""
        view = self._policy.view
        assert view is not None
        restored = view.restored(Packed.of(keys, values, tokens, self._cache.fetch(slots)))
        first = view.places(tokens)
        early, late = zip(restored, (keys[:, :, first:], values[:, :, first:]), strict=True)
        return torch.cat(early, 2), torch.cat(late, 2)

    def _read(self, sources: Tensor, works: List[Compaction]) -> Tensor | None:
        """What is remembered of the tokens: float32 [layers, S * K, n]."""
        if not self._policy.remembers:
            return None
        drawn = _apart(self._drawn[:, :, sources], len(works))
        for work, own in zip(works, drawn.chunk(len(works), 1), strict=True):  # of what has come since
            own[:, :, work.known :] = 0
        return drawn

    def _attention(
        self, keys: Tensor, sources: Tensor, works: List[Compaction], missing: tuple[int, ...]
    ) -> Iterator[tuple[slice, Tensor | None]]:
        """Layers, and in these the attention of the last queries, as of :class:`Cached`."""
        watch, layers, count = self._cache.watch, len(keys), len(works)
        if watch is None:
            yield slice(0, layers), None
            return
        queries = torch.stack([watch.read(work.slot, work.computed, self._policy.watches) for work in works], 1)
        each = max(1, self._most // (queries[0].numel() // queries.shape[-1] * keys.shape[2]))
        for first in range(0, layers, each):
            own = slice(first, first + each)
            slots = sources.view(count, -1)
            told = self._cache.looks(own, queries[own], watch.scales[own], slots, works[0].packed)
            if told is not None:
                yield own, told.view(len(told), keys.shape[1], *told.shape[3:])
                continue
            scales = torch.tensor(watch.scales[own], device=keys.device).repeat_interleave(count).view(-1, 1, 1, 1, 1)
            rows = keys[own].view(-1, keys.shape[1] // count, *keys.shape[2:])
            gone = torch.tensor(missing[own], device=keys.device).repeat_interleave(count) if missing else None
            found = attention(queries[own].flatten(0, 1), rows, scales, gone)
            yield own, found.view(-1, keys.shape[1], *found.shape[2:])


def _apart(rows: Tensor, count: int) -> Tensor:
    """Rows [layers, K, count * n, ...] of ``count`` sequences, end to end, as [layers, count * K, n, ...]."""
    return rows.view(*rows.shape[:2], count, -1, *rows.shape[3:]).transpose(1, 2).flatten(1, 2)


def _end_to_end(rows: Tensor, count: int) -> Tensor:
    """What :func:`_apart` was made of."""
    return rows.view(len(rows), count, -1, *rows.shape[2:]).transpose(1, 2).flatten(2, 3)


def attention(queries: Tensor, keys: Tensor, scales: Tensor | float, missing: Tensor | None = None) -> Tensor:
    """The attention float32 [L, K, q, n] of the last q tokens of a text, whose ``queries`` are [L, q, H, D], to the
    tokens with ``keys`` [L, K, n, D], averaged over the query heads that share a key head. The last q of the keys are
    those tokens' own, and the first ``missing`` [L] of them are of no tokens."""
    layers, count, heads, dim = queries.shape
    grouped = queries.float().view(layers, count, keys.shape[1], heads // keys.shape[1], dim)
    scores = torch.einsum("lqkgd,lknd->lkgqn", grouped, keys.float()) * scales
    hidden = torch.ones(count, keys.shape[2], dtype=torch.bool, device=keys.device).triu(keys.shape[2] - count + 1)
    if missing is not None:
        hidden = hidden | (torch.arange(keys.shape[2], device=keys.device) < missing.view(-1, 1, 1, 1, 1))
    return scores.masked_fill(hidden, -math.inf).softmax(-1).mean(2)
