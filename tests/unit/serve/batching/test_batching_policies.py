"""What each batching policy is for, on an engine that computes nothing: the checks of the papers."""

from __future__ import annotations

import itertools
import statistics

import pytest

from penstock.core.randomness import numpy_generator
from penstock.policy import create
from penstock.serve.batching.batchllm import group, schedule
from penstock.serve.batching.prefix_tree import Branch, grow
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.adapters import BASE, Adapter
from penstock.serve.engine.sequence import Sequence
from penstock.serve.messages import Request
from penstock.testing.serve_simulation import roofline, simulate, simulated_engine


def config(batching: str, *, tokens: int, sequences: int, cache: int, block_size: int = 16) -> EngineConfig:
    return EngineConfig(
        batching=create("serve.batching", batching),
        loop="plain",
        tokens=tokens,
        sequences=sequences,
        block_size=block_size,
        cache_tokens=cache,
        check=True,
    )


def request(id: object, prompt: list[int], count: int, **fields) -> Request:
    return Request(str(id), prompt, SamplingParams(temperature=0, max_tokens=count), **fields)


def sequence(prompt: list[int], count: int = 1, arrival: int = 0) -> Sequence:
    asked = request(arrival, prompt, count)
    return Sequence(asked, 0, asked.sampling, list(prompt), len(prompt) + count, arrival)


def shared_prefixes(groups: int, members: int, prefix: int, own: int, count: int) -> list[Request]:
    """Shuffled requests; each prompt is one of ``groups`` prefixes, then tokens of its own."""
    fresh = itertools.count()
    prompts = []
    for _ in range(groups):
        common = list(itertools.islice(fresh, prefix))
        prompts += [common + list(itertools.islice(fresh, own)) for _ in range(members)]
    order = numpy_generator(0, "shuffle").permutation(len(prompts))
    return [request(place, prompts[place], count) for place in order]


# Sarathi [293]


def test_sarathi_bounds_the_time_between_tokens_by_the_cost_of_a_budget():
    draw = numpy_generator(0, "sarathi")
    requests = [request(n, [n] * int(draw.integers(1, 600)), int(draw.integers(2, 60))) for n in range(40)]
    arrivals = draw.uniform(0, 400, size=40).tolist()

    def gaps(batching: str, tokens: int) -> float:
        course = simulate(
            config(batching, tokens=tokens, sequences=16, cache=32_768),
            requests,
            arrivals,
            lambda step: 0.1 * (step.decoded + step.prefilled),
        )
        return max(b - a for times in course.tokens.values() for a, b in itertools.pairwise(times))

    assert gaps("sarathi", 32) <= 0.1 * 32 + 1e-9
    assert gaps("orca", 4096) > 0.1 * 500, "whole prompts make the others wait"


# Flover [77]


def test_flover_never_mixes_its_phases_and_fuses_all_that_live():
    draw = numpy_generator(0, "flover")
    requests = [request(n, [n] * int(draw.integers(1, 30)), int(draw.integers(2, 40))) for n in range(60)]
    arrivals = draw.exponential(6.0, size=60).cumsum().tolist()
    flover = config("flover", tokens=512, sequences=64, cache=8192)
    course = simulate(flover, requests, arrivals, lambda step: 1.0)
    assert all(not (step.decoded and step.prefilled) for step in course.steps)
    # Every token but the first of each request comes from a generation step, which all that live share: there is one
    # for each instant at which anybody lives, not one for each request and token.
    generated = [step for step in course.steps if step.decoded]
    assert sum(step.decoded for step in generated) == sum(each.sampling.max_tokens - 1 for each in requests)
    instants = {time for times in course.tokens.values() for time in times[1:]}
    assert len(generated) == len(instants)
    for time in instants:
        alive = sum(times[0] < time <= times[-1] for times in course.tokens.values())
        gained = sum(time in times for times in course.tokens.values())
        assert gained == alive


def test_flover_s_latency_is_below_that_of_static_batches():
    draw = numpy_generator(1, "flover")
    requests = [request(n, [n], int(draw.integers(2, 60))) for n in range(60)]
    arrivals = draw.exponential(4.0, size=60).cumsum().tolist()
    fused, static = (
        [course.tokens[each.id][-1] - begun for each, begun in zip(requests, arrivals, strict=True)]
        for course in (
            simulate(config(name, tokens=64, sequences=8, cache=8192), requests, arrivals, lambda step: 1.0)
            for name in ("flover", "static")
        )
    )
    # A static batch takes up to eight that have arrived, and the next begins when the longest of them has ended.
    clock, by_hand = 0.0, []
    waiting = list(zip(arrivals, requests, strict=True))
    while waiting:
        clock = max(clock, waiting[0][0])
        batch = [pair for pair in waiting[:8] if pair[0] <= clock]
        waiting = waiting[len(batch) :]
        by_hand += [clock + each.sampling.max_tokens - begun for begun, each in batch]
        clock += max(each.sampling.max_tokens for _, each in batch)
    assert static == pytest.approx(by_hand)
    assert statistics.mean(fused) < 0.7 * statistics.mean(static)


