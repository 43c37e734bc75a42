"""The law of ``serve.loop``.

What each clause is there to catch:

- every batch is launched and published once, in order: one that is forgotten, published twice, or too early;
- ``idle`` and ``drain`` tell the truth: an engine that comes to rest with tokens unsaid, or waits for ever;
- the plain loop's tokens: a step that is formed before what it needs is known;
- :func:`check_waiting`: one waits for the host, so all wait.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from penstock.core.randomness import numpy_generator
from penstock.ops.paged.reference import Reference
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.decode.momentum import Momentum
from penstock.serve.engine.batch import Batch
from penstock.serve.engine.loops.contract import Loop
from penstock.serve.engine.loops.plain import Plain
from penstock.serve.messages import Delta, Finish, Request
from penstock.testing.engine.requests import PREFIXES
from penstock.testing.serve_model import SHAPE, small_model
from penstock.testing.serve_simulation import simulated_engine

#: The tables of no sequence.
NOBODY = np.zeros((0, 0), np.int32)

#: What a sequence came to: its tokens, and why it ended.
Outcome = tuple[list[int], Finish | None]


class ScriptedSteps:
    """Steps that compute nothing and keep the order in which they are called.

    Args:
        batches: for each call of :meth:`form`, whether there is something to compute; nothing after them.
        stages: of the model.
    """

    def __init__(self, batches: list[bool], stages: int = 1) -> None:
        self.stages, self.most = stages, 0
        self._batches = deque(batches)
        self._formed: list[Batch] = []
        self._launched: list[Batch] = []
        self.published: list[int] = []

    def form(self, pieces: int | None = None) -> Batch | None:
        assert pieces is None or pieces + self.queued == self.stages, "each stage has a piece before any is published"
        if not self._batches or not self._batches.popleft():
            return None
        self._formed.append(Batch([], NOBODY))
        return self._formed[-1]

    def launch(self, batch: Batch) -> None:
        assert batch is self._formed[len(self._launched)], "batches are launched in the order in which they are formed"
        self._launched.append(batch)
        self.most = max(self.most, self.queued)

    def publish(self, batch: Batch) -> list[Delta]:
        place = len(self.published)
        assert batch is self._launched[place], "batches are published in the order in which they are launched"
        self.published.append(place)
        return [Delta("", place, [])]

    @property
    def queued(self) -> int:
        """Batches that are launched and not published."""
        return len(self._launched) - len(self.published)


def check(loop: Loop) -> None:
    """Asserts the law."""
    for seed in range(12):
        draw = numpy_generator(seed, "testing/loop/order")
        batches = draw.integers(2, size=draw.integers(13)).astype(bool).tolist()
        check_order(loop, batches, frozenset(draw.integers(24, size=draw.integers(6)).tolist()), 1 + seed % 4)
    for seed in range(2):
        assert outcomes(loop, seed) == outcomes(Plain(), seed), "tokens differ from those of the plain loop"
    check_waiting(loop)


def check_order(loop: Loop, batches: list[bool], drains: frozenset[int] = frozenset(), stages: int = 1) -> None:
    """Asserts that every batch is launched once and published once, in order, that ``idle`` says whether all are
    published, that ``drain`` (before the steps that ``drains`` names) leaves nothing queued, that a loop with
    nothing to compute comes to rest, and that no more batches are queued than ``stages`` or the device and the host can
    be busy with."""
    steps = ScriptedSteps(batches, stages)
    stepper = loop.start(steps)
    heard = []
    for number in range(2 * len(batches) + stages + 2):
        if number in drains:
            heard += [delta.index for delta in stepper.drain()]
            assert stepper.idle and steps.queued == 0
        heard += [delta.index for delta in stepper.step()]
        assert stepper.idle == (steps.queued == 0)
    assert stepper.idle and steps.most <= max(stages, 2)
    assert heard == steps.published == list(range(sum(batches)))


def outcomes(loop: Loop, seed: int) -> dict[str, Outcome]:
    """What random requests, which arrive at random steps, come to in a small engine under ``loop``."""
    draw = numpy_generator(seed, "testing/loop")
    config = EngineConfig(
        loop=loop, attention=Reference(), tokens=16, sequences=4, block_size=4, cache_tokens=80, check=True
    )
    engine = build_engine(small_model(), config)
    requests = []
    for number in range(10):
        own = draw.integers(SHAPE.vocabulary, size=draw.integers(1, 9))
        prompt = PREFIXES[number % 2][: draw.integers(25)] + [int(token) for token in own]
        sampling = SamplingParams(
            temperature=float(number % 3), max_tokens=int(draw.integers(1, 24)), seed=number, stop_tokens=(3, 5)
        )
        requests.append(Request(str(number), prompt, sampling))
    arrivals = deque(zip(draw.integers(20, size=10).cumsum().tolist(), requests, strict=True))
    found: dict[str, Outcome] = {request.id: ([], None) for request in requests}
    step = 0
    while arrivals or engine.busy:
        while arrivals and arrivals[0][0] <= step:
            engine.add(arrivals.popleft()[1])
        for delta in engine.step():
            found[delta.id] = found[delta.id][0] + delta.tokens, delta.finish
        step += 1
    assert engine.snapshot().held == 0
    return found


def check_waiting(loop: Loop) -> None:
    """Asserts that one whose next token the host has to know the last ones for keeps nobody else waiting: the others
    are computed in the same steps as beside one that does not wait."""
    greedy = SamplingParams(temperature=0)
    wanted = steps_beside(loop, greedy)
    for waiting in ({"bad_words": ((1, 2),)}, {"rule": Momentum()}):
        sampling = greedy.model_copy(update=waiting)
        assert sampling.waits
        assert steps_beside(loop, sampling) == wanted, "one waits for the host, and others with it"


def steps_beside(loop: Loop, sampling: SamplingParams) -> dict[int, int]:
    """By the number of the step, how many of four plain requests are computed in it beside one with ``sampling``; steps
    without any are left out."""
    engine = simulated_engine(EngineConfig(loop=loop, tokens=64, sequences=8, block_size=4, cache_tokens=400))
    for number, asked in enumerate([sampling, *[SamplingParams()] * 4]):
        engine.add(Request(str(number), [1 + number, 2], asked.model_copy(update={"max_tokens": 12})))
    found, before = dict[int, int](), engine.steps.last
    for number in range(100):
        engine.step()
        if (batch := engine.steps.last) is not before:
            others = sum(entry.sequence.request.id != "0" for entry in batch.entries)
            found |= {number: others} if others else {}
        before = batch
    assert not engine.busy
    return found
