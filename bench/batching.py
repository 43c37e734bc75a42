"""Batching policies on one engine, each under the load that its paper speaks of, beside that paper's baseline.

Five loads, all greedy, of random tokens that no two runs share, so that no run finds another's prefixes in the cache:

- long prompts arrive among sequences that decode (Sarathi-Serve, beside Orca);
- groups of requests share a prefix, shuffled, and the cache has no room for all prefixes at once (BatchLLM);
- requests that read much in and write little, and the other way round (BlendServe; NanoFlow at rates of the device,
  told that what overlaps slows nothing, since at the measured rates it splits no step);
- requests that arrive over time, with answers of any length (Flover, beside static batches, as FasterTransformer's, and
  beside answering one after the other);
- bursts of prompts whose caches are compressed to a quarter (FastCache, beside Sarathi with the same compression).

On the CPU the parts of NanoFlow's steps are computed one after the other: what it shows there is what splitting costs.

On the CPU the model is python-1m, on CUDA one with random weights in the shape of Qwen3-0.6B.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from penstock.core.bench import Bench, load
from penstock.core.config import build
from penstock.core.garbage import settled
from penstock.core.progress import show
from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request

ONE = "one request at a time"
STATIC = "static"
QUARTER = {"name": "snapkv", "budget": 0.25}
GATHERED, MIXED = "fastcache, snapkv 25%", "sarathi, snapkv 25%"
OVERLAPPED = "nanoflow, overlap taken for free"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is on a device.

    Attributes:
        budget: tokens of a step, more than the longest prompt has, for policies that take prompts whole; ``chunk`` is
            the budget of chunked prefill, which is what bounds the time between tokens.
        cache: tokens for which the cache has room; ``sequences`` run at a time.
        chats: sequences that decode while ``long`` prompts arrive, of ``prompt`` tokens, one every ``every`` seconds.
        groups: of ``members`` requests that have ``prefix`` tokens in common.
        mixed: requests of either kind: half of ``prompt`` in and few tokens out, or few in and ``answer`` out.
        arriving: requests for up to ``answer`` tokens, ten in every ``every`` seconds.
        bursts: of ``burst`` prompts of half of ``prompt`` tokens, one every ``every`` seconds.
    """

    budget: int
    chunk: int
    cache: int
    sequences: int
    chats: int
    long: int
    prompt: int
    every: float
    groups: int
    members: int
    prefix: int
    mixed: int
    answer: int
    arriving: int
    bursts: int
    burst: int


