"""Several engines as one, over engines that do as they are told to."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from penstock.core.errors import PenstockError, UsageError
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.link.client import EngineDiedError
from penstock.serve.link.wire import Errand, Ready
from penstock.serve.messages import Act, Delta, Finish, Request, Snapshot
from penstock.serve.replicas import replicas
from penstock.serve.replicas.config import Replication
from penstock.serve.replicas.placement import Place
from penstock.serve.replicas.replica import ReplicaLostError
from penstock.serve.replicas.replicas import Replicas
from penstock.serve.routing.dispatcher import NoReplicaError

ANSWER = [5, 6, 7, 8]


class Engine:
    """Answers with ANSWER and tells vectors of ones; dies behind ``tokens`` of an answer, and refuses an ``act``. What
    it reads of an adapter's folder has the ``key``; it may be ``opened`` with one."""

    ready = Ready(100, 4, 50, [{"weights": 1}], "plain")
    outstanding = pid = 0

    def __init__(self, tokens: int | None = None, act: Act | None = None, key: str = "k", opened: bool = False) -> None:
        self._adapters = {"start": key} if opened else dict[str, str]()
        names = {"adapters": tuple(self._adapters), "adapter_keys": tuple(self._adapters.values())}
        self.snapshot = Snapshot(*[0] * 13, 0.0, **names)
        self.failure: EngineDiedError | None = None
        self.dead, self.watchers, self.done, self.aborted = asyncio.Event(), [], [], []
        self.asked = set[str]()
        self._tokens, self._act, self._key = tokens, act, key
        self.reading: asyncio.Event | None = None

    async def stream(self, request: Request) -> AsyncGenerator[Delta]:
        self.asked.add(request.id)
        for place, token in enumerate(ANSWER):
            await self._live(place)
            yield Delta(request.id, 0, [token], finish=Finish.LENGTH if token == ANSWER[-1] else None)

    async def embed(self, id: str, texts: list[list[int]], seconds: list[int] | None) -> np.ndarray:
        await self._live(0)
        return np.ones((len(texts), 2), np.float32)

    async def run(self, errand: Errand) -> str:
        await self._live(0)
        return "{}"

    async def _live(self, told: int) -> None:
        await asyncio.sleep(0)
        if told == self._tokens:
            self.kill()
        if self.failure is not None:
            raise self.failure

    async def control(self, id: str, act: Act, folder: str = "", version: int | None = None, name: str = "") -> None:
        await self._live(-1)
        if act is self._act:
            raise PenstockError("not this one")
        if self.reading is not None:
            await self.reading.wait()
        self.done.append((act, version, name))
        if act is Act.LOAD_ADAPTER:
            self._adapters[name] = self._key
        elif act is Act.DROP_ADAPTER:
            del self._adapters[name]
        names, keys = tuple(self._adapters), tuple(self._adapters.values())
        self.snapshot = dataclasses.replace(self.snapshot, adapters=names, adapter_keys=keys)

    def abort(self, id: str, index: int | None = None) -> None:
        self.aborted.append((id, index))

    def abandon(self, reason: PenstockError) -> None:
        pass

    def kill(self) -> None:
        self.failure = EngineDiedError("killed")
        self.dead.set()

    async def close(self) -> None:
        pass


def over(*engines: Engine, restarts: int = 0) -> Replicas:
    """Replicas with ``engines``."""
    kept = {"restarts": restarts, "routing": "round_robin"} if len(engines) > 1 else {}
    replication = Replication.model_validate({"replicas": len(engines), **kept})
    opened = [(Place(EngineConfig(), "cpu", {}), engine) for engine in engines]
    return Replicas("m", EngineConfig(), replication, 1.0, opened)  # type: ignore[arg-type]


def request(whole: bool = False) -> Request:
    return Request("r", [1, 2], SamplingParams(max_tokens=4), whole=whole)


def played(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 20))


async def told(several: Replicas, wanted: Request) -> list[int]:
    return [token async for delta in several.stream(wanted) for token in delta.tokens]


@pytest.mark.parametrize(("tokens", "whole", "moves"), [(0, False, True), (2, False, False), (2, True, True)])
def test_who_has_been_shown_nothing_is_answered_by_another(tokens, whole, moves):
    async def work() -> None:
        several = over(Engine(tokens), Engine())
        if moves:
            assert await told(several, request(whole)) == ANSWER
        else:
            with pytest.raises(ReplicaLostError, match="killed; ask again"):
                await told(several, request(whole))
        assert several.snapshot.resent == moves
        assert [each.under_way for each in several.snapshot.replicas] == [0, 0]
        await several.close()

    played(work)


