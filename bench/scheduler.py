"""What a step costs the host beside the model: with 64 sequences decoding, and 10 to 100,000 that wait; and what
log-probabilities of 128 decoding sequences add, up to the bytes that leave the engine's process."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import numpy as np

from penstock.core.bench import Bench
from penstock.serve.batching.contract import Batching
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.link.wire import News, body
from penstock.serve.messages import Request
from penstock.testing.enrolled import enrolled
from penstock.testing.serve_simulation import simulated_engine

RUNNING, STEPS = 64, 200

#: Sequences that decode with log-probabilities, and the alternatives of each token.
TOLD, ALTERNATIVES = 128, 5


def loaded(batching: Batching, waiting: int) -> Engine:
    """An engine whose model takes no time, with 64 sequences decoding without end and others that wait."""
    config = EngineConfig(
        batching=batching, tokens=2048, sequences=RUNNING, block_size=16, cache_tokens=RUNNING * 2048, context=1024
    )
    engine, fresh = simulated_engine(config), itertools.count()
    for number in range(RUNNING + waiting):
        prompt = [next(fresh) % 1000 for _ in range(64)]
        engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=900), key=str(number % 8)))
    while len(engine.memory.running) < RUNNING or any(not each.decoding for each in engine.memory.running):
        engine.step()
    return engine


def step_seconds(step: Callable[[], object]) -> float:
    """Median of the time of a ``step``."""
    times = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def told_seconds(logprobs: int | None) -> float:
    """Median of the time of a step of sequences that decode with so many ``logprobs``, until its news are bytes."""
    config = EngineConfig(tokens=2048, sequences=TOLD, block_size=16, cache_tokens=TOLD * 1024, context=1024)
    engine = simulated_engine(config)
    for number in range(TOLD):
        sampling = SamplingParams(temperature=0, max_tokens=900, logprobs=logprobs)
        engine.add(Request(str(number), [number, 1, 2, 3], sampling))
    while len(engine.memory.running) < TOLD or any(not each.decoding for each in engine.memory.running):
        engine.step()
    return step_seconds(lambda: body(News(engine.step())))


def main(bench: Bench) -> None:
    """Measures the batching policies; the slope is that of the time of a step over the number of those that wait."""
    bench.compare(
        subject=f"with {ALTERNATIVES} log-probabilities",
        peer="without",
        setting=f"{TOLD} decoding, news of a step as bytes",
        metric="host time of a step",
        unit="ms",
        better="lower",
        run=lambda: 1e3 * told_seconds(ALTERNATIVES),
        peer_run=lambda: 1e3 * told_seconds(None),
    )
    counts = [10, 100, 1000] if bench.quick else [10, 100, 1000, 10_000, 100_000]
    # Without rates of a device, nanoflow forms the batches of sarathi: it would be the same figure under another name.
    policies = {name: batching for name, batching in enrolled("serve.batching").items() if name != "nanoflow"}
    for name, batching in policies.items():
        assert isinstance(batching, Batching)
        medians = []
        for waiting in counts:
            begun = time.perf_counter()
            engine = loaded(batching, waiting)
            taken_in = time.perf_counter() - begun
            medians.append(step_seconds(engine.step))
            setting = f"{RUNNING} decoding, {waiting:,} waiting"
            bench.row(
                subject=name,
                setting=setting,
                metric="host time of a step",
                unit="ms",
                better="lower",
                value=1e3 * medians[-1],
                repetitions=STEPS,
            )
            bench.row(
                subject=name,
                setting=setting,
                metric="taking in a request",
                unit="ms",
                better="lower",
                value=1e3 * taken_in / (RUNNING + waiting),
            )
        slope = float(np.polyfit(counts, 1e6 * np.array(medians), 1)[0])
        bench.row(
            subject=name,
            setting=f"{counts[0]} to {counts[-1]:,} waiting",
            metric="slope of a step's host time over those that wait",
            unit="µs each",
            better="lower",
            value=slope,
        )
