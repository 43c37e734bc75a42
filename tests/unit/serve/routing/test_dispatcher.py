"""What is counted of requests that were sent to replicas, and what their choice goes by."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.messages import Request
from penstock.serve.routing.contract import Load
from penstock.serve.routing.dispatcher import Dispatcher, NoReplicaError
from penstock.serve.routing.round_robin import RoundRobin, RoundRobinRouter


class Noting(RoundRobinRouter):
    """In turn; it remembers what it was asked."""

    def __init__(self, replicas: int) -> None:
        super().__init__(replicas)
        self.asked: list[tuple[list[int], str]] = []

    def choose(self, prompt: Sequence[int], root: str, loads: Sequence[Load]) -> int:
        self.asked.append((list(prompt), root))
        return super().choose(prompt, root, loads)


@pytest.fixture
def router() -> Noting:
    return Noting(2)


@pytest.fixture
def dispatcher(router, monkeypatch) -> Dispatcher:
    monkeypatch.setattr(RoundRobin, "start", lambda self, replicas, room: router)
    return Dispatcher(RoundRobin(), 2, 1000)


OPEN = [True, True]


def request(id: str, length: int, **options) -> Request:
    return Request(id, list(range(length)), SamplingParams(n=options.pop("n", 1)), **options)


def test_prompts_of_another_adapter_are_of_another_root(dispatcher, router):
    dispatcher.send(request("plain", 3), OPEN)
    dispatcher.send(request("worn", 3, adapter="sql"), OPEN)
    assert router.asked == [([0, 1, 2], ""), ([0, 1, 2], "sql")]


def test_texts_between_the_parts_of_a_prompt_count_where_they_stand(dispatcher, router):
    dispatcher.send(request("a", 4, contexts=[[7, 8], [9]], shared=1), OPEN)
    assert router.asked == [([0, 7, 8, 9, 1, 2, 3], "")]


def test_of_what_is_under_way_prompts_count_until_a_token_is_told(dispatcher):
    assert [dispatcher.send(request(id, length, n=n), OPEN) for id, length, n in (("a", 5, 1), ("b", 7, 3))] == [0, 1]
    assert dispatcher.loads([True, False]) == [Load(1, 5, True), Load(3, 7, False)]
    dispatcher.settle("b")
    assert dispatcher.loads(OPEN) == [Load(1, 5), Load(3, 0)]
    assert dispatcher.may_move("a") and not dispatcher.may_move("b")
    dispatcher.done("b")
    assert dispatcher.loads(OPEN) == [Load(1, 5), Load()]
    assert dispatcher.replica_of("a") == 0 and dispatcher.replica_of("b") is None


def test_where_nobody_takes_requests_none_is_sent(dispatcher):
    with pytest.raises(NoReplicaError, match="try again later"):
        dispatcher.send(request("a", 3), [False, False])
    assert dispatcher.loads(OPEN) == [Load(), Load()]
