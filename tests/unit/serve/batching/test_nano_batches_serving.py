"""Steps in parts [194]: the same outputs, parts that do not read each other's writes, and when nanoflow splits."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from penstock.core.randomness import numpy_generator
from penstock.models.config import DecoderConfig
from penstock.plan.nano_batches import Mix, Planner, Rates, Split, StepCost
from penstock.policy import create
from penstock.serve.batching.contract import Batcher
from penstock.serve.batching.nanoflow import NanoFlow, NanoFlowBatcher, cuts_of, work_of
from penstock.serve.batching.sarathi import Sarathi, SarathiBatcher
from penstock.serve.build import build_engine
from penstock.serve.choose.sampler import Sampled
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.batch import Batch, Entry
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.limits import Limits
from penstock.serve.engine.room import StepRoom
from penstock.serve.messages import Request
from penstock.serve.run.runner import Runner
from penstock.testing.engine.machine import machine_of
from penstock.testing.reference import greedy
from penstock.testing.serve_model import SHAPE, small_model
from penstock.testing.serve_simulation import simulate, simulated_engine


class AnyPlace:
    """A planner that splits wherever it can, each time at another place."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def best(self, mix: Mix, places: tuple[int, ...]) -> Split | None:
        turn = next(self._turn)
        return Split(places[turn % len(places)], turn % 2) if places else None


class AlwaysSplit(NanoFlow):
    """Splits every step of two or more entries in two."""

    def start(self, limits: Limits) -> Batcher:
        return NanoFlowBatcher(cast(Planner, AnyPlace()))


class SingleBatcher(SarathiBatcher):
    def form(self, running, room) -> None:
        super().form(running, room)
        if room.entries:
            room.split(*[1] * len(room.entries), lead=len(room.entries) - 1)


class Singles(Sarathi):
    """Every entry is a part of its own."""

    def start(self, limits: Limits) -> Batcher:
        return SingleBatcher()


def request(id: object, prompt: list[int], count: int = 5, **fields) -> Request:
    return Request(str(id), prompt, SamplingParams(temperature=0, max_tokens=count, **fields))


# Outputs


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """How many parts each step had. They are computed last first: none may depend on one before it."""
    split: list[int] = []

    def backwards(runner, parts, lead):
        split.append(len(parts))
        return [runner._pass(part) for part in reversed(parts)][::-1]

    monkeypatch.setattr(Runner, "_pass_all", backwards)
    return split


@pytest.mark.parametrize("policy", [AlwaysSplit(), pytest.param(Singles(), marks=pytest.mark.slow)])
def test_the_law_of_batching_holds_in_parts_in_any_order(policy, passes):
    some = settings(max_examples=3, stateful_step_count=15, derandomize=True, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine_of(policy), settings=some)
    assert passes


@pytest.mark.parametrize("policy", [AlwaysSplit(), Singles()])
def test_every_step_of_two_or_more_is_split_and_tokens_are_those_of_each_alone(policy, passes):
    config = EngineConfig(
        batching=policy, loop="plain", tokens=24, sequences=6, block_size=4, cache_tokens=160, check=True
    )
    engine, draw = build_engine(small_model(), config), numpy_generator(0, "split")
    prompts = [[int(token) for token in draw.integers(SHAPE.vocabulary, size=draw.integers(1, 30))] for _ in range(12)]
    for place, prompt in enumerate(prompts):
        engine.add(request(place, prompt, 9))
    got: dict[str, list[int]] = {}
    entries = []
    while engine.busy:
        for delta in engine.step():
            got.setdefault(delta.id, []).extend(delta.tokens)
        entries.append(len(engine.steps.last.entries))
    assert passes == [min(count, 2) if isinstance(policy, AlwaysSplit) else count for count in entries]
    assert sum(count > 1 for count in entries) > 20
    assert got == {str(place): greedy(small_model(), prompt, 9) for place, prompt in enumerate(prompts)}