# The prefix tree


def common(one: Sequence, other: Sequence, size: int) -> int:
    """Whole blocks that two prompts share before their last tokens, in tokens: by definition."""
    least = min(len(one.tokens), len(other.tokens)) - 1
    same = next((n for n in range(least) if one.tokens[n] != other.tokens[n]), max(least, 0))
    return same // size * size


def some_sequences(seed: int, count: int) -> list[Sequence]:
    draw = numpy_generator(seed, "tree")
    return [
        sequence(draw.integers(2, size=draw.integers(1, 14)).tolist(), int(draw.integers(1, 9)), arrival)
        for arrival in range(count)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_tree_says_what_every_two_prompts_share(seed):
    sequences = some_sequences(seed, 12)
    branches = grow(sequences, 2)
    root = branches[-1]
    assert root.depth == 0
    assert sorted(each.arrival for each in root.walk()) == list(range(12))
    seen = set()
    for branch in branches:
        below = [child for child in branch.children if isinstance(child, Branch)]
        assert all(child in seen and child.above == branch.depth < child.depth for child in below)
        seen.add(branch)
        homes = {each: child for child in branch.children for each in (child.walk() if child in below else [child])}
        for one, other in itertools.combinations(homes, 2):
            if homes[one] is not homes[other]:
                assert common(one, other, 2) == branch.depth


def test_a_chain_of_ten_thousand_prefixes_is_no_trouble():
    tokens = list(range(3000))
    sequences = [sequence(tokens[: 2 + place], 1, place) for place in range(2998)]
    assert len(list(grow(sequences, 1)[-1].walk())) == 2998
    assert len(list(schedule(sequences, 1))) == 2998


def test_prompts_with_different_adapters_share_nothing():
    one, other = Adapter("a", 1, b"a"), Adapter("b", 2, b"b")
    sequences = [sequence([1, 2, 3, place]) for place in range(6)]
    for place, each in enumerate(sequences):
        each.adapter = (BASE, one, other)[place % 3]
    branches = grow(sequences, 1)
    assert [branch.depth for branch in branches] == [3, 3, 3, 0]
    assert all(len({each.adapter for each in branch.walk()}) == 1 for branch in branches[:3])


# BatchLLM [235]


def saved_by(groups: list[list[Sequence]]) -> int:
    return sum(
        (len(members) - 1) * min(common(*pair, 1) for pair in itertools.combinations(members, 2))
        for members in groups
        if len(members) > 1
    )


def splits(branch: Branch) -> list[list[list[Sequence]]]:
    """All ways to make groups of a branch that batchllm considers."""
    found = []
    below = [child for child in branch.children if isinstance(child, Branch)]
    leaves = [child for child in branch.children if not isinstance(child, Branch)]
    options = {child: splits(child) for child in below}
    for joined in itertools.chain.from_iterable(itertools.combinations(below, n) for n in range(len(below) + 1)):
        rest = [options[child] for child in below if child not in joined]
        for apart in itertools.product(*rest):
            own = leaves + [each for child in joined for each in child.walk()]
            found.append([own, *itertools.chain.from_iterable(apart)] if own else [*itertools.chain(*apart)])
    return found + [
        [*([leaf] for leaf in leaves), *itertools.chain(*way)] for way in itertools.product(*options.values())
    ]


@pytest.mark.parametrize("seed", range(20))
def test_batchllm_s_groups_save_the_most(seed):
    sequences = some_sequences(seed, 9)
    groups = group(sequences, 1)
    assert sorted(each.arrival for one in groups for each in one.members) == list(range(9))
    for one in groups:
        pairs = itertools.combinations(one.members, 2)
        assert len(one.members) == 1 or one.shared == min(common(*pair, 1) for pair in pairs)
    assert saved_by([one.members for one in groups]) == max(map(saved_by, splits(grow(sequences, 1)[-1])))
    ratios = [one.decode_ratio for one in groups]
    decoded = [sum(each.limit - each.prompt for each in one.members) for one in groups]
    prefilled = [one.shared + sum(each.prompt - one.shared for each in one.members) for one in groups]
    assert ratios == pytest.approx([d / p for d, p in zip(decoded, prefilled, strict=True)])
    first = next(schedule(sequences, 1))
    assert first in max(groups, key=lambda one: one.decode_ratio).members


def test_batchllm_counts_what_forks_and_the_preempted_have_to_compute_again():
    """Of the tokens that they share, most were generated: what was given is less than what is shared."""
    sequences = [sequence([1, 2, 3, 4, place], 5, place) for place in range(2)]
    for each in sequences:
        each.prompt = 2  # as of a fork whose parent was given two tokens
    (one,) = [each for each in group(sequences, 2) if len(each.members) == 2]
    assert (one.shared, one.decode_ratio) == (4, 2 * 5 / 6)


def test_batchllm_computes_a_shared_prefix_once():
    """With a cache that holds a few groups, where first come, first served evicts prefixes and computes them
    again; and no step more is needed, and no block more."""
    requests = shared_prefixes(groups=24, members=12, prefix=256, own=16, count=24)
    ours, first_come = (
        simulate(config(name, tokens=256, sequences=64, cache=4096), requests, None, lambda step: 1.0)
        for name in ("batchllm", "sarathi")
    )
    assert ours.prefilled == 24 * 256 + 24 * 12 * 16
    assert ours.cached == 24 * 11 * 256
    assert first_come.prefilled > 2 * ours.prefilled
    assert len(ours.steps) < len(first_come.steps)
    assert max(ours.held) <= max(first_come.held)


def test_batchllm_starts_what_decodes_long_first():
    """So that its decodes mix with the prompts that come later."""
    long = [request(f"long {n}", [n] * 8, 200) for n in range(8)]
    short = [request(f"short {n}", [100 + n] * 400, 4) for n in range(40)]
    courses = [
        simulate(config(name, tokens=64, sequences=16, cache=32_768), [*short, *long], None, lambda step: 1.0)
        for name in ("batchllm", "sarathi")
    ]
    ours, first_come = (len(course.steps) for course in courses)
    assert ours < 0.8 * first_come


# BlendServe [230]


def diverse(seed: int) -> list[Request]:
    """Of sixteen prefixes, half are of requests that read much and say little, and half of those that say much."""
    draw = numpy_generator(seed, "diverse")
    requests = []
    for place in range(160):
        prefix = [1000 + place % 16] * 64
        heavy = place % 16 < 8
        own = [5000 + place] * int(draw.integers(300, 500) if heavy else draw.integers(8, 24))
        requests.append(request(place, prefix + own, int(draw.integers(2, 6) if heavy else draw.integers(100, 200))))
    return requests


def test_blendserve_overlaps_compute_and_memory():
    """Between the bound that no order beats and the depth-first order of the same prompts, with as many tokens from
    the cache, up to a tenth."""
    requests = diverse(0)
    depth_first = sorted(requests, key=lambda each: each.prompt)
    # There, all that is short of compute may come first, and all that is short of memory after it.
    cost = roofline(compute=1.0, memory=0.02)
    blended, plain = (
        simulate(config(name, tokens=128, sequences=32, cache=32_768), order, None, cost)
        for name, order in (("blendserve", requests), ("sarathi", depth_first))
    )
    assert sorted(blended.tokens) == sorted(plain.tokens)
    assert all(len(blended.tokens[each.id]) == each.sampling.max_tokens for each in requests)
    compute = sum(step.decoded + step.prefilled for step in blended.steps)
    memory = 0.02 * sum(step.read for step in blended.steps)
    assert max(compute, memory) <= blended.seconds < 0.85 * plain.seconds
    assert blended.cached >= 0.9 * plain.cached


# What waits


@pytest.mark.parametrize("batching", ["batchllm", "blendserve"])
def test_the_urgent_go_first_and_late_comers_make_the_next_wave(batching):
    engine = simulated_engine(config(batching, tokens=16, sequences=1, cache=512))
    order = []

    def play(steps: int) -> None:
        for _ in range(steps):
            order.extend(delta.id for delta in engine.step() if delta.finish)

    for place in range(4):
        engine.add(request(f"later {place}", [place] * 4, 3, priority=1))
        engine.add(request(f"first {place}", [place] * 4, 3))
    play(1)
    engine.add(request("late", [9] * 4, 3))
    play(100)
    assert not engine.busy
    words = [id.split()[0] for id in order]
    assert words == ["first"] * 4 + ["late"] + ["later"] * 4
