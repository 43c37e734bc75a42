"""Caches of contexts by themselves, and how they come to where the contexts stand in a prompt.

A context that a request computes as a whole is copied to blocks of its own, which the prefix tree knows by a name for
all that their content depends on; nobody holds them, so that they are evicted, and go to the tiers, as all others. What
else has to be known of it, :class:`~penstock.serve.kv.reuse.contract.ChunkCache`, is kept here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as List
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from penstock.serve.kv.moving import Move
from penstock.serve.kv.pool import BlockPool, name_behind, numbers_of
from penstock.serve.kv.reuse.contract import ChunkCache, Neighbour, Reuse
from penstock.serve.kv.tiers import Tiers


@dataclasses.dataclass(eq=False)
class Chunk:
    """A context where it stands in a prompt.

    Attributes:
        name: says what its tokens are, and by which adapter they are computed.
        tokens: its own.
        start: the position of the first.
        before: what stands before it.
        behind: a name for all that its keys and values depend on, its own tokens aside.
        cache: of which it is taken; None where it is computed.
        settled: whether it was decided which. It stays so when the request was preempted.
        mark: the name of what is cached of it, where it is computed and cached; empty elsewhere.
        drawn: what its tokens look at, see :attr:`ChunkCache.drawn`, and NaN where that is not known yet; None where
            nobody asks.
    """

    name: bytes
    tokens: list[int]
    start: int
    before: tuple[Neighbour, ...]
    behind: bytes = b""
    cache: ChunkCache | None = None
    settled: bool = False
    mark: bytes = b""
    drawn: np.ndarray | None = None

    @property
    def end(self) -> int:
        """The position behind its last token."""
        return self.start + len(self.tokens)

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where the texts before it begin, and where it does."""
        return *(each.start for each in self.before), self.start

    def within(self, start: int, end: int) -> tuple[int, int]:
        """Where its tokens among those at [start, end) begin and end."""
        return max(start, self.start), min(end, self.end)

    def asks(self, start: int, end: int) -> bool:
        """Whether it is to be learned what some of the tokens at [start, end) look at."""
        return self.drawn is not None and bool(self.before) and self.start < end and start < self.end

    def learn(self, first: int, drawn: np.ndarray) -> None:
        """What its tokens from the position ``first`` on look at."""
        if self.drawn is not None:
            self.drawn[first - self.start :][: len(drawn)] = drawn


def chunks_of(prompt: List[int], ends: List[int], root: bytes) -> tuple[Chunk, ...]:
    """The contexts of a ``prompt``: the first begins at ``ends[0]``, and each of them ends where the next begins.
    ``root`` is a name for what computes them."""
    chunks: list[Chunk] = []
    before = [Neighbour(name_behind(root, prompt[: ends[0]]), 0, ends[0])] if ends[0] else []
    for start, end in itertools.pairwise(ends):
        name = name_behind(root, prompt[start:end])
        chunks.append(Chunk(name, [*prompt[start:end]], start, tuple(before)))
        before.append(Neighbour(name, start, end - start))
    return tuple(chunks)


class Taken(NamedTuple):
    """What is taken of a cache: the ``blocks`` of it, and the places in the ``chunk`` of those tokens that are not
    computed again, int64, ascending. ``whole`` says that this is all of it, as it would be computed."""

    chunk: Chunk
    cache: ChunkCache
    blocks: list[int]
    places: np.ndarray
    whole: bool


