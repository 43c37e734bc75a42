"""Live branches of a search beside independent requests with the same prefix, and beside a loop over HTTP.

256 branches of one text are set beside 256 requests with the text as their prompt, which the prefix cache shares, and
beside as many that compute their prompts: of the same length, and with nothing in common. Each text is drawn in one go,
and in steps between which a search would look at it: who has no branches sends it again for each step, and who has no
cache of prefixes either computes it again.

Then one and the same search, the best of n samples, is done as most do it today: a loop that asks a server over
OpenAI's interface, and picks. All subjects take turns, so that drift of the machine falls on all alike.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from penstock.core.bench import Bench, load
from penstock.core.garbage import settled
from penstock.core.progress import silent
from penstock.search.llm import LLM
from penstock.search.search import Search
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.messages import Request

search = load("search")

#: Branches; tokens of the text that they go on from, of what each draws, and of a step of that.
BRANCHES, PREFIX, LENGTH, STEP = 256, 512, 32, 8

#: Samples of a problem, and how many problems the loop asks at a time.
SAMPLES, AT_ONCE = 8, 16


def main(bench: Bench) -> None:
    """Measures on the device of ``bench``."""
    branches(bench)
    loop(bench)


def branches(bench: Bench) -> None:
    """Branches beside requests."""
    count = 16 if bench.quick else BRANCHES
    llm = LLM("python-1m", device=str(bench.device), progress=silent, sequences=count, cache_tokens=2 * count * PREFIX)
    vocabulary = llm.engine.limits.model.vocabulary
    text = [17 * place % vocabulary for place in range(PREFIX)]
    sampling = SamplingParams(max_tokens=LENGTH, seed=1, ignore_eos=True)

    def forked(step: int) -> float:
        async def program(search: Search) -> None:
            texts = search.root.fork(count)
            for _ in range(LENGTH // step):
                await search.extend(texts, tokens=step)

        llm.engine.memory.pool.forget()
        begun = time.perf_counter()
        (found,) = llm.search({"prompt_token_ids": text}, program, sampling_params=sampling, progress=silent)
        assert found.error is None, found.error
        return found.ledger.generated / (time.perf_counter() - begun)

    def requested(step: int, shared: bool) -> float:
        texts = [text if shared else [(token + number) % vocabulary for token in text] for number in range(count)]
        begun = time.perf_counter()
        for place in range(LENGTH // step):
            if not (place and shared):
                llm.engine.memory.pool.forget()
            own: dict[str, list[int]] = {}
            for number, prompt in enumerate(texts):
                own[str(number)] = list(prompt)
                drawn = sampling.model_copy(update={"seed": number, "max_tokens": step})
                llm.engine.add(Request(str(number), prompt, drawn))
                # The first is computed before the others come, so that they find its prompt in the cache.
                if shared and not number:
                    told(own)
            while llm.engine.busy:
                told(own)
            texts = list(own.values())
        return count * LENGTH / (time.perf_counter() - begun)

    def told(own: dict[str, list[int]]) -> None:
        for delta in llm.engine.step():
            own[delta.id] += delta.tokens

    for step, what in ((LENGTH, ""), (STEP, f", in steps of {STEP}")):
        runs: dict[str, Callable[[], float]] = {
            "branches": functools.partial(forked, step),
            "requests with one prefix": functools.partial(requested, step, True),
            "requests that compute their prefixes": functools.partial(requested, step, False),
        }
        setting = f"python-1m: {count} texts of {LENGTH} tokens behind {PREFIX}{what}"
        with settled():
            values = bench.turns(runs, setting, 3)
        for peer in list(runs)[1:]:
            bench.compared(
                subject="branches",
                peer=peer,
                setting=setting,
                metric="throughput",
                unit="tokens/s",
                values=values["branches"],
                peer_values=values[peer],
            )


def loop(bench: Bench) -> None:
    """The best of n samples by a search, and by a loop over HTTP."""
    preset = search.preset_of(bench)
    folder, asked, llm = search.trained(bench, preset), search.problems(bench, preset), search.opened(bench, preset)
    _, longest, cache = search.LIMITS[preset]
    sampling = {"temperature": 0.8, "max_tokens": longest, "logit_bias": search.undrawn(llm)}
    line = [sys.executable, "-m", "penstock", "serve", str(folder), "--name", "puzzles", "--port", "0"]
    with subprocess.Popen(
        [*line, "--device", str(bench.device), "--set", f"cache_tokens={cache}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            greeting = ""
            while not (address := re.search(r"Serving \S+ at (\S+)", greeting)):
                greeting = server.stdout.readline()
                assert greeting, "the server does not start"

            def searched() -> tuple[float, float, float]:
                begun = time.perf_counter()
                found = llm.search(
                    asked,
                    {"name": "best_of_n", "n": SAMPLES},
                    scorer=search.score,
                    sampling_params=SamplingParams(seed=1, **sampling),
                    progress=silent,
                )
                seconds = time.perf_counter() - begun
                right = sum(search.solves(problem, each.text) for problem, each in zip(asked, found, strict=True))
                return seconds, float(sum(each.ledger.generated for each in found)), right / len(asked)

            runs: dict[str, Callable[[], tuple[float, float, float]]] = {
                "best_of_n": searched,
                "a loop over HTTP": lambda: asking(address[1], asked, sampling),
            }
            setting = f"{len(asked)} held-out puzzles, best of {SAMPLES}"
            values = bench.turns(runs, setting, 3)
        finally:
            server.terminate()
    ours, theirs = values.values()
    for place, (metric, unit) in enumerate((("time", "s"), ("tokens", "tokens"))):
        bench.compared(
            subject="best_of_n",
            peer="a loop over HTTP",
            setting=setting,
            metric=metric,
            unit=unit,
            values=[each[place] for each in ours],
            peer_values=[each[place] for each in theirs],
            better="lower",
        )
    for subject, found in values.items():
        bench.row(subject=subject, setting=setting, metric="accuracy", unit="%", value=100 * found[0][2])


def asking(address: str, asked: list[dict[str, Any]], sampling: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds, generated tokens, and the share of problems that are solved, by a loop over OpenAI's interface."""
    import asyncio

    import openai

    async def best(client: openai.AsyncOpenAI, gate: asyncio.Semaphore, problem: dict[str, Any]) -> tuple[int, bool]:
        async with gate:
            answer = await client.completions.create(
                model="puzzles", prompt=problem["prompt"], n=SAMPLES, seed=1, **sampling
            )
        text = max((choice.text for choice in answer.choices), key=lambda each: search.score(problem, each))
        assert answer.usage is not None
        return answer.usage.completion_tokens, search.solves(problem, text)

    async def all_of_them() -> list[tuple[int, bool]]:
        gate = asyncio.Semaphore(AT_ONCE)
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            return await asyncio.gather(*(best(client, gate, problem) for problem in asked))

    begun = time.perf_counter()
    found = asyncio.run(all_of_them())
    seconds = time.perf_counter() - begun
    return seconds, float(sum(tokens for tokens, _ in found)), sum(solved for _, solved in found) / len(asked)
