"""Where blocks go that leave the pool: to the host's memory, and from there to disk."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Sequence as List
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

from penstock.core.pace import Pace
from penstock.serve.kv.disk import DiskBlocks

log = logging.getLogger(__name__)

#: Threads that read files, so many that a disk far away has enough to do, and threads that write.
READERS, WRITERS = 16, 4

#: Bytes that a thread is asked to read at once, where blocks are small.
AT_ONCE = 2**21

#: So many blocks from disk tell how fast it is; and each time that this speaks against it, it is taken to need that
#: share of the time, so that it is tried again some day.
LATELY, DOUBT = 256, 0.95


class Places(Protocol):
    """The memory of the host; see :class:`~penstock.serve.kv.host.HostBlocks`."""

    @property
    def places(self) -> int: ...

    @property
    def place_bytes(self) -> int: ...

    def save(self, blocks: List[int], places: List[int]) -> None: ...

    def load(self, places: List[int], blocks: List[int]) -> None: ...

    def content(self, place: int) -> memoryview: ...


class Done(NamedTuple):
    """What a worker has done: it wrote the block ``name`` (``whole`` is None), or was to read it to ``place``, where it
    is whole or not."""

    name: bytes
    place: int
    whole: bool | None


class DiskPace:
    """What a block from disk takes, as many threads read some at a time.

    Args:
        clock: says how many seconds have passed.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._pace, self._read, self._ended = Pace(LATELY), 0, 0.0

    @property
    def each(self) -> float:
        """Seconds for one; 0 where nothing was read."""
        return self._pace.each

    def now(self) -> float:
        """By the clock."""
        return self._clock()

    def add(self, begun: float) -> None:
        """A block whose reading had ``begun`` then is here."""
        with self._lock:
            ended = self._clock()
            # Several are read at a time: each second counts once.
            self._pace.add(max(0.0, ended - max(begun, self._ended)))
            self._ended, self._read = max(self._ended, ended), self._read + 1

    def above(self, seconds: float) -> bool:
        """Whether one takes more than that, as far as it shows while some are read: the first of all threads come
        together, and the first of these has taken as long as all of them."""
        return self._read >= READERS and self._pace.each > seconds

    def doubt(self) -> None:
        """It was held against the disk."""
        with self._lock:
            self._pace.doubt(DOUBT)


class Fetch:
    """What is read from disk for one text.

    Args:
        pace: of the disk.
        seconds: in which a block is computed anew.
    """

    def __init__(self, pace: DiskPace, seconds: float) -> None:
        self._pace, self._seconds, self._ended = pace, seconds, False

    @property
    def ended(self) -> bool:
        """Whether what is left is sooner computed. What comes behind a block that was left is of no use: it ends once
        and for all."""
        if not self._ended and self._pace.above(self._seconds):
            log.debug(
                "the rest is computed, as a block from disk takes %.4f s, not %.4f", self._pace.each, self._seconds
            )
            self._ended = True
        return self._ended


