"""Orders of eviction against what their papers say of them, and Belady's optimum."""

from __future__ import annotations

import numpy as np
import pytest

from penstock.core.randomness import numpy_generator
from penstock.policy import create
from penstock.serve.kv.evictions.contract import Order, Tree
from penstock.serve.kv.evictions.lru import RecentOrder
from penstock.serve.kv.evictions.ranked import Memories
from penstock.serve.kv.evictions.succinct import MarkingOrder
from penstock.serve.kv.pool import ROOT, BlockPool, name_behind
from penstock.serve.kv.simulator import Simulator, Trace, names, optimum, play

BLOCKS = 8


def zipf(count: int, texts: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Texts of one token, the n-th as often as 1 / n."""
    draw = numpy_generator(seed, "tests/evictions")
    chances = 1 / np.arange(1, texts + 1)
    return [(int(text),) for text in draw.choice(texts, size=count, p=chances / chances.sum())]


def marking(trace: Trace, bits: list[bool]) -> int:
    """Misses of marking with the prediction ``bits[t]`` for the text at t."""
    now = 0

    def start(tree: Tree) -> Order:
        return MarkingOrder(tree, lambda block: bits[now], numpy_generator(0, "tests/marking"))

    simulator = Simulator(BLOCKS, 1, start)
    for now, text in enumerate(trace):  # noqa: B007 - the prediction looks at it
        simulator.request(text)
    return simulator.found.misses


def belady_bits(trace: Trace) -> list[bool]:
    """For each text, whether Belady's optimum evicts it before it comes again."""
    kept: dict[int, int] = {}
    discard = [True] * len(trace)
    for time, (text,) in enumerate(trace):
        if text in kept:
            discard[kept[text]] = False
        elif len(kept) == BLOCKS:
            later = [(token,) for token in kept]
            farthest = max(later, key=lambda each: next((t for t in range(time, len(trace)) if trace[t] == each), 1e9))
            del kept[farthest[0]]
        kept[text] = time
    return discard


def test_bits_from_the_optimum_give_the_optimum_and_wrong_ones_cost_smoothly():
    trace = zipf(1500, 40)
    bits = belady_bits(trace)
    best = optimum(trace, BLOCKS, 1).misses
    plain = marking(trace, [False] * len(trace))
    assert marking(trace, bits) == best < plain
    draw, before = numpy_generator(1, "tests/flips"), best
    for share in (0.05, 0.2, 0.5):
        flipped = [bit != bool(draw.random() < share) for bit in bits]
        misses, wrong = marking(trace, flipped), sum(one != other for one, other in zip(bits, flipped, strict=True))
        assert before <= misses <= best + wrong, "no wrong bit costs more than a miss"
        before = misses
    harmonic = sum(1 / rank for rank in range(1, BLOCKS + 1))
    assert marking(trace, [not bit for bit in bits]) <= best + bits.count(False) + 2 * harmonic * bits.count(True)


def test_least_expected_cost_keeps_what_brute_force_keeps_once_frequencies_are_known():
    """Six texts of known frequencies, of which three fit: LEC comes to miss no more than those that are left out, which
    are the rarest, and less than the least recently used does."""
    trace = zipf(4000, 6)
    late = trace[2000:]
    simulator = Simulator(3, 1, create("kv.eviction", "lec").start)
    for text in trace[:2000]:
        simulator.request(text)
    warm = simulator.found.misses
    for text in late:
        simulator.request(text)
    misses = simulator.found.misses - warm
    # What comes is put into the cache in any case: two are kept for good.
    counts = sorted((late.count((text,)) for text in range(6)), reverse=True)
    assert misses <= sum(counts[2:])
    assert play(trace, 3, 1, RecentOrder).misses > simulator.found.misses


@pytest.mark.parametrize("name", ["gdsf", "lec"])
def test_the_dearer_of_two_goes_later(name):
    """The end of a long text is kept before that of a short one that came as often."""
    policy = create("kv.eviction", name, even=1)
    simulator = Simulator(6, 1, policy.start)
    for text in [(1, 2, 3, 4), (5,), (6,), (7,)]:
        simulator.request(text)
    assert len(simulator.pool.match((1, 2, 3, 4), 4)) == 4
    assert not simulator.pool.match((5,), 1)


def test_what_was_worth_much_long_ago_goes_in_the_end():
    """GDSF's level rises with each eviction, LEC's does not."""
    trace = [(0,)] * 20 + [(text,) for text in range(1, 60)]
    kept = {}
    for name in ("gdsf", "lec"):
        simulator = Simulator(3, 1, create("kv.eviction", name).start)
        for text in trace:
            simulator.request(text)
        kept[name] = simulator.pool.match((0,), 1)
    assert kept["lec"] and not kept["gdsf"]


def test_memory_of_evicted_blocks_is_bounded():
    memories = Memories(3)
    for number in (*range(5), 2):
        memories.write(bytes([number]), number + 1)
    memories.write(b"new", 9)
    assert [memories.read(bytes([number])) for number in range(5)] == [0, 0, 3, 0, 5]


def test_stale_entries_of_a_heap_are_cleared_up():
    """Nothing is ever evicted here, and blocks come and go."""
    simulator = Simulator(8, 1, create("kv.eviction", "gdsf").start)
    for _ in range(200):
        simulator.request((1, 2, 3))
    assert len(simulator.pool._idle._heap) < 40


def test_a_block_is_named_by_all_that_is_before_it():
    pool = BlockPool(4, 2)
    first, second, other = pool.take(3)
    node = pool.commit(ROOT, (1, 2), first)
    pool.commit(node, (3, 4), second)
    pool.commit(ROOT, (3, 4), other)
    assert pool.name(second) == name_behind(name_behind(b"", (1, 2)), (3, 4))
    assert [pool.name(first), pool.name(second)] == list(names([1, 2, 3, 4, 5], 2))
    assert pool.name(other) not in (pool.name(first), pool.name(second))


def test_nothing_is_put_under_what_has_left_the_tree():
    """A sequence computed its first block itself, as another did; when the other's is evicted, what it led to is gone,
    and what follows hangs nowhere."""
    pool = BlockPool(4, 1)
    twin, own, below = pool.take(3)
    node = pool.commit(ROOT, (1,), twin)
    assert pool.commit(ROOT, (1,), own) == node
    under = pool.commit(node, (2,), below)
    pool.release([twin])
    assert pool.match((1, 2), 2) == [twin, below]
    assert set(pool.take(2)) == {3, twin}
    assert not pool.known(below) and pool.commit(under, (3,), own) == under and not pool.known(own)
    pool.check([[3, twin], [own, below]])
