"""Several engines with the same model, which are used as one.

A request goes to the replica that the dispatcher's policy chooses, and stays there. Where that replica is lost, the
request is sent to another one, if nothing of its answer was shown; else it ends with an error. The lost replica is
started again, and told what operators have told the others meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Self, TypeVar

import numpy as np

from penstock.core.errors import PenstockError, UsageError, nearest
from penstock.core.events import Event
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.link.client import EngineClient, EngineDiedError, Watcher, show
from penstock.serve.link.wire import Errand
from penstock.serve.messages import Act, Delta, Request, Snapshot
from penstock.serve.replicas.config import Replication
from penstock.serve.replicas.placement import Place, places
from penstock.serve.replicas.replica import Replica, ReplicaLostError, adapters_of
from penstock.serve.replicas.retelling import Retelling
from penstock.serve.replicas.standing import Standing
from penstock.serve.replicas.states import all_ready, summed
from penstock.serve.routing.dispatcher import Dispatcher, NoReplicaError

log = logging.getLogger(__name__)

#: Seconds that a replica which died again waits longer each time before it is started.
PAUSE = 2.0

#: How often a request is sent to another replica.
MOVES = 1

#: Seconds between two states that a reader is told.
STATES = 0.1

T = TypeVar("T")


class Replicas:
    """Looks like an :class:`~penstock.serve.link.client.EngineClient`. Made by :meth:`open`; used in one event loop.

    Attributes:
        ready: what the engines said of themselves, together.
        watchers: they see what all of them decide.
        failure: why none is left, which none will be again; None as long as one is, or comes back.
        dead: set once there is one.
    """

    def __init__(
        self,
        model: str,
        config: EngineConfig,
        replication: Replication,
        patience: float,
        opened: Sequence[tuple[Place, EngineClient]],
    ) -> None:
        self._model, self._patience, self._restarts = model, patience, replication.restarts
        self._replicas = [Replica(number, *each, self._told) for number, each in enumerate(opened)]
        clients = [client for _, client in opened]
        room = min(client.snapshot.blocks for client in clients) * config.block_size
        self._dispatcher = Dispatcher(replication.routing, len(clients), room)
        self._standing = Standing(config.adapters, self._replicas[0].adapters)
        self._acting = asyncio.Lock()
        self._cut = set[tuple[str, int]]()
        self._resent, self._changed = 0, asyncio.Event()
        self.ready = all_ready([client.ready for client in clients])
        self.watchers: list[Watcher] = []
        self.failure: EngineDiedError | None = None
        self.dead = asyncio.Event()
        self._tasks = [asyncio.create_task(self._keep(replica)) for replica in self._replicas]

    @classmethod
    async def open(
        cls,
        model: str,
        config: EngineConfig,
        replication: Replication,
        device: str = "auto",
        patience: float = 300.0,
    ) -> Self:
        """Starts all engines.

        Args:
            patience: as of :meth:`~penstock.serve.link.client.EngineClient.open`.

        Raises:
            PenstockError: there are not enough devices, the model cannot be had, or it does not fit.
        """
        found = places(config, replication.replicas, device)
        opening = [_opened(model, place, patience) for place in found]
        opened = await asyncio.gather(*opening, return_exceptions=True)
        clients = [each for each in opened if isinstance(each, EngineClient)]
        failed = [each for each in opened if isinstance(each, BaseException)]
        if failed:
            await asyncio.gather(*(client.close() for client in clients))
            raise failed[0]
        if len({client.snapshot.adapter_keys for client in clients}) > 1:
            await asyncio.gather(*(client.close() for client in clients))
            raise PenstockError("what is in an adapter's folder has changed while replicas read it: start again")
        return cls(model, config, replication, patience, list(zip(found, clients, strict=True)))

    # Requests

    @property
    def outstanding(self) -> int:
        """Continuations that are under way or wait."""
        return sum(replica.client.outstanding for replica in self._replicas)

    async def stream(self, *requests: Request) -> AsyncGenerator[Delta]:
        """News of ``requests`` until all their continuations have ended. Closing the iterator before aborts them.

        Raises:
            UsageError: an engine does not take one of them; the others are aborted.
            NoReplicaError: no replica takes requests now.
            ReplicaLostError: the replica of one of them was lost when a part of its answer had been shown.
        """
        queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._gathered(request, queue)) for request in requests]
        left = len(tasks)
        try:
            while left:
                news = await queue.get()
                if isinstance(news, Exception):
                    raise news
                if news is None:
                    left -= 1
                else:
                    yield news
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _gathered(self, request: Request, queue: asyncio.Queue[Delta | Exception | None]) -> None:
        """Puts the news of ``request`` into ``queue``, and how they end: an error, or None."""
        try:
            async with aclosing(self._answer(request)) as news:
                async for delta in news:
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as error:  # whatever it is, whoever reads the queue raises it
            queue.put_nowait(error)

    async def _answer(self, request: Request) -> AsyncGenerator[Delta]:
        telling = Retelling()
        try:
            for moves in itertools.count():
                with self._sent(request) as client:
                    try:
                        async with aclosing(client.stream(request)) as news:
                            async for delta in news:
                                rest = self._taken(request, telling, client, delta)
                                if rest is not None:
                                    yield rest
                        return
                    except EngineDiedError as error:
                        self._leave(request, error, moves)
                        telling.begin_again()
        finally:
            self._cut -= {(request.id, index) for index in range(request.sampling.continuations)}

    def _taken(self, request: Request, telling: Retelling, client: EngineClient, delta: Delta) -> Delta | None:
        """What is new in ``delta`` of ``request``, which ``client`` has told."""
        if not request.whole:
            self._dispatcher.settle(request.id)
        if (request.id, delta.index) in self._cut:  # before this replica had it
            client.abort(request.id, delta.index)
        try:
            return telling.rest(delta)
        except ValueError:
            what = "the replica that answered was lost, and another one comes to another answer; ask again"
            raise ReplicaLostError(what) from None

    async def run(self, errand: Errand) -> str:
        """What comes of ``errand``, as JSON. Cancelling it ends the work.

        Raises:
            UsageError: it is refused.
            NoReplicaError: no replica takes requests now.
        """
        return await self._anywhere(errand.request, lambda client: client.run(errand))

    async def embed(self, id: str, texts: Sequence[list[int]], seconds: list[int] | None = None) -> np.ndarray:
        """Vectors, as of :meth:`~penstock.serve.link.client.EngineClient.embed`."""
        request = Request(id, [*itertools.chain.from_iterable(texts)], SamplingParams())
        return await self._anywhere(request, lambda client: client.embed(id, texts, seconds))

    async def _anywhere(self, request: Request, work: Callable[[EngineClient], Awaitable[T]]) -> T:
        """What a replica makes of ``work``, another one where the first is lost."""
        moves = 0
        while True:
            with self._sent(request) as client:
                try:
                    return await work(client)
                except EngineDiedError as error:
                    self._leave(request, error, moves)
                    moves += 1

    @contextlib.contextmanager
    def _sent(self, request: Request) -> Iterator[EngineClient]:
        """The engine that ``request`` is sent to, which has it within the block."""
        if self.failure is not None:
            raise self.failure
        adapter, known = request.adapter, self._standing.keys
        if adapter and adapter not in known:
            raise UsageError(f"there is no adapter {adapter!r} here: {nearest(adapter, known)}")
        answering = [each.answers(adapter, known.get(adapter, "")) for each in self._replicas]
        number = self._dispatcher.send(request, answering)
        try:
            yield self._replicas[number].client
        finally:
            self._dispatcher.done(request.id)
            self._change()

    def _leave(self, request: Request, error: EngineDiedError, moves: int) -> None:
        """The replica that had ``request`` is lost, which was sent to another one so many times.

        Raises:
            ReplicaLostError: no other one is to answer it.
        """
        if moves == MOVES:  # it may be the request that ends them, and would end all
            raise ReplicaLostError(f"the replicas that had the request were lost one after the other: {error}")
        if not self._dispatcher.may_move(request.id):
            raise ReplicaLostError(f"the replica that had begun to answer was lost: {error}; ask again") from error
        self._resent += 1
        log.warning("the request %s is sent to another replica: %s", request.id, error)

    def abort(self, id: str, index: int | None = None) -> None:
        """Ends a request, or only its continuation ``index``, or an errand, if it is still there. Does not wait."""
        number = self._dispatcher.replica_of(id)
        if number is None:
            return
        if index is None:
            self._dispatcher.settle(id)  # nobody is to begin it anew
        else:
            self._cut.add((id, index))
        self._replicas[number].client.abort(id, index)

    def abandon(self, reason: PenstockError) -> None:
        """Ends all streams with ``reason``, which aborts their requests."""
        for replica in self._replicas:
            replica.client.abandon(reason)

    # What operators want

    async def control(self, id: str, act: Act, folder: str = "", version: int | None = None, name: str = "") -> None:
        """Has all engines do what an operator says, and waits until that is done. One does it first: if it refuses,
        nothing has changed.

        Raises:
            PenstockError: the engines do not do it.
        """
        async with self._acting:
            if act is Act.LOAD_ADAPTER:
                await self._load_adapter(id, folder, name)
            elif act is Act.DROP_ADAPTER and name in self._standing.keys:
                await self._drop_adapter(id, name)
            else:
                await self._do(id, act, folder, version, name)

    async def _do(self, id: str, act: Act, folder: str, version: int | None, name: str) -> None:
        """What all do or none, but for those that do not do as the first one did, which end."""
        if act is Act.LOAD and version is None:
            version = self.snapshot.version + 1
        _, refused = await self._tell(self._replicas, id, act, folder, version, name)
        self._standing.take(act, folder, version, name)
        for replica, error in refused:
            # Started again, it is told what all have done.
            log.error("replica %d does not %s as the others do, and is ended: %s", replica.number, act, error)
            replica.client.kill()
        if act in (Act.LOAD, Act.SLEEP):
            for replica in self._replicas:
                self._dispatcher.forget(replica.number)

    async def _load_adapter(self, id: str, folder: str, name: str) -> None:
        """All load what the first one has read in ``folder``, or none has it."""
        if name in self._standing.keys:
            raise UsageError(f"there is an adapter {name!r} already", hint="Drop it first, or choose another name.")
        done, refused = await self._tell(self._replicas, id, Act.LOAD_ADAPTER, folder, None, name)
        key = done[0].adapters.get(name, "")
        changed = PenstockError(f"what is in {folder} has changed while replicas read it: load it again")
        refused += [(each, changed) for each in done if each.adapters.get(name) != key]
        if refused:
            undoing = (each.client.control(id, Act.DROP_ADAPTER, name=name) for each in done)
            await asyncio.gather(*undoing, return_exceptions=True)
            raise UsageError(f"replica {refused[0][0].number}: {refused[0][1]}")
        self._standing.take(Act.LOAD_ADAPTER, folder, None, name, key)

    async def _drop_adapter(self, id: str, name: str) -> None:
        """Those drop it that have it: one that was started again may not."""
        self._standing.take(Act.DROP_ADAPTER, "", None, name)
        have = [each for each in self._replicas if each.client.failure is None and name in each.adapters]
        if have:
            await self._tell(have, id, Act.DROP_ADAPTER, "", None, name)

    async def _tell(
        self, replicas: Sequence[Replica], id: str, act: Act, folder: str, version: int | None, name: str
    ) -> tuple[list[Replica], list[tuple[Replica, PenstockError]]]:
        """Those of some ``replicas`` that have done what an operator says, the first of them before all others, and
        those that have not, with their reasons.

        Raises:
            PenstockError: the first does not do it.
        """
        wanted = (id, act, folder, version, name)
        first = await self._first(replicas, *wanted)
        others = [each for each in replicas if each.client.failure is None and each is not first]
        ended = await asyncio.gather(*(each.client.control(*wanted) for each in others), return_exceptions=True)
        done, refused = [first], list[tuple[Replica, PenstockError]]()
        for each, end in zip(others, ended, strict=True):
            if end is None:
                done.append(each)
            elif isinstance(end, PenstockError) and not isinstance(end, EngineDiedError):
                refused.append((each, end))
        return done, refused

    async def _first(
        self, replicas: Sequence[Replica], id: str, act: Act, folder: str, version: int | None, name: str
    ) -> Replica:
        """The first of some ``replicas`` that lives, which has done what an operator says."""
        for replica in replicas:
            with contextlib.suppress(EngineDiedError):
                await replica.client.control(id, act, folder, version, name)
                return replica
        raise NoReplicaError("no replica is there at this moment; try again later")

    async def drain(self, number: int) -> None:
        """The replica ``number`` takes no more requests; waits until those under way there have ended.

        Raises:
            UsageError: there is no such.
        """
        replica = self._named(number)
        replica.drained = True
        log.warning("replica %d takes no more requests", number)
        self._change()
        while replica.drained and self.snapshot.replicas[number].under_way:
            await self._changed.wait()

    def undrain(self, number: int) -> None:
        """The replica ``number`` takes requests again.

        Raises:
            UsageError: there is no such.
        """
        self._named(number).drained = False
        log.warning("replica %d takes requests again", number)
        self._change()

    def _named(self, number: int) -> Replica:
        if not 0 <= number < len(self._replicas):
            raise UsageError(f"there is no replica {number}: they are 0 to {len(self._replicas) - 1}")
        return self._replicas[number]

    # What can be seen of them

    @property
    def snapshot(self) -> Snapshot:
        """Their newest state: that of those that live, in sum, and of each."""
        loads = self._dispatcher.loads([replica.open for replica in self._replicas])
        states = [each.state(load.continuations) for each, load in zip(self._replicas, loads, strict=True)]
        alive = [each.now for each in states if each.process] or [each.now for each in states]
        adapters = tuple(self._standing.keys)
        return dataclasses.replace(summed(alive), adapters=adapters, replicas=tuple(states), resent=self._resent)

    async def snapshots(self, every: float) -> AsyncGenerator[Snapshot]:
        """Their state, again whenever it changed, and after ``every`` seconds at the latest; ends when none is left."""
        while self.failure is None:
            changed = self._changed
            yield self.snapshot
            await asyncio.sleep(STATES)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), every)

    def _told(self, events: Sequence[Event], newer: bool) -> None:
        """One of them has told ``events``, and its state, if that is ``newer``."""
        show(self.watchers, events, self.snapshot if newer else None)
        if newer:
            self._change()

    def _change(self) -> None:
        """Whoever waits for a change looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    # Their processes

    async def close(self) -> None:
        """Ends all processes; what was under way is lost."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(replica.client.close() for replica in self._replicas))

    async def _keep(self, replica: Replica) -> None:
        """Starts ``replica`` again whenever it has died, until that has happened too often."""
        while replica.lost is None:
            await replica.client.dead.wait()
            assert replica.client.failure is not None
            failure: PenstockError = replica.client.failure
            self._dispatcher.forget(replica.number)
            self._change()
            await replica.client.close()
            while replica.client.failure is not None and replica.lost is None:
                if replica.died_too_often(self._restarts):
                    self._give_up(replica, failure)
                    break
                log.error("replica %d is lost, and started again: %s", replica.number, failure)
                await asyncio.sleep(PAUSE * (replica.deaths - 1))
                try:
                    await self._join(replica)
                except PenstockError as error:
                    failure = error

    async def _join(self, replica: Replica) -> None:
        """Opens an engine in the place of the one that has died, and lets it do what all the others have done.

        Raises:
            PenstockError: it cannot be opened, or does not.
        """
        client = await _opened(self._model, replica.place, self._patience)
        try:
            async with self._acting:
                await self._catch_up(replica.number, client)
                replica.put(client)
        except BaseException:
            await client.close()
            raise
        replica.restarts += 1
        self._change()

    async def _catch_up(self, number: int, client: EngineClient) -> None:
        """Has the engine of ``client``, which comes to the place ``number``, do what all the others have done. It has
        no adapter whose folder is not there any more, or has something else: those of one name are all the same.

        Raises:
            PenstockError: it does not do it.
        """
        for each in self._standing.acts():
            try:
                await client.control(_id(), each.act, each.folder, each.version, each.name)
            except PenstockError as error:
                if isinstance(error, EngineDiedError) or each.act is not Act.LOAD_ADAPTER:
                    raise
                log.error("replica %d goes on without the adapter %s, which others have: %s", number, each.name, error)
        for name, key in adapters_of(client).items():
            if self._standing.keys.get(name) != key:
                await client.control(_id(), Act.DROP_ADAPTER, name=name)
                changed = "there is another one in its folder now"
                log.error("replica %d goes on without the adapter %s, which others have: %s", number, name, changed)

    def _give_up(self, replica: Replica, failure: PenstockError) -> None:
        replica.lost = EngineDiedError(f"replica {replica.number}: {failure}")
        log.error("replica %d has died too often, and is not started again: %s", replica.number, failure)
        self._change()
        if all(each.lost is not None for each in self._replicas):
            self.failure = replica.lost
            self.dead.set()


def _id() -> str:
    """Of something that an engine is told to do."""
    return f"ctl-{uuid.uuid4().hex}"


async def _opened(model: str, place: Place, patience: float) -> EngineClient:
    return await EngineClient.open(model, place.config, place.device, patience, place.environment)
