"""The asyncio side of an engine that runs in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, Self

import numpy as np

from penstock.core.channel import HEADER, framed, length
from penstock.core.errors import PenstockError, UsageError
from penstock.core.events import Event
from penstock.serve.config import EngineConfig
from penstock.serve.link.starting import Starting
from penstock.serve.link.wire import Done, Errand, Failed, Message, News, Open, Ready, Refused, body, parse
from penstock.serve.messages import Abort, Act, Control, Delta, Embed, Request, Snapshot, Vectors, described

log = logging.getLogger(__name__)

#: Seconds that a dying process may take to end by itself.
GRACE = 5.0


class EngineDiedError(PenstockError):
    """The engine's process ended, or had to be ended, while it was needed."""


class Watcher(Protocol):
    """Somebody who looks on."""

    def see(self, events: Sequence[Event], snapshot: Snapshot | None) -> None:
        """Takes in what was decided since the last call, and the engine's newest state where it is new."""


def show(watchers: Sequence[Watcher], events: Sequence[Event], snapshot: Snapshot | None) -> None:
    """Shows news to ``watchers``; one that fails keeps nobody from the answers."""
    for watcher in watchers:
        try:
            watcher.see(events, snapshot)
        except Exception:
            log.exception("%s cannot take in what the engine decided", type(watcher).__name__)


#: What an engine says to whoever asked it for something.
Answer = Delta | Vectors | Done | PenstockError


