"""The law of ``serve.routing``.

Bugs that its clauses are there to catch:

- the example: a load that does not count, or counts what has ended; a prefix that is found where it is not, or not
  where it is; a bound on the load that holds nobody back.
- choices: a request that is sent to a replica which takes none; state that is not the policy's own.
- the lead: a replica that gets everything, while others wait for ever.
- tokens: a request that is told twice, or not at all, when its replica is lost, or drained; one that ends with it
  though another could have answered.
- prefixes: a conversation that changes its replica, and is computed again there; what was sent and is forgotten too
  early, or remembered as something else.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from penstock.core.randomness import numpy_generator
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.kv.evictions.lru import LeastRecentlyUsed
from penstock.serve.kv.simulator import Simulator
from penstock.serve.messages import Request
from penstock.serve.routing.contract import Load, Routing
from penstock.serve.routing.dispatcher import Dispatcher
from penstock.testing.enrolled import rebuilt
from penstock.testing.serve_model import SHAPE, small_model

CONFIG = EngineConfig(tokens=32, sequences=4, block_size=4, cache_tokens=256, check=True)

#: Tokens of a cache of which nothing is to be forgotten.
ROOMY = 1 << 20


def check(routing: Routing) -> None:
    """Asserts the law of ``serve.routing``."""
    check_example(routing)
    for seed in range(6):
        check_choices(routing, seed)
        check_lead(routing, seed)
    for seed in range(3):
        check_tokens(routing, seed)
    if routing.unit is not None:
        for seed in range(3):
            check_longest(routing, routing.unit, seed)
        for room in (48, 96, 192, 1024):
            check_prefixes(routing, room)


def request(id: str, prompt: Sequence[int], **sampling: object) -> Request:
    """One that is called ``id``."""
    return Request(id, list(prompt), SamplingParams.model_validate({"max_tokens": 1, **sampling}))


def check_example(routing: Routing) -> None:
    """Of one course of events, the policy decides what it says."""
    example = routing.example()
    dispatcher, sent = Dispatcher(example.routing, example.replicas, ROOMY), []
    for now, event in enumerate(example.events):
        for before, earlier in enumerate(example.events[:now]):
            if earlier.ends == now:
                dispatcher.done(str(before))
        sent.append(dispatcher.send(request(str(now), event.prompt), [True] * example.replicas))
    assert sent == example.sent, f"requests go to {sent} in the example, and not to {example.sent}"


def check_choices(routing: Routing, seed: int, steps: int = 60) -> None:
    """Only replicas that are open get requests, however they come and go; two routers that have seen the same decide
    the same."""
    draw = numpy_generator(seed, "testing/serve.routing")
    replicas = int(draw.integers(2, 5))
    routers = [each.start(replicas, 64) for each in (routing, rebuilt(routing))]
    for _ in range(steps):
        prompt = [int(token) for token in draw.integers(2, size=int(draw.integers(1, 40)))]
        loads = [
            Load(int(each), int(draw.integers(100)), bool(draw.integers(2)))
            for each in draw.integers(20, size=replicas)
        ]
        loads[int(draw.integers(replicas))] = Load()
        root = ("", "adapter")[int(draw.integers(2))]
        chosen = [router.choose(prompt, root, loads) for router in routers]
        assert len(set(chosen)) == 1, f"two routers that have seen the same choose {chosen}"
        assert loads[chosen[0]].open, f"replica {chosen[0]} takes no requests, and gets one"
        if draw.random() < 0.1:
            gone = int(draw.integers(replicas))
            for router in routers:
                router.forget(gone)


def check_lead(routing: Routing, seed: int) -> None:
    """Requests that do not end, all the same, of a few kinds, or all different: no open replica is left behind."""
    draw = numpy_generator(seed, "testing/serve.routing/lead")
    replicas = int(draw.integers(2, 5))
    open = [True, True, *(bool(each) for each in draw.integers(2, size=replicas - 2))]
    kinds = (1, 3, 1000)[seed % 3]
    dispatcher, counts = Dispatcher(routing, replicas, ROOMY), [0] * replicas
    for number in range(20 * (routing.lead + 1)):
        kind = int(draw.integers(kinds))
        counts[dispatcher.send(request(str(number), [kind] * 40), open)] += 1
        own = [count for count, takes in zip(counts, open, strict=True) if takes]
        ahead = max(own) - min(own)
        assert ahead <= routing.lead, f"one replica is {ahead} requests ahead of another, and may be {routing.lead}"


@functools.cache
def course(seed: int) -> list[Request]:
    """Requests whose prompts begin in few ways, greedy ones and drawn ones, some with several continuations."""
    draw = numpy_generator(seed, "testing/serve.routing/course")
    heads = [[int(token) for token in draw.integers(SHAPE.vocabulary, size=16)] for _ in range(2)]
    found = []
    for number in range(12):
        tail = [int(token) for token in draw.integers(SHAPE.vocabulary, size=int(draw.integers(1, 12)))]
        sampling = {"temperature": float(number % 2), "seed": number, "n": 1 + number % 5 // 4, "max_tokens": 8}
        found.append(request(str(number), heads[number % 2] + tail, **sampling))
    return found


class Told:
    """What engines tell of requests: their tokens, by request and continuation, and who has ended."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self._left: dict[str, int] = {}

    def step(self, engine: Engine, requests: dict[str, Request]) -> list[str]:
        """Steps ``engine``; the requests that something was told of."""
        deltas = engine.step()
        for delta in deltas:
            self.tokens.setdefault((delta.id, delta.index), []).extend(delta.tokens)
            left = self._left.setdefault(delta.id, requests[delta.id].sampling.continuations)
            self._left[delta.id] = left - (delta.finish is not None)
        return sorted({delta.id for delta in deltas})

    def ended(self, id: str) -> bool:
        """Whether all its continuations have."""
        return self._left.get(id) == 0


