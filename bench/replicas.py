"""Several engines with the same model behind one router: conversations of several turns, by each policy, and beside one
engine.

On CUDA random weights in the shape of Qwen3-0.6B, bf16, an engine on each of two GPUs; on the CPU python-6m in fp32,
two engines that have half of the cores each. The next turn of a conversation comes when the one before is answered,
and begins with all that was said.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import aclosing

import torch

from penstock.core.bench import Bench, load
from penstock.core.errors import UsageError
from penstock.models import hub
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.link.client import EngineClient
from penstock.serve.messages import Request
from penstock.serve.replicas.config import Replication
from penstock.serve.replicas.replicas import Replicas

COUNT = 2
POLICIES = ("prefix", "least_loaded", "round_robin")

Engines = EngineClient | Replicas


def main(bench: Bench) -> None:
    """Measures the policies, and one engine, in turn."""
    on_cuda = bench.device.type == "cuda"
    if on_cuda and torch.cuda.device_count() < COUNT:
        raise UsageError(f"this benchmark needs {COUNT} CUDA devices")
    shape = "Qwen3-0.6B shape" if on_cuda else "python-6m"
    with contextlib.ExitStack() as opened:
        stored = load("tensor_parallel").stored
        folder = opened.enter_context(stored(shape, bench.device)) if on_cuda else hub.resolve(shape)
        asyncio.run(measured(bench, shape, str(folder)))


async def measured(bench: Bench, shape: str, folder: str) -> None:
    """All rows."""
    on_cuda = bench.device.type == "cuda"
    config = EngineConfig(sequences=64 if on_cuda else 8, cache_tokens=131_072 if on_cuda else 8_192)
    device = bench.device.type
    engines: dict[str, Engines] = {"one engine": await EngineClient.open(folder, config, device)}
    try:
        for name in POLICIES:
            replication = Replication.model_validate({"replicas": COUNT, "routing": name})
            engines[name] = await Replicas.open(folder, config, replication, device)
        count, turns = (128, 6) if on_cuda and not bench.quick else (12, 3)
        setting = f"{shape}: {count} conversations of {turns} turns"
        seeds = iter(range(1 << 30))
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in engines}
        for repetition in range(2 if bench.quick else 4):
            for name, each in engines.items():
                figures = await conversations(each, next(seeds), count, turns)
                if repetition:  # the first one warms up
                    found[name].append(figures)
    finally:
        for each in engines.values():
            await each.close()
    told(bench, setting, found)


def told(bench: Bench, setting: str, found: dict[str, list[tuple[float, float, float]]]) -> None:
    """Rows of throughput beside one engine, and of each policy beside round robin."""
    for name in POLICIES:
        compare(bench, setting, found, name, "one engine", 0)
    for name in POLICIES[:-1]:
        for place in (1, 2):
            compare(bench, setting, found, name, POLICIES[-1], place)


#: What :func:`conversations` gives: metric, unit, and which is better.
FIGURES = (
    ("throughput", "tokens/s", "higher"),
    ("time to first token, mean", "ms", "lower"),
    ("prompt tokens computed", "tokens", "lower"),
)


def compare(
    bench: Bench,
    setting: str,
    found: dict[str, list[tuple[float, float, float]]],
    name: str,
    peer: str,
    place: int,
) -> None:
    """A row of the figure at ``place``."""
    metric, unit, better = FIGURES[place]
    bench.compared(
        subject=f"{COUNT} replicas, {name}",
        peer=peer if place == 0 else f"{COUNT} replicas, {peer}",
        setting=setting,
        metric=metric,
        unit=unit,
        better=better,  # type: ignore[arg-type]
        values=[each[place] for each in found[name]],
        peer_values=[each[place] for each in found[peer]],
        papers=[297] if name == "prefix" and place else [],
    )


async def conversations(engines: Engines, seed: int, count: int, turns: int) -> tuple[float, float, float]:
    """Tokens a second, milliseconds to first tokens in the mean, and tokens of prompts that were computed."""
    draw = random.Random(seed)
    plans = [list(plan(draw, turns)) for _ in range(count)]
    begun = time.perf_counter()
    results = await asyncio.gather(*(held(engines, f"{seed}-{number}", each) for number, each in enumerate(plans)))
    seconds = time.perf_counter() - begun
    waits = [wait for own, _, _ in results for wait in own]
    answered, computed = (sum(each[place] for each in results) for place in (1, 2))
    return answered / seconds, 1000 * statistics.fmean(waits), computed


def plan(draw: random.Random, turns: int) -> Iterator[tuple[list[int], int]]:
    """What is said in each turn, and how many tokens are wanted after it."""
    for _ in range(turns):
        yield [draw.randrange(3, 4000) for _ in range(draw.randint(32, 192))], draw.randint(16, 96)


async def held(engines: Engines, id: str, turns: list[tuple[list[int], int]]) -> tuple[list[float], int, int]:
    """A conversation: seconds to the first token of each turn, tokens of answers, and those of prompts that were not in
    the cache."""
    text, waits, answered, computed = list[int](), list[float](), 0, 0
    for number, (said, wanted) in enumerate(turns):
        text += said
        sampling = SamplingParams(temperature=0.6, max_tokens=wanted, ignore_eos=True, seed=number)
        begun, first, cached = time.perf_counter(), None, 0
        async with aclosing(engines.stream(Request(f"{id}/{number}", list(text), sampling))) as news:
            given = len(text)
            async for delta in news:
                first = first or time.perf_counter() - begun
                cached = max(cached, delta.cached)
                text += delta.tokens
        waits.append(first or 0.0)
        answered += wanted
        computed += given - cached
    return waits, answered, computed