def test_vectors_and_searches_are_made_elsewhere():
    async def work() -> None:
        several = over(Engine(0), Engine(), Engine(0))
        assert (await several.embed("v", [[1], [2]])).shape == (2, 2)
        assert await several.run(Errand(request(), "guest", "{}")) == "{}"
        assert several.snapshot.resent == 2
        await several.close()

    played(work)


def test_when_none_is_left_it_is_said():
    async def work() -> None:
        several = over(Engine(0), Engine(0))
        with pytest.raises(ReplicaLostError, match="one after the other"):
            await told(several, request())
        await several.dead.wait()
        assert several.failure is not None
        assert [each.state for each in several.snapshot.replicas] == ["dead", "dead"]
        with pytest.raises(EngineDiedError):
            await told(several, request())
        await several.close()

        several = over(Engine())
        await several.drain(0)
        with pytest.raises(NoReplicaError):
            await told(several, request())
        several.undrain(0)
        assert await told(several, request()) == ANSWER
        await several.close()

    played(work)


def test_a_request_that_ends_engines_does_not_end_all():
    async def work() -> None:
        last = Engine(0)
        several = over(Engine(0), Engine(0), last)
        with pytest.raises(ReplicaLostError, match="one after the other"):
            await told(several, request())
        assert last.failure is None
        assert several.snapshot.resent == 1
        await several.close()

    played(work)


def test_what_is_to_end_is_not_begun_anew():
    """A whole request is aborted, or one of its continuations, and then its replica dies."""

    async def work() -> None:
        for index in (None, 0):
            second = Engine()
            several = over(Engine(2), second)
            news = several.stream(request(whole=True))
            await anext(news)
            several.abort("r", index)
            if index is None:
                with pytest.raises(ReplicaLostError):
                    [delta async for delta in news]
            else:
                assert [delta async for delta in news]
                assert ("r", 0) in second.aborted
            await several.close()

    played(work)


def test_operators_reach_all_or_none():
    async def work() -> None:
        first, second = Engine(), Engine()
        several = over(first, second)
        await several.control("c", Act.LOAD, "folder")
        assert first.done == second.done == [(Act.LOAD, 1, "")]
        await several.close()

        first, second = Engine(act=Act.LOAD), Engine()
        several = over(first, second)
        with pytest.raises(PenstockError, match="not this one"):
            await several.control("c", Act.LOAD, "folder")
        assert second.done == []
        await several.close()

        first, second, third = Engine(), Engine(act=Act.LOAD_ADAPTER), Engine()
        several = over(first, second, third)
        with pytest.raises(UsageError, match="replica 1: not this one"):
            await several.control("c", Act.LOAD_ADAPTER, "folder", name="a")
        undone = [(Act.LOAD_ADAPTER, None, "a"), (Act.DROP_ADAPTER, None, "a")]
        assert first.done == third.done == undone
        await several.close()

    played(work)


def test_one_that_does_not_do_as_the_others_comes_back_as_they_are(monkeypatch):
    async def work() -> None:
        later = Engine()

        async def opened(*_: Any) -> Engine:
            return later

        monkeypatch.setattr(replicas, "_opened", opened)
        first, second = Engine(), Engine(act=Act.LOAD)
        several = over(first, second, restarts=1)
        await several.control("c", Act.PAUSE)
        await several.control("c", Act.LOAD, "folder", 9)
        while several.snapshot.replicas[1].state != "ready":
            await asyncio.sleep(0)
        assert later.done == [(Act.LOAD, 9, ""), (Act.PAUSE, None, "")]
        assert several.snapshot.replicas[1].restarts == 1
        await several.close()

    played(work)


def test_one_name_is_one_adapter_everywhere():
    async def work() -> None:
        first, second = Engine(), Engine(key="another")
        several = over(first, second)
        with pytest.raises(UsageError, match="replica 1: what is in folder has changed while replicas read it"):
            await several.control("c", Act.LOAD_ADAPTER, "folder", name="a")
        assert several.snapshot.adapters == ()
        await several.close()

    played(work)