class Tiers:
    """Blocks outside of the pool, by the names of their texts (:func:`~penstock.serve.kv.pool.name_behind`).

    What was used last stays in the host's memory. Where there is a disk, what comes there is written to it in the
    background, and read before it is needed (:meth:`fetch`). One thread owns the books; others only move bytes.

    Args:
        host: the host's memory.
        disk: the folder, if any.
        workers: who reads and writes files; None is threads, those that read apart from those that write: nobody waits
            until what is in memory has been written.
        space: says whose keys and values those on disk are, of the weights as they are now.
        clock: says how many seconds have passed.

    Attributes:
        pace: of the disk.
        host_hits, disk_hits: blocks that came back to the pool, and blocks that came from disk to the host.
    """

    def __init__(
        self,
        host: Places,
        disk: DiskBlocks | None = None,
        workers: Executor | None = None,
        space: Callable[[], str] = str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._host, self._disk, self._space = host, disk, space
        self._readers = workers or ThreadPoolExecutor(READERS, thread_name_prefix="penstock-kv-read")
        self._writers = workers or ThreadPoolExecutor(WRITERS, thread_name_prefix="penstock-kv-write")
        self._names: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(range(host.places - 1, -1, -1))
        #: Names of blocks whose places the disk reads from or writes to.
        self._writing: set[bytes] = set()
        self._reading: dict[bytes, Future[bool]] = {}
        self._done: SimpleQueue[Done] = SimpleQueue()
        self.pace = DiskPace(clock)
        self.host_hits = self.disk_hits = 0

    @property
    def lasting(self) -> bool:
        """Whether what is kept here outlives the engine."""
        return self._disk is not None

    @property
    def host_bytes(self) -> int:
        """That blocks take in the host's memory."""
        return (self._host.places - len(self._free)) * self._host.place_bytes

    @property
    def disk_bytes(self) -> int:
        """That blocks take on disk."""
        return 0 if self._disk is None else self._disk.bytes

    def keep(self, leaving: List[tuple[bytes, int]]) -> None:
        """Copies blocks of the pool, given with their names, those that end a text before what leads to them. What is
        here already is not copied, and where all places are in use by the disk, a block is lost."""
        self._collect()
        leaving = leaving[-self._host.places :]
        kept = {name for name, _ in leaving}
        fresh: dict[bytes, tuple[int, int]] = {}
        for name, block in leaving:
            if name in self._names:
                self._names.move_to_end(name)
            elif name not in self._reading and (place := self._take(kept)) is not None:
                self._names[name] = place
                fresh[name] = block, place
        if fresh:
            blocks, places = zip(*fresh.values(), strict=True)
            self._host.save(blocks, places)
        for name, (_, place) in fresh.items():
            self._write(name, place)

    def find(self, names: Iterable[bytes]) -> dict[bytes, int]:
        """The longest beginning of ``names`` that the host's memory has, with their places."""
        self._collect()
        found: dict[bytes, int] = {}
        for name in names:
            if name not in self._names:
                break
            found[name] = self._names[name]
        for name in reversed(found):
            self._names.move_to_end(name)
        return found

    def knows(self, name: bytes) -> bool:
        """Whether the block ``name`` is here, in the host's memory, on disk or on the way."""
        return name in self._names or name in self._reading or (self._disk is not None and name in self._disk)

    def load(self, places: List[int], blocks: List[int]) -> None:
        """Copies ``places`` that were just found to ``blocks`` of the pool."""
        self._host.load(places, blocks)
        self.host_hits += len(places)

    def fetch(self, names: Iterable[bytes], seconds: float = math.inf) -> list[Future[bool]]:
        """Begins to read those of ``names``, up to the first that is nowhere, that are on disk alone: half as many as
        there are places at most. A block is computed anew in so many ``seconds``: none is read where one lately took
        more than that to come, and no more of them once that shows. They can be found once what is returned is done."""
        self._collect()
        slow = self.pace.each > seconds
        under_way: list[Future[bool]] = []
        fresh: list[tuple[bytes, int]] = []
        kept: set[bytes] = set()
        for name in names:
            kept.add(name)
            if name in self._names:
                continue
            if name in self._reading:
                under_way.append(self._reading[name])
                continue
            count = len(self._reading) + len(fresh)
            if self._disk is None or name not in self._disk or 2 * count >= self._host.places:
                break
            if slow:
                log.debug("computed again, as a block from disk took %.4f s lately, not %.4f", self.pace.each, seconds)
                self.pace.doubt()
                break
            place = self._take(kept)
            if place is None:
                break
            fresh.append((name, place))
        return [*dict.fromkeys(under_way), *self._begin(fresh, Fetch(self.pace, seconds))]

    def _begin(self, blocks: List[tuple[bytes, int]], fetch: Fetch) -> Iterator[Future[bool]]:
        """Has ``blocks`` read to their places, so many at once that all threads have some."""
        together = max(1, min(AT_ONCE // self._host.place_bytes, -(-len(blocks) // READERS)))
        for first in range(0, len(blocks), together):
            some = blocks[first : first + together]
            reading = self._readers.submit(self._read, some, fetch)
            self._reading.update((name, reading) for name, _ in some)
            yield reading

    def forget(self) -> None:
        """Nothing that is kept here is known any more: the model's weights have changed. What is on disk stays there,
        for whoever has the weights that it was computed with."""
        while self._writing or self._reading:
            self._note(self._done.get())
        self._free += self._names.values()
        self._names.clear()
        if self._disk is not None:
            self._disk.enter(self._space())

    def close(self) -> None:
        """Waits for what is being read and written."""
        self._readers.shutdown()
        self._writers.shutdown()
        self._collect()

    def _take(self, kept: Collection[bytes]) -> int | None:
        """A place that is free, or that of a block which was not used for the longest time and is none of ``kept``."""
        if self._free:
            return self._free.pop()
        for name in self._names:
            if name not in self._writing and name not in kept:
                return self._names.pop(name)
        return None

    def _write(self, name: bytes, place: int) -> None:
        # Half of the places stay free for others, however slow the disk is.
        if self._disk is not None and name not in self._disk and 2 * len(self._writing) < self._host.places:
            self._writing.add(name)
            self._writers.submit(self._written, self._disk, name, place)

    def _written(self, disk: DiskBlocks, name: bytes, place: int) -> None:
        try:
            disk.write(name, self._host.content(place))
        finally:
            self._done.put(Done(name, place, None))

    def _read(self, blocks: List[tuple[bytes, int]], fetch: Fetch) -> bool:
        """Reads each of ``blocks`` to its place, until the ``fetch`` is ended; tells whether all are whole."""
        assert self._disk is not None
        whole, left = True, list(reversed(blocks))
        try:
            while left and not fetch.ended:
                (name, place), begun = left[-1], self.pace.now()
                found = self._disk.read(name, self._host.content(place))
                if found:
                    self.pace.add(begun)
                self._done.put(Done(name, place, found))
                left.pop()
                whole = whole and found
        finally:
            for name, place in left:
                self._done.put(Done(name, place, False))
        return whole and not left

    def _collect(self) -> None:
        """Takes note of what the workers have done."""
        while True:
            try:
                done = self._done.get_nowait()
            except Empty:
                return
            self._note(done)

    def _note(self, done: Done) -> None:
        """Puts it down in the books."""
        if done.whole is None:
            self._writing.discard(done.name)
            return
        del self._reading[done.name]
        self.disk_hits += done.whole
        if done.whole:
            self._names[done.name] = done.place
        else:
            self._free.append(done.place)
