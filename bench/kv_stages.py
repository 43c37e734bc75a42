"""Compression as a stage of its own (FastCache): caches that are compressed together and one by one, and what that
makes of the time to the first token.

Measured: how long python-6m's engine takes to compress so many caches of 448 tokens to a quarter, by the votes of the
last queries, in one stage and one after the other; and requests that arrive at once, by `fastcache`, which gathers
prompts, and by `sarathi`. Simulated: the three queues, with what a batch of prompts, of caches and of decodes was
measured to take, and requests that arrive at random.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from typing import Any

import numpy as np
import torch

from penstock.core.bench import Bench
from penstock.core.randomness import numpy_generator
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.serve.batching.stages import Arrival, Queues, Stage
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.kv.compaction import Compaction, Compactor
from penstock.serve.messages import Request

MODEL, IN, OUT = "python-6m", 448, 64
KV: dict[str, Any] = {"name": "snapkv", "budget": 0.25, "every": 64}
#: Caches that are compressed together; requests that arrive at once, and at random.
TOGETHER, CROWD, TRACE = (2, 8, 32), 32, 400
#: Of what the device could prefill, how much arrives.
LOADS = (0.3, 0.5)
REPEATS = 5
#: The two ways of compressing, as the paper compares them, and what is measured.
WAYS: dict[str, Any] = {"subject": "together", "peer": "one by one", "papers": (276,)}
COMPRESSION: dict[str, Any] = {"metric": "compression", "unit": "ms", "better": "lower"}
FIRST: dict[str, Any] = {"metric": "time to the first token, in the mean", "unit": "ms", "better": "lower"}


def prompts(count: int) -> list[list[int]]:
    """So many, with nothing in common."""
    draw = numpy_generator(0, "bench/kv_stages")
    return [[int(token) for token in draw.integers(4, 4000, size=IN)] for _ in range(count)]


def opened(model: Decoder, batching: str, sequences: int = 64) -> Engine:
    return build_engine(
        model,
        EngineConfig.model_validate(
            {
                "kv": KV,
                "batching": batching,
                "loop": "plain",
                "cache_tokens": 2 * max(TOGETHER) * (IN + OUT),
                "sequences": sequences,
                "tokens": 4 * IN,
            }
        ),
    )


def compactor_of(engine: Engine) -> Compactor:
    found: Compactor = engine.executor._compactor  # type: ignore[attr-defined]
    return found


def works(engine: Engine, count: int) -> list[Compaction]:
    """So many caches, each in blocks of its own."""
    kept, size = int(KV["budget"] * IN), engine.limits.block_size
    places = np.arange(count * (IN + kept)).reshape(count, IN + kept) + size
    return [Compaction(slot, IN, 0, 0, row[:IN], row[IN:]) for slot, row in enumerate(places)]


@torch.inference_mode()
def compressing(bench: Bench, compactor: Compactor, todo: list[Compaction], each: int) -> float:
    """Milliseconds in which all of ``todo`` are compressed, ``each`` at a time."""
    pieces = [todo[first : first + each] for first in range(0, len(todo), each)]
    return 1000 * bench.seconds(lambda: [compactor.compact(piece) for piece in pieces])


def answered(engine: Engine, todo: list[list[int]]) -> float:
    """Seconds to the first token, in the mean over requests that come at once."""
    begun, first = time.perf_counter(), dict[str, float]()
    for number, prompt in enumerate(todo):
        sampling = SamplingParams(temperature=0, max_tokens=OUT, ignore_eos=True)
        engine.add(Request(str(number), prompt, sampling))
    while engine.busy:
        for delta in engine.step():
            if delta.tokens:
                first.setdefault(delta.id, time.perf_counter() - begun)
    engine.memory.pool.forget()
    return statistics.fmean(first.values())


def stage_of(small: float, large: float, count: int, units: int, most: int) -> Stage:
    """One that takes so many seconds for one in its batch, and for ``count``, of so many ``units`` each."""
    each = max(0.0, (large - small) / (count - 1) / units)
    return Stage(max(0.0, small - each * units), each, most)


def steps(engine: Engine, count: int) -> tuple[float, float]:
    """Seconds of a step with ``count`` prompts, and of one in which as many decode."""
    for number, prompt in enumerate(prompts(count)):
        engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=OUT, ignore_eos=True)))
    times = []
    while engine.busy:
        engine.step()
        times.append((engine.steps.last.tokens, engine.steps.last.seconds))
    engine.memory.pool.forget()
    prefill = statistics.fmean(seconds for tokens, seconds in times if tokens == count * IN)
    return prefill, statistics.median(seconds for tokens, seconds in times if tokens == count)


def simulated(bench: Bench, engine: Engine, compressed: dict[int, float]) -> None:
    """The time to the first token where caches are compressed together and one by one."""
    (alone, one), (four, others) = steps(engine, 1), steps(engine, 4)
    prefill = stage_of(alone, four, 4, IN, 4)
    decode = stage_of(one, others, 4, 1, 64)
    most = max(compressed)
    draw = numpy_generator(0, "bench/kv_stages/arrivals")
    for load in LOADS:
        gaps = draw.exponential(alone / load, size=TRACE)
        trace = [Arrival(float(moment), IN, OUT) for moment in itertools.accumulate(gaps)]
        found = {}
        for together in (1, most):
            compression = stage_of(compressed[1], compressed[most], most, 1, together)
            served = Queues(prefill, compression, decode).play(trace)
            found[together] = 1000 * statistics.fmean(each.first for each in served)
        setting = f"{MODEL} in three queues, {load:.0%} of what it can prefill arrives"
        told = {"value": found[most], "peer_value": found[1], "ratio": found[most] / found[1]}
        bench.row(setting=setting, **WAYS, **FIRST, **told, simulated=True)


def stage(bench: Bench, engine: Engine) -> dict[int, float]:
    """The seconds in which so many caches are compressed together, and one alone."""
    answered(engine, prompts(2))  # by then the queries' places and scales are known
    compactor, compressed = compactor_of(engine), dict[int, float]()
    for count in TOGETHER[: 1 if bench.quick else None]:
        todo, setting = works(engine, count), f"{MODEL}, {count} caches of {IN} tokens"
        runs = {
            name: functools.partial(compressing, bench, compactor, todo, each)
            for name, each in (("together", count), ("one by one", 1))
        }
        values = bench.turns(runs, setting, REPEATS)
        compressed[count] = statistics.median(values["together"]) / 1000
        compressed[1] = statistics.median(values["one by one"]) / count / 1000
        told = {"values": values["together"], "peer_values": values["one by one"]}
        bench.compared(setting=setting, **WAYS, **COMPRESSION, **told)
    return compressed


def crowds(bench: Bench, engines: dict[str, Engine]) -> None:
    """The time to the first token of requests that come at once, by policy of the batches."""
    todo = prompts(4 if bench.quick else CROWD)
    setting = f"{MODEL}, {len(todo)} requests of {IN} + {OUT} tokens at once, 25% kept"
    runs = {name: functools.partial(answered, engine, todo) for name, engine in engines.items()}
    told = bench.turns(runs, setting, 3)
    values = {name: [1000 * each for each in own] for name, own in told.items()}
    told = {"values": values["fastcache"], "peer_values": values["sarathi"]}
    bench.compared(subject="fastcache", peer="sarathi", setting=setting, papers=(276,), **FIRST, **told)


def main(bench: Bench) -> None:
    """Measures the stage, then requests, then plays the queues."""
    model = hub.load(MODEL, device=bench.device, dtype=torch.float32).eval()
    engines = {name: opened(model, name) for name in ("fastcache", "sarathi")}
    compressed = stage(bench, engines["fastcache"])
    crowds(bench, engines)
    simulated(bench, engines["fastcache"], compressed)
