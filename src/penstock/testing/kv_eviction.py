"""The law of ``kv.eviction``.

Bugs that its clauses are there to catch:

- the example: a block that goes too early or too late by the policy's own rule; a count that forgets, or does not.
- the machine over the pool: a block that is lost, evicted twice or while somebody holds it; one that goes before what
  it leads to, which is then found no more; an order that knows blocks which are none of its own.
- Belady's optimum: hits that there were not; an optimum that is none.
"""

from __future__ import annotations

import functools
import itertools

from penstock.core.randomness import numpy_generator
from penstock.serve.kv.evictions.contract import Eviction
from penstock.serve.kv.pool import BlockPool
from penstock.serve.kv.simulator import Simulator, Trace, names, optimum, play


def check(eviction: Eviction) -> None:
    """Asserts the law of ``kv.eviction``."""
    check_example(eviction)
    for seed in range(12):
        check_books(eviction, seed)
    for seed in range(40):
        check_optimum(eviction, seed)


def check_example(eviction: Eviction) -> None:
    """Of one trace, the policy keeps what it says."""
    example = eviction.example()
    simulator = Simulator(example.blocks, 1, example.eviction.start)
    for text in example.texts:
        simulator.request(text)
    prefixes = {text[:end] for text in example.texts for end in range(1, len(text) + 1)}
    kept = {prefix for prefix in prefixes if len(simulator.pool.match(prefix, len(prefix))) == len(prefix)}
    assert kept == example.kept, f"{sorted(kept)} is kept in the example, and not {sorted(example.kept)}"


def check_books(eviction: Eviction, seed: int, steps: int = 150) -> None:
    """Sequences that overlap come, grow and go, some of which compute themselves what others have; after each step the
    books are compared with them, a leaf has gone before what leads to it, and a text is found where it was put."""
    draw = numpy_generator(seed, "testing/kv.eviction")
    pool = BlockPool(12, 2, eviction.start)
    pool.on_evict = functools.partial(check_leaf, pool)
    holding: list[list[int]] = []
    texts: dict[int, tuple[int, ...]] = {}
    for _ in range(steps):
        if holding and draw.random() < 0.45:
            pool.release(holding.pop(int(draw.integers(len(holding)))))
        else:
            text = [int(token) for token in draw.integers(2, size=2 * int(draw.integers(1, 6)))]
            found = pool.match(text, len(text))
            assert all(texts[block] == tuple(text[: 2 * index + 2]) for index, block in enumerate(found))
            held = found[: int(draw.integers(len(found) + 1))] if draw.random() < 0.3 else found
            if pool.available < len(text) // 2 - len(held) + pool.idle_among(held):
                continue
            pool.share(held)
            holding.append(held + pool.take(len(text) // 2 - len(held)))
            node = pool.node_of(held[-1] if held else None)
            for index in range(len(held), len(text) // 2):
                block = holding[-1][index]
                node = pool.commit(node, text[2 * index : 2 * index + 2], block)
                if pool.known(block):
                    texts[block] = tuple(text[: 2 * index + 2])
        pool.check(holding)


def check_leaf(pool: BlockPool, block: int) -> None:
    """No idle block hangs under the one that is evicted."""
    assert not any(
        pool.idle_among([each]) for each in range(pool.blocks) if pool.known(each) and pool.parent(each) == block
    ), "a block goes before what it leads to"


def check_optimum(eviction: Eviction, seed: int) -> None:
    """On a small trace the policy misses no less than Belady's rule, which misses as little as can be."""
    draw = numpy_generator(seed, "testing/kv.eviction/optimum")
    trace = [tuple(draw.integers(2, size=int(draw.integers(1, 4))).tolist()) for _ in range(10)]
    best = optimum(trace, 4, 1)
    least = fewest_misses(trace, 4)
    assert best.misses == least, f"Belady's rule misses {best.misses} blocks, and {least} can be had"
    found = play(trace, 4, 1, eviction.start)
    assert found.hits + found.misses == sum(map(len, trace))
    assert found.misses >= least, f"{found.misses} misses are fewer than can be had, {least}"


def fewest_misses(trace: Trace, blocks: int) -> int:
    """By brute force over all that could be kept after each text, with one token in a block."""
    wanted = [frozenset(names(text, 1)) for text in trace]

    @functools.cache
    def least(time: int, kept: frozenset[bytes]) -> int:
        if time == len(wanted):
            return 0
        own = wanted[time]
        others = kept - own
        room = min(len(others), blocks - len(own))
        rest = min(least(time + 1, own | set(chosen)) for chosen in itertools.combinations(sorted(others), room))
        return len(own - kept) + rest

    return least(0, frozenset())
