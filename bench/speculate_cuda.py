"""Speculation on a GPU: speed by the number of requests, what verifying costs, and latency as requests arrive.

python-150m greedily continues pieces of the standard library that it has not seen, in bf16 and with graphs, for 1 to
256 requests at a time; python-15m drafts for it, or its own text does. Both are trained the first time, in minutes, and
kept. Requests also arrive at random, with and without drafts. Steps that verify one to nine tokens a sequence are
timed beside the least that the device's copy and matrix rates allow: a bias makes a text of zeros, and zeros are
drafted, so that all of them are accepted. ``bench speculate --device cuda`` runs this; on a CPU, where it only shows
that it works, the models are python-6m and python-1m.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from penstock.core.bench import Bench, load
from penstock.core.files import cache_folder
from penstock.core.garbage import settled
from penstock.core.progress import show
from penstock.data.corpora.stdlib import StandardLibrary
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.serve.build import build_runners
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.serve.rehearsal import Zeros, rehearse_drafts
from penstock.speculate.controllers.fixed import Fixed
from penstock.train.kept import kept_run

serve, speculate = load("serve"), load("speculate")

#: Requests at a time, and the tokens wanted after each prompt.
CROWDS = {1: 256, 8: 384, 64: 384, 256: 256}
REPETITIONS = 3
CACHE = 98304  # tokens
#: Tokens of a sequence that a step scores, for so many sequences; and how many steps are timed.
ROWS, SEQUENCES, STEPS = (1, 2, 3, 5, 9), (1, 8, 64), 32
#: Requests a second, how many of them, and the tokens wanted.
RATE, ARRIVING, ANSWER = 8.0, 64, 192
#: What drafts, and controllers that share its graphs.
CONTROLLED = {"ngram": ("measured", "fixed"), "model": ("measured", "fixed", "bass")}
PLAIN, ONLINE = "plain decoding", ("ngram, measured", "model, measured")


def trained(bench: Bench) -> tuple[str | Path, str | Path]:
    """The model and the one that drafts for it."""
    if bench.device.type == "cpu":
        return speculate.TARGET, speculate.DRAFT
    data = Path(inspect.getfile(StandardLibrary)).read_bytes() + platform.python_version().encode()
    # What both learn from is read, and cut in tokens, once.
    store = cache_folder("bench") / f"python-{hashlib.blake2b(data, digest_size=8).hexdigest()}"
    changes = [f"device={bench.device}", f"data.store={store}", *(["steps=20"] if bench.quick else [])]
    target, draft = (kept_run(preset, changes, data, show) for preset in ("python-150m", "python-15m"))
    return target, draft


def configured(bench: Bench, **options: Any) -> EngineConfig:
    """The settings that all engines have in common, with ``options``."""
    sequences = 8 if bench.quick else max(CROWDS)
    return EngineConfig.model_validate(
        {"sequences": sequences, "cache_tokens": 4096 if bench.quick else CACHE, **options}
    )


def opened(bench: Bench, target: Decoder, draft: Decoder) -> dict[str, Engine]:
    """Engines by what drafts and what controls it. Those of a drafter that differ in the controller alone have cache
    and graphs in common, and plain decoding those of the first: one of them works at a time, and each run begins with
    an empty cache."""
    engines: dict[str, Engine] = {}
    for drafter, controllers in CONTROLLED.items():
        options = {"draft": "ngram" if drafter == "ngram" else {"name": "model", "source": "draft"}}
        configs = {name: configured(bench, **options, controller=name) for name in controllers}
        first = configs[controllers[0]]
        runner, drafting = build_runners(target, first, draft if drafter == "model" else None, show)
        if not engines:
            engines[PLAIN] = Engine(configured(bench), runner)
        for name, config in configs.items():
            engines[f"{drafter}, {name}"] = engine = Engine(config, runner, draft=drafting)
            rehearse_drafts(config, engine)
    return engines


def by_crowd(
    bench: Bench,
    engines: dict[str, Engine],
    pieces: list[list[int]],
    crowds: Mapping[int, int] = CROWDS,
    least: int = speculate.ALONE,
) -> None:
    """Tokens a second and tokens a step, by how many requests there are at a time, of at ``least`` so many in all."""
    for crowd, most in itertools.islice(crowds.items(), 2 if bench.quick else None):
        output = 24 if bench.quick else most
        todo = pieces[: max(crowd, 1 if bench.quick else least)]
        runs = {name: functools.partial(speculate.run, engine, todo, crowd, output) for name, engine in engines.items()}
        speculate.measure(bench, runs, engines, f"{crowd} at a time", REPETITIONS)


def latency(bench: Bench, engines: dict[str, Engine], pieces: list[list[int]]) -> None:
    """Time to the first token and between tokens as requests arrive, with drafts beside without."""
    count, output = (4, 24) if bench.quick else (ARRIVING, ANSWER)
    prompts = pieces[:count]
    work = serve.Workload("", prompts, [output] * len(prompts), output * len(prompts), temperature=0)
    setting = f"{RATE:g} requests/s, {speculate.PROMPT} in and {output} out"
    runs = {name: functools.partial(serve.online, engines[name], work, RATE) for name in (PLAIN, *ONLINE)}
    # All engines are warm by now.
    found: dict[str, Any] = bench.turns(runs, setting, repetitions=2, uncounted=0)
    for place, metric in enumerate(("time to first token, mean", "time between tokens, mean")):
        values = {name: [1e3 * statistics.fmean(each[place]) for each in times] for name, times in found.items()}
        for name in ONLINE:
            bench.compared(
                subject=name, peer=PLAIN, setting=setting, metric=metric, unit="ms", better="lower",
                values=values[name], peer_values=values[PLAIN],
            )  # fmt: skip


def step_costs(bench: Bench, engines: dict[str, Engine]) -> None:
    """Milliseconds of a step by the tokens of each sequence that it scores, beside the least that it could take."""
    rates = serve.copy_rate(bench.device), serve.matmul_rate(bench.device)
    for sequences, rows in itertools.product(SEQUENCES[: 1 if bench.quick else None], ROWS):
        engine = engines[PLAIN]
        if rows > 1:
            told = {"draft": Zeros(tokens=max(ROWS) - 1), "controller": Fixed(length=rows - 1)}
            config = configured(bench, draft="ngram").model_copy(update=told)
            engine = Engine(config, engines["ngram, fixed"].executor)
        found = [timed(bench, engine, sequences, rows, rates) for _ in range(REPETITIONS + 1)][1:]
        spent, least = ([1e3 * each for each in values] for values in zip(*found, strict=True))
        bench.compared(
            subject="a step", peer="the roofline", setting=f"{sequences} sequences, {rows} tokens of each",
            metric="time of a step", unit="ms", better="lower", values=spent, peer_values=least,
        )  # fmt: skip


def timed(bench: Bench, engine: Engine, sequences: int, rows: int, rates: tuple[float, float]) -> tuple[float, float]:
    """Seconds of a step in which ``sequences`` score ``rows`` tokens each, and the least that it could take."""
    engine.memory.pool.forget()
    steps = 4 if bench.quick else STEPS
    sampling = SamplingParams(temperature=0, max_tokens=rows * (steps + 16), ignore_eos=True, logit_bias={0: 100.0})
    for number in range(sequences):  # prompts that have nothing in common
        engine.add(Request(str(number), [1 + number] * speculate.PROMPT, sampling))
    for _ in range(8):  # the prompts, at most 8,192 tokens, and some that warm up
        engine.step()
    roofline, before = serve.Roofline(engine, rates), engine.snapshot()

    def some_steps() -> None:
        # What the engine calls a step may only launch a pass, or only publish what came of one.
        while engine.snapshot().sequence_steps < before.sequence_steps + steps * sequences:
            engine.step()

    with roofline.counting():
        seconds = bench.seconds(some_steps)
    after = engine.snapshot()
    passes = after.sequence_steps - before.sequence_steps
    scored = (after.output_tokens - before.output_tokens) / passes
    assert scored == rows, f"a step scored {scored} tokens of a sequence, not {rows}"
    while engine.busy:
        engine.step()
    return seconds * sequences / passes, roofline.seconds / roofline.steps


def models(bench: Bench) -> tuple[Decoder, Decoder, list[list[int]]]:
    """The model, the one that drafts for it, and what is to be continued."""
    sources = trained(bench)
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    target, draft = (hub.load(source, device=bench.device, dtype=dtype).eval() for source in sources)
    return target, draft, speculate.prompts(max(CROWDS), sources[0])


def main(bench: Bench) -> None:
    """Measures on the device of ``bench``."""
    target, draft, pieces = models(bench)
    engines = opened(bench, target, draft)
    with settled():  # as a server is
        by_crowd(bench, engines, pieces)
        latency(bench, engines, pieces)
        step_costs(bench, engines)
