"""What a step costs the host beside the model: with 64 sequences decoding, and 10 to 100,000 that wait."""

from __future__ import annotations

import itertools
import statistics
import time

import numpy as np

from penstock.core.bench import Bench
from penstock.serve.batching.contract import Batching
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.testing.enrolled import enrolled
from penstock.testing.serve_simulation import simulated_engine

RUNNING, STEPS = 64, 200


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


def step_seconds(engine: Engine) -> float:
    """Median of the time of a step."""
    times = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def main(bench: Bench) -> None:
    """Measures the batching policies; the slope is that of the time of a step over the number of those that wait."""
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
            medians.append(step_seconds(engine))
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