@pytest.mark.parametrize("unlike", [{"key": "another"}, {"act": Act.LOAD_ADAPTER}])
def test_one_that_comes_later_does_without_an_adapter_that_it_cannot_read_as_the_others_have(monkeypatch, unlike):
    """Requests with that go to those that have it, which alone are told to drop it."""

    async def work() -> None:
        later = Engine(**unlike)

        async def opened(*_: Any) -> Engine:
            return later

        monkeypatch.setattr(replicas, "_opened", opened)
        first, second = Engine(), Engine()
        several = over(first, second, restarts=1)
        await several.control("c", Act.LOAD_ADAPTER, "folder", name="a")
        second.kill()
        while several.snapshot.replicas[1].state != "ready":
            await asyncio.sleep(0)
        assert several.snapshot.adapters == ("a",) and later.snapshot.adapters == ()
        for number in range(4):
            assert await told(several, dataclasses.replace(request(), id=str(number))) == ANSWER
            assert await told(several, dataclasses.replace(request(), id=f"a{number}", adapter="a")) == ANSWER
        with pytest.raises(UsageError, match="there is an adapter 'a' already"):
            await several.control("c", Act.LOAD_ADAPTER, "folder", name="a")
        assert several.snapshot.adapters == ("a",) and first.snapshot.adapters == ("a",)
        several._replicas[0].drained = True
        with pytest.raises(NoReplicaError):
            await told(several, dataclasses.replace(request(), adapter="a"))
        assert later.asked and later.asked < {str(number) for number in range(4)}
        dropped = [*later.done]
        await several.control("c", Act.DROP_ADAPTER, name="a")
        assert first.done[-1] == (Act.DROP_ADAPTER, None, "a") and later.done == dropped
        with pytest.raises(UsageError, match="there is no adapter 'a' here"):
            await told(several, dataclasses.replace(request(), adapter="a"))
        await several.close()

    played(work)


def test_an_adapter_is_there_once_all_have_it():
    async def work() -> None:
        first, second = Engine(), Engine()
        several, second.reading = over(first, second), asyncio.Event()
        loading = asyncio.create_task(several.control("c", Act.LOAD_ADAPTER, "folder", name="a"))
        while not first.snapshot.adapters:
            await asyncio.sleep(0)
        assert several.snapshot.adapters == ()
        with pytest.raises(UsageError, match="there is no adapter 'a' here"):
            await told(several, dataclasses.replace(request(), adapter="a"))
        second.reading.set()
        await loading
        assert several.snapshot.adapters == ("a",)
        first.kill()
        second.kill()
        await several.control("c", Act.DROP_ADAPTER, name="a")  # which nobody has any more
        assert several.snapshot.adapters == ()
        await several.close()

    played(work)


@pytest.mark.parametrize(("key", "kept"), [("k", ("start",)), ("another", ())])
def test_adapters_that_engines_were_opened_with_are_looked_at_too(monkeypatch, key, kept):
    async def work() -> None:
        later = Engine(key=key, opened=True)

        async def opened(*_: Any) -> Engine:
            return later

        monkeypatch.setattr(replicas, "_opened", opened)
        first, second = Engine(opened=True), Engine(opened=True)
        several = over(first, second, restarts=1)
        second.kill()
        while several.snapshot.replicas[1].state != "ready":
            await asyncio.sleep(0)
        assert later.snapshot.adapters == kept and several.snapshot.adapters == ("start",)
        await several.close()

    played(work)


def test_replicas_that_have_read_something_else_at_the_start_do_not_open(monkeypatch):
    async def work() -> None:
        engines = [Engine(opened=True), Engine(key="another", opened=True)]

        async def opened(*_: Any) -> Engine:
            return engines.pop()

        monkeypatch.setattr(replicas, "_opened", opened)
        monkeypatch.setattr(replicas, "EngineClient", Engine)
        with pytest.raises(PenstockError, match="has changed while replicas read it: start again"):
            await Replicas.open("m", EngineConfig(), Replication(replicas=2), "cpu")

    played(work)


@pytest.mark.parametrize("unlike", [{"act": Act.PAUSE}, {"tokens": -1}])
def test_one_that_does_not_come_as_far_as_the_others_does_not_join_them(monkeypatch, unlike):
    """It refuses what they do, or dies."""

    async def work() -> None:
        async def opened(*_: Any) -> Engine:
            return Engine(**unlike)

        monkeypatch.setattr(replicas, "_opened", opened)
        monkeypatch.setattr(replicas, "PAUSE", 0.0)
        first, second = Engine(), Engine()
        several = over(first, second, restarts=2)
        await several.control("c", Act.LOAD_ADAPTER, "folder", name="a")
        await several.control("c", Act.PAUSE)
        second.kill()
        while several.snapshot.replicas[1].state != "dead":
            assert several.snapshot.replicas[1].state == "starting"
            await asyncio.sleep(0)
        await several.close()

    played(work)