class EngineClient:
    """Talks to an engine's process. Made by :meth:`open`; used in one event loop.

    Attributes:
        ready: what the engine said of itself.
        snapshot: its newest state.
        watchers: they see its decisions, as they are told.
        failure: why it is dead; None while it lives.
        dead: set once it is.
        pid: of the process.
    """

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._process, self._reader, self._writer = process, reader, writer
        self._queues: dict[str, asyncio.Queue[Answer]] = {}
        self._left: dict[str, int] = {}
        self._changed = asyncio.Condition()
        self._heard = time.monotonic()
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []
        self.watchers: list[Watcher] = []
        self.failure: EngineDiedError | None = None
        self.dead = asyncio.Event()
        self.ready: Ready
        self.snapshot: Snapshot

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def open(
        cls,
        model: str,
        config: EngineConfig,
        device: str = "auto",
        patience: float = 300.0,
        environment: Mapping[str, str] = MappingProxyType({}),
        starting: Starting | None = None,
    ) -> Self:
        """Starts a process, unless one is ``starting`` already, and loads ``model`` in it.

        Args:
            patience: seconds after which an engine that has work, and says nothing, is taken for dead.
            environment: variables of the process, beside those of this one.

        Raises:
            PenstockError: the model cannot be had, or does not fit.
            EngineDiedError: the process ended.
        """
        begun = starting or Starting(environment)
        client = cls(begun.process, *await asyncio.open_unix_connection(sock=begun.socket))
        try:
            await client._begin(Open(str(model), config.model_dump_json(), device))
        except BaseException:
            await client.close()
            raise
        client._tasks = [asyncio.create_task(client._listen()), asyncio.create_task(client._watch(patience))]
        return client

    async def _begin(self, wanted: Open) -> None:
        await self._send(wanted)
        first = await self._receive()
        if isinstance(first, Failed):
            raise (UsageError if first.exit_code == UsageError.exit_code else PenstockError)(
                first.what, hint=first.hint
            )
        second = await self._receive()
        if not isinstance(first, Ready) or not isinstance(second, News) or second.snapshot is None:
            raise await self._post_mortem()
        self.ready, self.snapshot = first, second.snapshot
        for rank, memory in enumerate(first.memory):
            of = f" of rank {rank}" if len(first.memory) > 1 else ""
            log.info("the engine's memory%s: %s", of, described(memory))

    # Requests

    @property
    def outstanding(self) -> int:
        """Continuations that are under way or wait."""
        return sum(self._left.values())

    async def stream(self, *requests: Request) -> AsyncGenerator[Delta]:
        """News of ``requests`` until all their continuations have ended. Closing the iterator before aborts them.

        Raises:
            UsageError: the engine does not take one of them; the others are aborted.
            EngineDiedError: the engine is dead, or died meanwhile.
        """
        if self.failure is not None:
            raise self.failure
        queue: asyncio.Queue[Answer] = asyncio.Queue()
        for request in requests:
            self._queues[request.id], self._left[request.id] = queue, request.sampling.continuations
        try:
            for request in requests:
                await self._send(request)
            while any(self._left[request.id] for request in requests):
                news = await queue.get()
                if isinstance(news, PenstockError):
                    raise news
                assert isinstance(news, Delta)
                self._left[news.id] -= news.finish is not None
                yield news
        finally:
            for request in requests:
                del self._queues[request.id]
                if self._left.pop(request.id):
                    self.abort(request.id)

    async def run(self, errand: Errand) -> str:
        """What comes of ``errand``, as JSON. Cancelling it ends the work.

        Raises:
            UsageError: it is refused.
            EngineDiedError: the engine is dead, or died meanwhile.
        """
        if self.failure is not None:
            raise self.failure
        id = errand.request.id
        self._queues[id], self._left[id] = asyncio.Queue(), 1
        try:
            await self._send(errand)
            news = await self._queues[id].get()
            self._left[id] = 0
            if isinstance(news, PenstockError):
                raise news
            assert isinstance(news, Done)
            return news.result
        finally:
            del self._queues[id]
            if self._left.pop(id):
                self.abort(id)

    async def embed(self, id: str, texts: Sequence[list[int]], seconds: list[int] | None = None) -> np.ndarray:
        """The vectors float32 [n, size] of ``texts``, which are tokens; of pairs, the second text of each begins with
        its token number ``seconds``. Cancelling it aborts the request ``id``.

        Raises:
            UsageError: the engine does not take it.
            EngineDiedError: the engine is dead, or died meanwhile.
        """
        if self.failure is not None:
            raise self.failure
        queue = asyncio.Queue[Answer]()
        self._queues[id], self._left[id] = queue, 1
        size, missing = 0 if self.ready.vectors is None else self.ready.vectors.size, len(texts)
        found = np.empty((len(texts), size), np.float32)
        try:
            await self._send(Embed(id, list(texts), seconds))
            while missing:
                news = await queue.get()
                if isinstance(news, PenstockError):
                    raise news
                assert isinstance(news, Vectors)
                found[news.places] = np.frombuffer(news.rows, np.float32).reshape(len(news.places), -1)
                missing -= len(news.places)
            return found
        finally:
            del self._queues[id], self._left[id]
            if missing:
                self.abort(id)

    async def control(self, id: str, act: Act, folder: str = "", version: int | None = None, name: str = "") -> None:
        """Has the engine do what an operator says, and waits until that is done; :attr:`snapshot` tells of it then.

        Raises:
            PenstockError: the engine does not do it.
            EngineDiedError: the engine is dead, or died meanwhile.
        """
        if self.failure is not None:
            raise self.failure
        queue = self._queues[id] = asyncio.Queue[Answer]()
        try:
            await self._send(Control(id, act, folder, version, name))
            news = await queue.get()
            if isinstance(news, PenstockError):
                raise news
        finally:
            del self._queues[id]

    def abort(self, id: str, index: int | None = None) -> None:
        """Ends a request, or only its continuation ``index``, or an errand, if it is still there. Does not wait."""
        if self.failure is None:
            self._writer.write(framed(body(Abort(id, index))))

    def abandon(self, reason: PenstockError) -> None:
        """Ends all streams with ``reason``, which aborts their requests."""
        for queue in self._queues.values():
            queue.put_nowait(reason)

    async def snapshots(self, every: float) -> AsyncGenerator[Snapshot]:
        """The engine's state, again whenever it changed, and after ``every`` seconds at the latest; ends when the
        engine dies."""
        while self.failure is None:
            yield self.snapshot
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), every)

    # The process

    async def close(self) -> None:
        """Ends the process; what was under way is lost."""
        self._closing = True
        self._writer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._buried()

    def kill(self) -> None:
        """Ends the process at once, as if it had died."""
        self._process.kill()

    async def _buried(self) -> int:
        """The exit status of the process, which gets some seconds to end by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return await asyncio.to_thread(self._process.wait, GRACE)
        self._process.kill()
        return await asyncio.to_thread(self._process.wait)

    async def _send(self, message: Message) -> None:
        with contextlib.suppress(ConnectionError):  # the listener notices the end, and says why
            self._writer.write(framed(body(message)))
            await self._writer.drain()

    async def _receive(self) -> Message | None:
        try:
            message = parse(await self._reader.readexactly(length(await self._reader.readexactly(HEADER.size))))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        self._heard = time.monotonic()
        return message

    async def _listen(self) -> None:
        while (message := await self._receive()) is not None:
            if isinstance(message, News):
                if message.snapshot is not None:
                    self.snapshot = message.snapshot
                if message.events or message.snapshot is not None:
                    show(self.watchers, message.events, message.snapshot)
                for delta in message.deltas:
                    self._hand(delta.id, delta)
                if message.snapshot is not None:
                    async with self._changed:
                        self._changed.notify_all()
            elif isinstance(message, Vectors | Done):
                self._hand(message.id, message)
            elif isinstance(message, Refused):
                self._hand(message.id, (PenstockError if message.defect else UsageError)(message.what))
            elif isinstance(message, Failed):
                await self._buried()
                await self._die(EngineDiedError(message.what, hint=message.hint))
                return
        await self._die(await self._post_mortem())

    def _hand(self, id: str, news: Answer) -> None:
        # Nobody listens any more to a request that was aborted meanwhile.
        if id in self._queues:
            self._queues[id].put_nowait(news)

    async def _watch(self, patience: float) -> None:
        """Kills an engine that has had work for ``patience`` seconds and said nothing."""
        idle_since = time.monotonic()
        while True:
            await asyncio.sleep(min(1.0, patience / 4))
            now = time.monotonic()
            if not self._queues or self.snapshot.paused or self.snapshot.asleep:
                idle_since = now
            elif now - max(self._heard, idle_since) > patience:
                self._process.kill()
                return await self._die(EngineDiedError(f"the engine hung: it said nothing for {patience:g} seconds"))

    async def _post_mortem(self) -> EngineDiedError:
        status = await self._buried()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with exit code {status}"
        return EngineDiedError(f"the engine's process {how}")

    async def _die(self, failure: EngineDiedError) -> None:
        if self.failure is not None or self._closing:
            return
        self.failure = failure
        self.abandon(failure)
        self.dead.set()
        async with self._changed:
            self._changed.notify_all()