class Chunks:
    """Which contexts are cached.

    Args:
        pool: where their blocks are.
        policy: says what is computed again.
        take: gives blocks of the pool, so many as are available.
        tiers: where evicted ones go.

    Attributes:
        holding: blocks that are read or written by what is moved next.
    """

    def __init__(
        self, pool: BlockPool, policy: Reuse, take: Callable[[int], list[int]], tiers: Tiers | None = None
    ) -> None:
        self._pool, self._policy, self._take, self._tiers = pool, policy, take, tiers
        self._caches: OrderedDict[bytes, ChunkCache] = OrderedDict()
        self._awaited: set[bytes] = set()
        self._moves: list[Move] = []
        self._keeps: list[Move] = []
        self.holding: list[list[int]] = []

    # What is taken

    def find(self, chunks: List[Chunk], computed: int, spare: int) -> list[Taken]:
        """What is taken of caches for ``chunks`` of a prompt, whose first ``computed`` tokens are there. The blocks
        have one holder more, and ``spare`` others stay available. Of the others, it is noted what is to be learned."""
        found, behind = [], chunks[0].before[0].name if chunks[0].before else b""
        for chunk in chunks:
            chunk.behind = behind
            taken = self._taken(chunk, computed, spare) if chunk.end > computed else None
            chunk.settled = True
            behind = name_behind(behind + chunk.name, ())
            if taken is not None:
                found.append(taken)
                if not taken.whole:
                    behind = name_behind(behind + taken.cache.mark, taken.places.tolist())
            elif chunk.start >= computed and chunk.drawn is None and chunk.name not in self._caches:
                chunk.drawn = np.full((len(chunk.tokens), len(chunk.before)), np.nan, np.float32)
        return found

    def _taken(self, chunk: Chunk, computed: int, spare: int) -> Taken | None:
        cache = self._caches.get(chunk.name)
        if cache is None:
            return None
        same = cache.behind == chunk.behind
        if not same and (chunk.start < computed or (chunk.settled and chunk.cache is not cache)):
            return None
        places = np.arange(max(0, computed - chunk.start), len(chunk.tokens))
        if not same:
            places = np.setdiff1d(places, self._policy.renewed(cache, chunk.start, chunk.before))
        if not places.size:
            return None
        if not self._remains(cache):
            del self._caches[chunk.name]
            return None
        blocks = self._hold(cache, spare)
        if not blocks:
            return None
        chunk.cache, chunk.drawn = cache, None
        self._caches.move_to_end(chunk.name)
        return Taken(chunk, cache, blocks, places, same)

    def _hold(self, cache: ChunkCache, spare: int) -> list[int]:
        """The blocks of ``cache``, with one holder more, brought back where they left; none where there is no room."""
        pieces, names = self._listed(cache)
        found = self._pool.follow(pieces)
        self._pool.share(found)
        missing, blocks = len(pieces) - len(found), []
        if missing + spare <= self._pool.available and self._here(names[len(found) :]) is not None:
            blocks = self._take(missing)
            # What left the pool for these may have taken places of what was there.
            places = self._here(names[len(found) :])
            if places is not None and self.busy.isdisjoint(blocks):
                if self._tiers is not None and missing:
                    self._tiers.load(places, blocks)
                self._commit(pieces[len(found) :], blocks, found[-1] if found else None)
                return found + blocks
        self._pool.release(blocks)
        self._pool.release(found)
        return []

    def _here(self, names: List[bytes]) -> list[int] | None:
        """Where the blocks called ``names`` are in the host's memory; None where one is not, but on disk at most."""
        places = [*self._tiers.find(names).values()] if self._tiers is not None and names else []
        return places if len(places) == len(names) else None

    def _commit(self, pieces: List[list[int]], blocks: list[int], last: int | None = None) -> None:
        node = self._pool.node_of(last)
        for tokens, block in zip(pieces, blocks, strict=True):
            node = self._pool.commit(node, tokens, block)

    def _listed(self, cache: ChunkCache) -> tuple[list[list[int]], list[bytes]]:
        """The blocks of ``cache`` as the prefix tree knows them, and their names."""
        pieces = [*_pieces(cache.mark, cache.tokens, self._pool.block_size)]
        return pieces, [*itertools.accumulate(pieces, name_behind, initial=b"")][1:]

    def _remains(self, cache: ChunkCache) -> bool:
        """Whether ``cache`` has not left the pool and all tiers, as far as is seen from its first block that has."""
        pieces, names = self._listed(cache)
        found = len(self._pool.follow(pieces))
        return found == len(pieces) or (self._tiers is not None and self._tiers.knows(names[found]))

    def fetch(self, chunks: Iterable[Chunk]) -> list[Future[bool]]:
        """Begins to read from disk what may be taken for ``chunks``."""
        coming: list[Future[bool]] = []
        for chunk in chunks:
            cache = self._caches.get(chunk.name)
            if cache is not None and self._tiers is not None:
                pieces, names = self._listed(cache)
                coming += self._tiers.fetch(names[len(self._pool.follow(pieces)) :])
        return coming

    def room(self, chunks: Iterable[Chunk]) -> int:
        """Blocks that are available before those are held that ``chunks`` are taken from, and not then."""
        caches = [cache for chunk in chunks if (cache := self._caches.get(chunk.name)) is not None]
        found = [(len(pieces), self._pool.follow(pieces)) for pieces, _ in map(self._listed, caches)]
        return sum(count - len(blocks) + self._pool.idle_among(blocks) for count, blocks in found)

    def move(self, taken: Taken, places: np.ndarray) -> None:
        """Before the next step, what is ``taken`` is moved to where its tokens belong: to the ``places`` in the memory
        int64 [n]. Then the blocks are let go of."""
        size, cache = self._pool.block_size, taken.cache
        sources = np.array(taken.blocks, np.int64)[taken.places // size] * size + taken.places % size
        self._moves.append(Move(sources, places, cache.start + taken.places, taken.chunk.start + taken.places))
        self.holding.append(taken.blocks)

    # What is kept

    def keep(self, chunks: Iterable[Chunk], places: np.ndarray) -> None:
        """The next step computes the last of ``chunks``, whose prompt's tokens are at ``places`` in the memory. Those
        that nobody has cached are copied behind it, as far as blocks are available."""
        size = self._pool.block_size
        for chunk in chunks:
            count = -(-len(chunk.tokens) // size)
            if chunk.drawn is None or chunk.name in self._caches or chunk.name in self._awaited:
                continue
            if count > self._pool.available:
                continue
            chunk.mark = name_behind(chunk.behind + chunk.name, ())
            self._awaited.add(chunk.name)
            pieces = [*_pieces(chunk.mark, chunk.tokens, size)]
            blocks = self._take(count)
            self._commit(pieces, blocks)
            targets = (np.array(blocks, np.int64)[:, None] * size + np.arange(size)).reshape(-1)[: len(chunk.tokens)]
            positions = np.arange(chunk.start, chunk.end)
            self._keeps.append(Move(places[positions], targets, positions, positions))
            self.holding.append(blocks)

    def learn(self, chunks: Iterable[Chunk]) -> None:
        """All is known of ``chunks`` whose prompt was computed: those that were kept can be taken from now on."""
        for chunk in chunks:
            if chunk.mark and chunk.name in self._awaited:
                self._awaited.discard(chunk.name)
                if chunk.drawn is not None and not np.isnan(chunk.drawn).any():
                    self._tidy()
                    given = chunk.tokens, chunk.start, chunk.behind, chunk.mark, chunk.before, chunk.drawn
                    self._caches[chunk.name] = ChunkCache(*given)
            chunk.drawn = None

    def _tidy(self) -> None:
        """Forgets two contexts, of those that were used least recently, if they have left the pool and all tiers."""
        for name in list(self._caches)[:2]:
            self._caches.move_to_end(name)
            if not self._remains(self._caches[name]):
                del self._caches[name]

    def told(self) -> tuple[list[Move], list[Move]]:
        """What has to be moved before the next step, and behind it. It is told once, when the step is launched next."""
        told, self._moves, self._keeps = (self._moves, self._keeps), [], []
        for blocks in self.holding:
            self._pool.release(blocks)
        self.holding = []
        return told

    @property
    def busy(self) -> set[int]:
        """Blocks that are read or written by what is moved next."""
        places = [each for move in (*self._moves, *self._keeps) for each in (move.sources, move.targets)]
        return set(np.unique(np.concatenate(places) // self._pool.block_size).tolist()) if places else set()

    def forget(self) -> None:
        """What was cached is void."""
        self.told()
        self._caches.clear()
        self._awaited.clear()


def _pieces(mark: bytes, tokens: List[int], size: int) -> Iterator[list[int]]:
    """The blocks of a context as the prefix tree knows them: the first is marked by two negative numbers."""
    for start in range(0, len(tokens), size):
        yield [*(() if start else numbers_of(mark)), *tokens[start : start + size]]
