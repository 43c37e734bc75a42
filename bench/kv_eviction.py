"""What each order of eviction finds in the prefix tree, on a Zipf and a multi-turn trace, beside Belady's optimum."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from penstock.core.bench import Bench
from penstock.core.randomness import numpy_generator
from penstock.serve.kv.evictions.contract import Eviction
from penstock.serve.kv.simulator import Found, Simulator, Trace, names, optimum
from penstock.testing.enrolled import enrolled

#: A number of these traces stands for a block of tokens.
REQUESTS = 1500

#: Pools, as shares of the blocks that a trace has in all.
SHARES = (0.05, 0.2)

#: Blocks of context for which attention to them costs as much as everything else that a token takes; see ``gdsf``.
EVEN = 1536


def zipf_trace(requests: int) -> Iterator[tuple[int, ...]]:
    """Questions, each its own, about one of 500 documents of 4 to 128 blocks, the n-th as often as 1 / n."""
    draw, fresh = numpy_generator(0, "bench/kv_eviction/zipf"), itertools.count()
    documents = [tuple(itertools.islice(fresh, int(size))) for size in draw.integers(4, 129, size=500)]
    chances = 1 / np.arange(1, len(documents) + 1)
    for document in draw.choice(len(documents), size=requests, p=chances / chances.sum()):
        yield documents[document] + tuple(itertools.islice(fresh, int(draw.integers(1, 9))))


def multi_turn_trace(requests: int) -> Iterator[tuple[int, ...]]:
    """Conversations, 100 at a time, of which any may speak next; each begins with one of four system prompts of 16
    blocks, grows by 2 to 24 blocks a turn, and ends after a turn out of six."""
    draw, fresh = numpy_generator(0, "bench/kv_eviction/turns"), itertools.count()
    prompts = [tuple(itertools.islice(fresh, 16)) for _ in range(4)]
    texts = [prompts[int(draw.integers(4))] for _ in range(100)]
    for _ in range(requests):
        speaker = int(draw.integers(len(texts)))
        texts[speaker] += tuple(itertools.islice(fresh, int(draw.integers(2, 25))))
        yield texts[speaker]
        if draw.random() < 1 / 6:
            texts[speaker] = prompts[int(draw.integers(4))]


def recomputed(trace: Trace, blocks: int, eviction: Eviction) -> tuple[Found, float]:
    """What ``eviction`` finds of ``trace``, and what it costs to compute the rest: 1 for a first block, and more with
    the context that a block looks back at."""
    simulator, cost = Simulator(blocks, 1, eviction.start), 0.0
    for text in trace:
        before = simulator.found.hits
        simulator.request(text)
        first = simulator.found.hits - before
        cost += sum(1 + depth / EVEN for depth in range(first, len(text)))
    return simulator.found, cost


def main(bench: Bench) -> None:
    """Plays the traces on the books of a pool alone: no model is needed to know what would be found."""
    requests = 300 if bench.quick else REQUESTS
    traces: dict[str, Callable[[int], Iterator[tuple[int, ...]]]] = {"Zipf": zipf_trace, "multi-turn": multi_turn_trace}
    policies = {name: each for name, each in enrolled("kv.eviction").items() if isinstance(each, Eviction)}
    for called, make in traces.items():
        trace = list(make(requests))
        distinct = len({name for text in trace for name in names(text, 1)})
        longest = max(map(len, trace))
        for share in SHARES:
            blocks = max(longest, round(share * distinct))
            setting = f"{called}, a pool of {share:.0%} of the blocks"
            found = {name: recomputed(trace, blocks, policy) for name, policy in policies.items()}
            rates = {name: each.rate for name, (each, _) in found.items()}
            rates["Belady's optimum"] = optimum(trace, blocks, 1).rate
            for name, rate in rates.items():
                bench.row(subject=name, setting=setting, metric="hit rate", unit="%", value=100 * rate)
            for name in ("gdsf", "lec"):
                bench.compared(
                    subject=name,
                    peer="lru",
                    setting=setting,
                    metric="cost of what is computed again",
                    unit="blocks",
                    better="lower",
                    values=[found[name][1]],
                    peer_values=[found["lru"][1]],
                )