@pytest.mark.parametrize("policy", [AlwaysSplit(), Singles()])
def test_prompts_are_rated_in_parts(policy):
    draw = numpy_generator(0, "rated")
    prompts = [[int(token) for token in draw.integers(SHAPE.vocabulary, size=size)] for size in (3, 17, 1, 9, 30)]

    def told(batching) -> dict[str, list[tuple[int, float, int]]]:
        config = EngineConfig(batching=batching, tokens=16, sequences=4, block_size=4, cache_tokens=200, check=True)
        engine = build_engine(small_model(), config)
        for place, prompt in enumerate(prompts):
            engine.add(request(place, prompt, prompt_logprobs=place % 3))
        rated = {}
        while engine.busy:
            for delta in engine.step():
                if delta.prompt_logprobs is not None:
                    rated[delta.id] = [(one.token, one.logprob, one.rank) for one in delta.prompt_logprobs]
        return rated

    whole, split = told(Sarathi()), told(policy)
    assert whole.keys() == split.keys()
    for id, prompt in enumerate(prompts):
        assert [token for token, _, _ in split[str(id)]] == prompt[1:]
        for one, other in zip(whole[str(id)], split[str(id)], strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_two_passes_are_made_of_a_step_in_two_parts():
    engine = build_engine(small_model(), EngineConfig(batching=AlwaysSplit(), tokens=64, sequences=8, cache_tokens=400))
    trunk, seen = small_model().trunk, list[int]()
    engine.executor.passes._trunk = lambda tokens, context: seen.append(len(tokens)) or trunk(tokens, context)
    for place in range(4):
        engine.add(request(place, [place] * (place + 1)))
    engine.step()
    first, second = engine.steps.last.parts
    counts = [entry.count for entry in engine.steps.last.entries]
    assert seen == [sum(counts[:first]), sum(counts[first:])] and first + second == 4


# Parts


def room_of(*prompts: list[int]) -> StepRoom:
    """Room in which all ``prompts`` were taken for the first time."""
    config = EngineConfig(batching="sarathi", tokens=256, sequences=32, block_size=4, cache_tokens=800)
    engine, room = simulated_engine(config), None
    for place, prompt in enumerate(prompts):
        engine.add(request(place, prompt))
    room = StepRoom(engine.memory, engine.limits.tokens, engine.events)
    engine.steps.batcher.form([], room)
    assert len(room.entries) == len(prompts)
    return room


def test_a_room_is_split_by_entries():
    room = room_of([1], [2] * 9, [3])
    assert Batch(room.entries, np.zeros((0, 0)), parts=room.parts).parts == (3,)
    room.split(1, 2, lead=1)
    assert (room.parts, room.lead) == ((1, 2), 1)


@pytest.mark.parametrize(("counts", "lead"), [((1, 1), 0), ((2, 2), 0), ((3, 0), 0), ((4, -1), 0), ((), 0), ((3,), 1)])
def test_a_split_that_does_not_add_up_is_refused(counts, lead):
    with pytest.raises(ValueError, match="no split of 3 entries"):
        room_of([1], [2], [3]).split(*counts, lead=lead)


def test_a_cut_moves_behind_those_who_share_what_is_computed_only_now():
    shared = [7] * 9
    room = room_of([1] * 5, shared, [2], [*shared, 8], [3] * 5)
    assert room.entries[3].start == 8, "the prefix is in the tree already"
    room.split(2, 3)
    assert room.parts == (4, 1)
    room.split(1, 1, 1, 1, 1)
    assert room.parts == (1, 3, 1)
    room = room_of(shared, [*shared, 8])
    room.split(1, 1, lead=1)
    assert (room.parts, room.lead) == ((2,), 0)


def test_a_cut_moves_behind_a_pair():
    """A rule that looks at two sequences has them in one part."""
    engine = simulated_engine(EngineConfig(batching="sarathi", tokens=64, sequences=8, block_size=4, cache_tokens=200))
    engine.add(request("one", [1] * 3))
    engine.add(request("pair", [2] * 3, rule=create("decode.rule", "uscd", prompt=(4, 5))))
    engine.add(request("other", [3] * 3))
    room = StepRoom(engine.memory, engine.limits.tokens, engine.events)
    engine.steps.batcher.form([], room)
    assert [entry.count for entry in room.entries] == [3, 3, 2, 3]
    room.split(2, 2)
    assert room.parts == (3, 1)


@settings(max_examples=25)
@given(st.data())
def test_no_part_reads_what_another_writes(data):
    """Whatever shares a prefix with whatever, and wherever the cuts are meant to be."""
    config = EngineConfig(
        batching=Singles(), loop="plain", tokens=24, sequences=12, block_size=2, cache_tokens=120, check=True
    )
    engine = simulated_engine(config)
    launch = engine.executor.launch

    def checked(batch: Batch) -> Sampled:
        ends = list(itertools.accumulate(batch.parts))
        parts = [batch.entries[end - count : end] for end, count in zip(ends, batch.parts, strict=True)]
        for one, other in itertools.permutations(parts, 2):
            assert not written(one) & touched(other)
        return launch(batch)

    engine.executor.launch = checked
    prompts = st.lists(st.sampled_from([1, 1, 1, 2]), min_size=1, max_size=14)
    for round_ in range(4):
        for place, prompt in enumerate(data.draw(st.lists(prompts, max_size=5))):
            engine.add(request((round_, place), prompt, 3))
        for _ in range(data.draw(st.integers(0, 3))):
            engine.step()
    while engine.busy:
        engine.step()


def written(entries: list[Entry]) -> set[int]:
    return {
        b for each in entries for b in each.sequence.held.blocks[each.start // 2 : -(-(each.start + each.count) // 2)]
    }


def touched(entries: list[Entry]) -> set[int]:
    return {block for each in entries for block in each.sequence.held.blocks[: -(-(each.start + each.count) // 2)]}


# The policy

#: The data sheet of an H100, where nothing slows anything else.
QUICK = Rates(flops=989e12, bandwidth=3.35e12, beside=1)
QWEN3_8B = DecoderConfig(
    vocabulary=151936, hidden=4096, layers=36, heads=32, kv_heads=8, head_dim=128, ffn=12288, context=16384
)


def engine_under(policy: NanoFlow) -> Engine:
    """An engine that computes nothing, whose policy believes it is a large model's."""
    config = EngineConfig(batching="sarathi", loop="plain", tokens=2304, sequences=256, cache_tokens=2**19)
    engine = simulated_engine(config)
    engine.steps.batcher = policy.start(Limits(2304, 256, 2**15, 16, 16384, QWEN3_8B))
    return engine


def play(engine: Engine, prompts: int, length: int, steps: int) -> list[Batch]:
    for place in range(prompts):
        engine.add(request(place, [place] * length, 400))
    batches = []
    for _ in range(steps):
        engine.step()
        batches.append(engine.steps.last)
    return batches


def test_nanoflow_splits_where_decodes_and_prompts_meet():
    """256 sequences of a thousand tokens: as long as prompts come in beside them, their attention is hidden; then
    they go on in one part, since two would read the weights twice."""
    batches = play(engine_under(NanoFlow(rates=QUICK)), 256, 1000, 160)
    decodes = [sum(entry.count == 1 for entry in batch.entries) for batch in batches]
    assert all(len(batch.parts) == 1 for batch in batches if sum(e.count for e in batch.entries) == len(batch.entries))
    mixed = [batch for batch, count in zip(batches, decodes, strict=True) if 128 <= count < len(batch.entries)]
    assert len(mixed) > 40
    assert all(len(batch.parts) == 2 for batch in mixed)


@pytest.mark.parametrize("rates", [None, QUICK.model_copy(update={"beside": 0.5})])
def test_steps_stay_whole_without_rates_and_where_nothing_is_gained(rates):
    batches = play(engine_under(NanoFlow(rates=rates)), 256, 1000, 160)
    assert all(len(batch.parts) == 1 for batch in batches)


def test_rates_come_from_a_configuration():
    made = create("serve.batching", "nanoflow", rates={"flops": 6e14, "bandwidth": 2.9e12, "beside": 0.8}, gain=0.1)
    assert made == NanoFlow(rates=Rates(flops=6e14, bandwidth=2.9e12, beside=0.8), gain=0.1)
    assert create("serve.batching", "nanoflow", **{k: v for k, v in made.describe().items() if k != "name"}) == made


def test_steps_hold_what_those_of_sarathi_hold():
    draw = numpy_generator(0, "nanoflow")
    requests = [request(n, [n] * int(draw.integers(1, 200)), int(draw.integers(1, 30))) for n in range(60)]
    arrivals = draw.uniform(0, 60, size=60).tolist()
    courses = [
        simulate(
            EngineConfig(batching=policy, loop="plain", tokens=128, sequences=16, cache_tokens=4096),
            requests,
            arrivals,
            lambda step: 1.0,
        )
        for policy in (Sarathi(), AlwaysSplit())
    ]
    assert courses[0] == courses[1]


def test_few_different_steps_are_searched():
    """A search takes a millisecond or two: while 256 sequences gain 300 tokens each, few steps may need one."""
    planner = Planner(StepCost.of(QWEN3_8B, QUICK), 0.05)
    engine = engine_under(NanoFlow(rates=QUICK))
    engine.steps.batcher = NanoFlowBatcher(planner)
    play(engine, 256, 1000, 130)
    before = planner._searched.cache_info().misses
    assert before > 10
    play(engine, 0, 0, 300)
    assert planner._searched.cache_info().misses <= before + 3


def entry(start: int, count: int, scored: int = 1) -> Entry:
    return Entry(SimpleNamespace(blocks=[]), 0, start, count, scored)


def test_work_is_counted_pair_by_pair():
    entries = [entry(9, 1), entry(0, 1), entry(4, 3, 0)]
    work = work_of(entries)
    assert (work.tokens, work.scored, work.read) == (5, 2, 10 + 1)
    assert work.pairs == sum(position + 1 for position in range(4, 7))


@given(st.integers(0, 30), st.lists(st.integers(2, 500), max_size=12))
def test_cuts_lie_near_their_places(decodes, prompts):
    entries = [entry(5, 1)] * decodes + [entry(0, count) for count in prompts]
    cuts = cuts_of(entries, decodes)
    assert len(set(cuts.values())) == len(cuts)
    for place, cut in cuts.items():
        assert 0 < cut < len(entries)
        if place <= 4:
            assert abs(cut - decodes * place / 4) <= 0.5
        else:
            done = sum(prompts[: cut - decodes]) / sum(prompts)
            assert abs(done - (place - 4) / 4) <= 0.125 + 1e-9
    if decodes and prompts:
        assert cuts[4] == decodes
