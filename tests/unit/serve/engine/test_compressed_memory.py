"""The memory of sequences whose caches are compressed: what lies in each block, beside a list of it by hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from penstock.core.events import EventLog
from penstock.core.randomness import numpy_generator
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.memory.memory import Memory
from penstock.serve.engine.room import StepRoom
from penstock.serve.engine.sequence import Sequence
from penstock.serve.kv.policies.contract import CachePolicy
from penstock.serve.kv.policies.full import Full
from penstock.serve.kv.policies.sink_window import SinkWindow
from penstock.serve.messages import Request
from penstock.testing.engine.accounts import expected
from penstock.testing.engine.requests import numbers
from penstock.testing.serve_model import small_model

SIZE, BLOCKS = 3, 24


class Course:
    """Sequences that come, grow, are compressed, forked, cut back and preempted at random, in a memory whose places
    are a list: of each token, the text up to it and where that was compressed."""

    def __init__(self, when: str, seed: int) -> None:
        self.policy = SinkWindow(budget=0.4, every=4, sinks=2, when=when)
        self.memory = Memory(6, BLOCKS, SIZE, 60, self.policy)
        self.places: list[object] = [None] * (BLOCKS * SIZE)
        self.draw = numpy_generator(seed, "tests/compressed memory")
        self.kept: dict[Sequence, list[object]] = {}
        self.waiting: list[Sequence] = []
        self.compressed = self.shared = 0

    def new(self, tokens: list[int]) -> Sequence:
        asked = SamplingParams(max_tokens=40)
        return Sequence(Request("x", tokens, asked), 0, asked, tokens, 60, int(self.draw.integers(1 << 30)))

    def admit(self) -> None:
        if not self.waiting:
            self.waiting.append(self.new([int(each) for each in self.draw.integers(2, size=self.draw.integers(1, 30))]))
        sequence = self.waiting[0]
        if self.memory.admit(sequence):
            self.waiting.pop(0)
            self.kept[sequence] = [(tuple(sequence.tokens[: place + 1]), ()) for place in range(sequence.computed)]
            self.shared += sequence.computed > 0

    def grow(self, sequence: Sequence) -> None:
        held = sequence.held
        if sequence.remaining == 0:
            sequence.tokens.append(int(self.draw.integers(2)))
        self.compact(sequence)
        if not sequence.running:
            return
        count = min(sequence.remaining, held.due - held.computed, int(self.draw.integers(1, 9)))
        if self.memory.reserve([(sequence, count)]):
            self.press()
            return
        self.execute()
        self.moved()
        for place in range(held.computed, held.computed + count):
            row = (tuple(sequence.tokens[: place + 1]), held.compacted)
            where = place - held.dropped
            self.places[held.blocks[where // SIZE] * SIZE + where % SIZE] = row
            self.kept[sequence].append(row)
        self.memory.advance(sequence, count)

    def press(self) -> None:
        for sequence in self.memory.running:
            if self.memory.gain(sequence):
                self.memory.press(sequence)
                self.compact(sequence)
                return
        self.throw_out(self.memory.running[-1])

    def compact(self, sequence: Sequence) -> None:
        held = sequence.held
        if held.computed < held.due:
            return
        before, available = len(held.blocks), self.memory.pool.available
        own = self.memory.pool.own_among(held.blocks)
        if self.memory.compact(sequence):
            self.throw_out(sequence)
            return
        left = self.policy.keeps(held.computed)
        assert len(held.blocks) == -(-left // SIZE) < before
        assert self.memory.pool.available == available + own - len(held.blocks), "what was promised is not back"
        self.kept[sequence] = self.stay(self.kept[sequence], left)
        self.compressed += 1
        self.execute()

    def stay(self, rows: list[object], left: int) -> list[object]:
        return rows[:2] + rows[len(rows) - left + 2 :]

    def execute(self) -> None:
        for work in self.memory.compactions():
            rows = self.stay([self.places[place] for place in work.sources], len(work.targets))
            assert len(set(work.targets)) == len(work.targets)
            for place, row in zip(work.targets, rows, strict=True):
                self.places[place] = row

    def moved(self) -> None:
        before = list(self.places)
        for source, target in self.memory.copies():
            self.places[target * SIZE : (target + 1) * SIZE] = before[source * SIZE : (source + 1) * SIZE]

    def fork(self, parent: Sequence) -> None:
        child = self.new(list(parent.tokens))
        child.prompt = parent.prompt
        if self.memory.fork(parent, child):
            self.kept[child] = list(self.kept[parent][: child.held.places])

    def cut(self, sequence: Sequence) -> None:
        length = max(sequence.prompt, len(sequence.tokens) - int(self.draw.integers(1, 4)))
        del sequence.tokens[length:]
        sequence.compressed = [place for place in sequence.compressed if place < length]
        self.memory.truncate(sequence, length - 1)
        del self.kept[sequence][sequence.held.places :]

    def throw_out(self, sequence: Sequence) -> None:
        self.memory.release(sequence)
        del self.kept[sequence]
        if len(sequence.tokens) < 50 and self.draw.integers(2):
            sequence.preempted = True
            self.waiting.insert(0, sequence)

    def check(self) -> None:
        self.memory.check()
        for sequence, rows in self.kept.items():
            held = sequence.held
            table = self.memory.tables[held.slot, : len(held.blocks)]
            assert np.array_equal(table, held.blocks) and len(rows) == held.places
            found = [self.places[block * SIZE + offset] for block in held.blocks for offset in range(SIZE)]
            wanted = [text for text, *_ in rows]
            assert [text for text, *_ in found[: len(rows)]] == wanted, "a place has another token than is thought"


@pytest.mark.parametrize("when", ["due", "pressure"])
@pytest.mark.parametrize("seed", range(3))
def test_no_block_is_lost_or_another_s_whatever_is_compressed(when, seed):
    course = Course(when, seed)
    for _ in range(600):
        running = course.memory.running
        one = running[int(course.draw.integers(len(running)))] if running else None
        match int(course.draw.integers(30)):
            case 0 | 1 | 5 | 6:
                course.admit()
            case 2 if one is not None:
                course.throw_out(one)
            case 3 if one is not None:
                course.fork(one)
            case 4 if one is not None and len(one.tokens) > one.prompt:
                course.cut(one)
            case _ if one is not None:
                course.grow(one) if len(one.tokens) < 50 else course.throw_out(one)
        course.check()
    assert course.compressed > 10 and course.shared > 2
    for sequence in list(course.memory.running):
        course.memory.release(sequence)
    assert course.memory.pool.available == BLOCKS
    assert sorted(course.memory.pool.take(BLOCKS)) == list(range(BLOCKS)), "the pool is in pieces"


def test_one_goes_on_from_what_is_left_of_a_kept_cache():
    """It says what its text says behind a cache that was compressed there, not what the whole cache would."""
    policy = SinkWindow(budget=9, every=4, sinks=2, when="pressure")
    config = EngineConfig(
        kv=policy,
        attention="reference",
        loop="plain",
        tokens=32,
        sequences=4,
        block_size=2,
        cache_tokens=60,
        check=True,
    )
    engine, told = build_engine(small_model(), config), {"kept": [], "other": [], "next": []}
    texts = {"other": numbers("other", 10), "kept": numbers("kept", 10)}

    def drain():
        while engine.busy:
            for delta in engine.step():
                told[delta.id] += delta.tokens

    for id, prompt in texts.items():
        engine.add(Request(id, prompt, SamplingParams(temperature=0, max_tokens=30), keep=id == "kept"))
    (kept,), (other,) = engine.requests.of("kept"), engine.requests.of("other")
    drain()
    assert kept.compressed
    texts["next"] = [*texts["kept"], *told["kept"]]
    engine.fork("kept", Request("next", texts["next"], SamplingParams(temperature=0, max_tokens=8)))
    (following,) = engine.requests.of("next")
    drain()
    for id, sequence in (("kept", kept), ("other", other), ("next", following)):
        asked = (small_model(), tuple(texts[id]), sequence.prompt, SamplingParams(temperature=0), 0)
        assert told[id] == expected(*asked, len(told[id]), told[id], policy, (tuple(sequence.compressed),))


def test_nobody_is_asked_where_caches_are_never_compressed():
    asked: list[CachePolicy] = []

    def running(policy: CachePolicy) -> Iterator[Sequence]:
        asked.append(policy)
        yield from ()

    for policy in (Full(), SinkWindow()):
        StepRoom(Memory(2, 8, 4, 16, policy), 8, EventLog()).compact(running(policy))
    assert asked == [SinkWindow()]