CPU = Sizes(
    budget=1024, chunk=128, cache=2560, sequences=16, chats=8, long=4, prompt=1000, every=0.1, groups=16, members=4,
    prefix=192, mixed=6, answer=64, arriving=24, bursts=3, burst=4,
)  # fmt: skip
QUICK = dataclasses.replace(
    CPU,
    chats=2,
    long=1,
    prompt=64,
    every=0.01,
    groups=3,
    members=2,
    prefix=32,
    mixed=1,
    answer=8,
    arriving=2,
    bursts=1,
    burst=2,
)
CUDA = Sizes(
    budget=8192, chunk=512, cache=49152, sequences=64, chats=32, long=32, prompt=3584, every=0.03, groups=64, members=8,
    prefix=1024, mixed=48, answer=384, arriving=64, bursts=4, burst=24,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A prompt and how many tokens are wanted after it, ``due`` seconds after the start. The time between two tokens of
    a ``chat`` counts."""

    prompt: list[int]
    output: int
    due: float = 0.0
    chat: bool = False


@dataclasses.dataclass(frozen=True)
class Figures:
    """What came of a load: tokens in and out a second, prompt tokens that were computed, and p99 of the milliseconds
    between two tokens of a chat; the mean of the milliseconds from when a request is due to its first token, and to its
    last."""

    throughput: float
    prefilled: float
    gap: float
    first: float
    last: float


#: The metrics: name, unit, and whether a higher or a lower value is better.
METRICS = {
    "throughput": ("throughput, in and out", "tokens/s", "higher"),
    "prefilled": ("prompt tokens computed", "tokens", "lower"),
    "gap": ("time between tokens, p99", "ms", "lower"),
    "first": ("time to first token, mean", "ms", "lower"),
    "last": ("latency, mean", "ms", "lower"),
}


class Loads:
    """The loads, drawn anew by the number of the run: policies of the same round get the same requests."""

    def __init__(self, sizes: Sizes, vocabulary: int) -> None:
        self.sizes, self.vocabulary = sizes, vocabulary

    def _tokens(self, draw: random.Random, count: int) -> list[int]:
        return [draw.randrange(3, self.vocabulary) for _ in range(count)]

    def long_prompts(self, run: int) -> list[Arrival]:
        """Chats from the start on, and long prompts that come while they decode."""
        draw, sizes = random.Random(f"long {run}"), self.sizes
        chats = [Arrival(self._tokens(draw, 32), 2 * sizes.answer, chat=True) for _ in range(sizes.chats)]
        return chats + [
            Arrival(self._tokens(draw, sizes.prompt), 4, due=sizes.every * (number + 1)) for number in range(sizes.long)
        ]

    def shared_prefixes(self, run: int) -> list[Arrival]:
        """Groups with a common prefix, all there at the start, in no order."""
        draw, sizes = random.Random(f"shared {run}"), self.sizes
        prefixes = [self._tokens(draw, sizes.prefix) for _ in range(sizes.groups)]
        found = [Arrival(prefix + self._tokens(draw, 32), 16) for prefix in prefixes for _ in range(sizes.members)]
        draw.shuffle(found)
        return found

    def mixed(self, run: int, *, shuffled: bool) -> list[Arrival]:
        """Long prompts with short answers, and short prompts with long answers, all there at the start."""
        draw, sizes = random.Random(f"mixed {run}"), self.sizes
        found = [Arrival(self._tokens(draw, sizes.prompt // 2), 8) for _ in range(sizes.mixed)]
        found += [Arrival(self._tokens(draw, 32), sizes.answer) for _ in range(sizes.mixed)]
        if shuffled:
            draw.shuffle(found)
        return found

    def arriving(self, run: int) -> list[Arrival]:
        """Requests for few tokens or many, one after the other."""
        draw, sizes = random.Random(f"arriving {run}"), self.sizes
        return [
            Arrival(self._tokens(draw, 64), draw.randint(2, sizes.answer), due=0.1 * sizes.every * number)
            for number in range(sizes.arriving)
        ]

    def bursts(self, run: int) -> list[Arrival]:
        """Prompts that come together, again and again."""
        draw, sizes = random.Random(f"bursts {run}"), self.sizes
        return [
            Arrival(self._tokens(draw, sizes.prompt // 2), sizes.answer, due=sizes.every * number)
            for number in range(sizes.bursts)
            for _ in range(sizes.burst)
        ]


def play(engine: Engine, arrivals: list[Arrival]) -> Figures:
    """Answers ``arrivals`` as they are due, from when the first is to when the last is answered."""
    before, times, sent = engine.snapshot(), defaultdict[int, list[float]](list), 0
    begun = time.perf_counter()
    while sent < len(arrivals) or engine.busy:
        now = time.perf_counter() - begun
        while sent < len(arrivals) and arrivals[sent].due <= now:
            arrival = arrivals[sent]
            sampling = SamplingParams(temperature=0, max_tokens=arrival.output, ignore_eos=True)
            engine.add(Request(str(sent), arrival.prompt, sampling))
            sent += 1
        for delta in engine.step() if engine.busy else ():
            if delta.tokens:
                times[int(delta.id)].append(time.perf_counter() - begun)
    seconds, after = time.perf_counter() - begun, engine.snapshot()
    gaps = sorted(
        later - earlier
        for number, arrival in enumerate(arrivals)
        if arrival.chat
        for earlier, later in zip(times[number], times[number][1:], strict=False)
    )
    return Figures(
        throughput=sum(len(arrival.prompt) + arrival.output for arrival in arrivals) / seconds,
        prefilled=(after.prompt_tokens - before.prompt_tokens) - (after.cached_tokens - before.cached_tokens),
        gap=1000 * gaps[int(0.99 * len(gaps))] if gaps else 0.0,
        first=1000 * statistics.fmean(times[number][0] - arrival.due for number, arrival in enumerate(arrivals)),
        last=1000 * statistics.fmean(times[number][-1] - arrival.due for number, arrival in enumerate(arrivals)),
    )


class Engines:
    """An engine for each policy, made when it is first asked for; all have one model."""

    def __init__(self, bench: Bench, model: Decoder, sizes: Sizes) -> None:
        self._model, self._sizes, self._chunked = model, sizes, f"sarathi, chunks of {sizes.chunk}"
        self._special: dict[str, dict[str, Any]] = {
            self.chunked: {"batching": "sarathi", "tokens": sizes.chunk},
            ONE: {"batching": "orca", "sequences": 1},
            OVERLAPPED: {"batching": {"name": "nanoflow", "rates": {**_rates(bench), "beside": 1.0}}},
            GATHERED: {"batching": {"name": "fastcache", "together": sizes.burst}, "kv": QUARTER},
            MIXED: {"batching": "sarathi", "kv": QUARTER},
        }
        self.of = functools.cache(self._make)

    @property
    def chunked(self) -> str:
        """The name of Sarathi with a budget that bounds the time between tokens."""
        return self._chunked

    def _make(self, name: str) -> Engine:
        sizes = self._sizes
        common = {"batching": name, "tokens": sizes.budget, "sequences": sizes.sequences, "cache_tokens": sizes.cache}
        tree = {**common, **self._special.get(name, {})}
        return build_engine(self._model, build(EngineConfig, tree, source=name), report=show)


def _rates(bench: Bench) -> dict[str, float]:
    """What the device does in a second."""
    common = load("serve")
    return {"flops": common.matmul_rate(bench.device), "bandwidth": common.copy_rate(bench.device)}


def contest(
    bench: Bench,
    engines: Engines,
    setting: str,
    draw: Callable[[int], list[Arrival]],
    baseline: str,
    evidence: dict[str, dict[str, tuple[int, ...]]],
) -> None:
    """Measures ``baseline`` and the policies of ``evidence`` in turn under one load, which ``draw`` gives for each run.

    ``evidence`` says for each policy which metrics are shown, and for which papers they are evidence; for most none.
    """
    counts: dict[str, int] = defaultdict(int)

    def run(name: str) -> Figures:
        counts[name] += 1
        arrivals = draw(counts[name])
        with settled():
            return play(engines.of(name), arrivals)

    runs = {name: functools.partial(run, name) for name in (baseline, *evidence)}
    found = bench.turns(runs, setting, repetitions=2 if bench.device.type == "cuda" else 3)
    for name, metrics in evidence.items():
        for field, papers in metrics.items():
            metric, unit, better = METRICS[field]
            values, peer_values = ([getattr(each, field) for each in found[which]] for which in (name, baseline))
            bench.compared(
                subject=name,
                peer=baseline,
                setting=setting,
                metric=metric,
                unit=unit,
                better=better,
                values=values,
                peer_values=peer_values,
                papers=papers,
            )


def main(bench: Bench) -> None:
    """Measures on the device of ``bench``."""
    name, model = load("serve").served(bench.device, "python-1m")
    sizes = CUDA if bench.device.type == "cuda" else QUICK if bench.quick else CPU
    loads, engines = Loads(sizes, min(model.config.vocabulary, 10_000)), Engines(bench, model, sizes)
    contest(
        bench,
        engines,
        f"{name}: {sizes.chats} decode while {sizes.long} prompts of {sizes.prompt:,} arrive",
        loads.long_prompts,
        "orca",
        {
            engines.chunked: {"gap": (293,), "throughput": (200,)},
            "flover": {"gap": (), "throughput": ()},
        },
    )
    contest(
        bench,
        engines,
        f"{name}: {sizes.groups} groups of {sizes.members} share {sizes.prefix} tokens, cache of {sizes.cache:,}",
        loads.shared_prefixes,
        "sarathi",
        {
            "batchllm": {"prefilled": (235,), "throughput": (235,)},
            "blendserve": {"prefilled": (), "throughput": ()},
            "orca": {"prefilled": (), "throughput": ()},
        },
    )
    # On the CPU nothing overlaps, so what splitting costs is no evidence for the paper.
    overlapped = {"throughput": (194,) if bench.device.type == "cuda" else ()}
    kinds = f"{sizes.mixed} of {sizes.prompt // 2} in and 8 out, {sizes.mixed} of 32 in and {sizes.answer} out"
    for order, shuffled in (("shuffled", True), ("one kind after the other", False)):
        contest(
            bench,
            engines,
            f"{name}: {kinds}, {order}",
            functools.partial(loads.mixed, shuffled=shuffled),
            "sarathi",
            {"blendserve": {"throughput": (230,)}, "batchllm": {"throughput": ()}, OVERLAPPED: overlapped},
        )
    contest(
        bench,
        engines,
        f"{name}: {sizes.arriving} requests arrive, 64 in and up to {sizes.answer} out",
        loads.arriving,
        STATIC,
        {
            "flover": {"throughput": (77,), "last": (77,)},
            "orca": {"throughput": (), "last": ()},
            "sarathi": {"throughput": (), "last": ()},
            ONE: {"throughput": (), "last": ()},
        },
    )
    contest(
        bench,
        engines,
        f"{name}: {sizes.bursts} bursts of {sizes.burst} prompts of {sizes.prompt // 2}, {sizes.answer} out",
        loads.bursts,
        MIXED,
        {GATHERED: {"first": (276,), "throughput": (276,)}},
    )