@functools.cache
def alone(seed: int) -> dict[tuple[str, int], list[int]]:
    """What one engine tells of :func:`course`."""
    engine, told, requests = build_engine(small_model(), CONFIG), Told(), {each.id: each for each in course(seed)}
    for each in requests.values():
        engine.add(each)
    while engine.busy:
        told.step(engine, requests)
    return told.tokens


def check_tokens(routing: Routing, seed: int, replicas: int = 3) -> None:
    """One of three engines is lost in the midst of a course of requests, and another one is drained: whatever is
    answered is what one engine answers, and nothing fails but what had been told in part where the engine was lost."""
    draw = numpy_generator(seed, "testing/serve.routing/tokens")
    requests = {each.id: each for each in course(seed)}
    engines = [build_engine(small_model(), CONFIG) for _ in range(replicas)]
    dispatcher, told, open = Dispatcher(routing, replicas, CONFIG.cache_tokens or 0), Told(), [True] * replicas
    waiting, under_way, failed = [*requests.values()], set[str](), set[str]()
    lost, drained = (int(each) for each in draw.permutation(replicas)[:2])
    when = int(draw.integers(3, 8))

    def send(each: Request) -> None:
        engines[dispatcher.send(each, open)].add(each)
        under_way.add(each.id)

    step = 0
    while waiting or under_way:
        for _ in range(min(len(waiting), int(draw.integers(1, 4)))):
            send(waiting.pop(0))
        step += 1
        if step == when // 2:
            open[drained] = False
        if step == when:
            open[lost] = False
            dispatcher.forget(lost)
            for id in [each for each in under_way if dispatcher.replica_of(each) == lost]:
                moves = dispatcher.may_move(id)
                assert moves != any((id, index) in told.tokens for index in range(2)), f"who may move is told of {id}"
                dispatcher.done(id)
                under_way.discard(id)
                if moves:
                    send(requests[id])
                else:
                    failed.add(id)
        for place, engine in enumerate(engines):
            if place == lost and step >= when:
                continue
            for id in told.step(engine, requests) if engine.busy else []:
                assert dispatcher.replica_of(id) == place, f"replica {place} answers a request of another's"
                dispatcher.settle(id)
                if told.ended(id):
                    dispatcher.done(id)
                    under_way.remove(id)
    assert all(load == Load(open=takes) for load, takes in zip(dispatcher.loads(open), open, strict=True))
    for (id, index), tokens in alone(seed).items():
        own = told.tokens.get((id, index), [])
        wanted = tokens[: len(own)] if id in failed else tokens
        assert own == wanted, f"continuation {index} of request {id} is {own}, and {wanted} of one engine"


def check_longest(routing: Routing, unit: int, seed: int, steps: int = 40) -> None:
    """Where open replicas have the same to do, and caches forget nothing, none was sent more of a prompt's beginning
    than the one that is chosen: by comparing the prompt with every one before, token for token."""
    draw = numpy_generator(seed, "testing/serve.routing/longest")
    replicas, block = 3, [int(token) for token in draw.integers(1000, size=unit)]
    router, sent = routing.start(replicas, ROOMY), [list[tuple[str, list[int]]]() for _ in range(replicas)]
    for number in range(steps):
        blocks = [[block, [token + 1000 for token in block]][int(each)] for each in draw.integers(2, size=4)]
        prompt = [token for each in blocks for token in each] + [number] * int(draw.integers(unit))
        root = ("", "adapter")[int(draw.integers(2))]
        closed = int(draw.integers(replicas))
        chosen = router.choose(prompt, root, [Load(open=place != closed) for place in range(replicas)])
        most = [max((common(prompt, text) // unit for name, text in own if name == root), default=0) for own in sent]
        best = max(count for place, count in enumerate(most) if place != closed)
        assert most[chosen] == best, f"replica {chosen} was sent {most[chosen]} blocks of a prompt, and another {best}"
        sent[chosen].append((root, prompt))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), len(one))


def check_prefixes(routing: Routing, room: int, replicas: int = 2, block: int = 4) -> None:
    """Conversations go on in turn, three at a time, each with its own beginning: of their turns, no fewer blocks are in
    the caches of several replicas with ``room`` tokens each than in that of one."""
    draw = numpy_generator(0, "testing/serve.routing/prefixes")
    caches = [Simulator(room // block, block, LeastRecentlyUsed().start) for _ in range(replicas)]
    one, router = Simulator(room // block, block, LeastRecentlyUsed().start), routing.start(replicas, room)
    for _ in range(12):
        texts = [[int(token) for token in draw.integers(1000, size=4 * block)] for _ in range(3)]
        for place in draw.permutation(4 * len(texts)):
            text = texts[place % len(texts)]
            one.request(text)
            caches[router.choose(text, "", [Load()] * replicas)].request(text)
            text += [int(token) for token in draw.integers(1000, size=2 * block)]
    found = sum(cache.found.hits for cache in caches)
    assert found >= one.found.hits, f"{found} blocks are found, and {one.found.hits} in one cache of {room} tokens"
