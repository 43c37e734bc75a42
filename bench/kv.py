"""What a compressed cache costs in quality, and what it brings in requests and tokens a second, by policy and budget.

Quality: smollm2 reads the beginning of a file of the standard library; then the cache is compressed, and the loss of
what follows is measured, token by token, as the cache goes on being compressed. Beside it, how many of the tokens that
it writes are those of the full cache, and how many of the values it recalls that a long list of keys gave. Throughput:
python-6m serves many long requests from a pool of fixed size, with the full cache and with a quarter of it.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from typing import Any

import torch

from penstock.core.bench import Bench
from penstock.core.randomness import numpy_generator
from penstock.data.corpora.stdlib import StandardLibrary
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.policy import index
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request

QUALITY, SPEED = "smollm2", "python-6m"
BUDGETS = (0.25, 0.35, 0.5)
#: Tokens of a text before the first compression, and behind it.
READ, FOLLOW, TEXTS = 512, 128, 3
#: Pairs of a list, and how many of its keys are asked for, of so many lists.
PAIRS, ASKED = 24, 8
#: Requests, their tokens in and out, and the tokens that the pool has room for.
REQUESTS, IN, OUT, POOL = 48, 448, 128, 4096
EVERY = 32


def policies(budget: float) -> dict[str, dict[str, Any]]:
    """The options of every policy that has a budget."""
    names = [name for name in index().names("kv.policy") if name != "full"]
    return {name: {"name": name, "budget": budget, "every": EVERY} for name in names}


def opened(model: Decoder, kv: dict[str, Any], tokens: int, sequences: int = 8) -> Engine:
    return build_engine(
        model, EngineConfig.model_validate({"kv": kv, "cache_tokens": tokens, "sequences": sequences, "tokens": 1024})
    )


def finished(engine: Engine, requests: list[Request]) -> dict[str, Any]:
    """What came of ``requests``: the tokens of each, and the log-probabilities of its prompt."""
    for request in requests:
        engine.add(request)
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    rated: dict[str, list[float]] = {}
    while engine.busy:
        for delta in engine.step():
            tokens[delta.id] += delta.tokens
            if delta.prompt_logprobs is not None:
                rated[delta.id] = [each.logprob for each in delta.prompt_logprobs]
    engine.memory.pool.forget()
    return {"tokens": tokens, "rated": rated}


def texts(name: str, count: int, length: int) -> list[list[int]]:
    """The first tokens, as the model ``name`` has them, of files of the standard library."""
    tokenizer = hub.load_tokenizer(hub.resolve(name))
    encoded = (tokenizer(each.text)["input_ids"][:length] for each in StandardLibrary(tests=True).documents())
    return list(itertools.islice((ids for ids in encoded if len(ids) == length), count))


def losses(engine: Engine, todo: list[list[int]], read: int) -> list[float]:
    """Of each text, the mean loss in nats of the tokens behind the first ``read``."""
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, prompt_logprobs_from=read)
    asked = [Request(str(number), text, sampling, given=read) for number, text in enumerate(todo)]
    rated = finished(engine, asked)["rated"]
    return [-statistics.fmean(rated[each.id]) for each in asked]


def written(engine: Engine, todo: list[list[int]], read: int, count: int) -> list[list[int]]:
    """What is written behind the first ``read`` tokens of each text."""
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    asked = [Request(str(number), text[:read], sampling) for number, text in enumerate(todo)]
    return list(finished(engine, asked)["tokens"].values())


def recall(engine: Engine, name: str, pairs: int, asked: int) -> float:
    """The share of keys whose value is recalled, of lists of ``pairs`` that are read before the key is asked for."""
    tokenizer = hub.load_tokenizer(hub.resolve(name))
    requests, wanted = [], []
    for number in range(asked):
        draw = numpy_generator(number, "bench/kv/recall")
        keys = [f"{word}{tail}" for word, tail in zip(draw.choice(WORDS, pairs), draw.permutation(pairs), strict=True)]
        values = [str(value) for value in draw.integers(1000, 9999, size=pairs)]
        lines = "".join(f"The code of {key} is {value}.\n" for key, value in zip(keys, values, strict=True))
        chosen = int(draw.integers(pairs))
        head, question = tokenizer(lines)["input_ids"], f"The code of {keys[chosen]} is"
        prompt = tokenizer(lines + question)["input_ids"]
        # Compressed before the question is known: that is what a cache has to stand.
        request = Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=6), given=len(head))
        requests.append(request)
        wanted.append(values[chosen])
    said = finished(engine, requests)["tokens"]
    return statistics.fmean(
        tokenizer.decode(said[request.id]).strip().startswith(value)
        for request, value in zip(requests, wanted, strict=True)
    )


WORDS = ["river", "stone", "lamp", "cloud", "garden", "bridge", "violin", "candle", "meadow", "anchor"]


def quality(bench: Bench, model_name: str, model: Decoder) -> None:
    """Loss, agreement and recall of every policy at every budget, beside the full cache and beside one another."""
    read, follow, count = (96, 48, 2) if bench.quick else (READ, FOLLOW, TEXTS)
    pairs, asked = (8, 2) if bench.quick else (PAIRS, ASKED)
    todo, room = texts(model_name, count, read + follow), 16 * (read + follow + 400)
    full = opened(model, {"name": "full"}, room)
    plain, said = losses(full, todo, read), written(full, todo, read, follow // 2)
    setting = f"{model_name}, {read} tokens read"
    bench.row(
        subject="full", setting=setting, metric="recalled values", unit="", value=recall(full, model_name, pairs, asked)
    )
    for budget in BUDGETS[: 1 if bench.quick else None]:
        found: dict[str, list[float]] = {}
        where = f"{setting}, {budget:.0%} kept"
        for name, kv in policies(budget).items():
            engine = opened(model, kv, room)
            found[name] = losses(engine, todo, read)
            loss = {"subject": name, "setting": where, "metric": "loss of what follows", "unit": "nats/token"}
            bench.compared(
                **loss,
                peer="full",
                values=found[name],
                peer_values=plain,
                better="lower",
                claim="parity",
                papers=(348,) if name == "scissorhands" and budget <= 0.25 else (),
            )
            both = zip(itertools.chain(*written(engine, todo, read, follow // 2)), itertools.chain(*said), strict=True)
            alike = statistics.fmean(one == other for one, other in both)
            bench.row(subject=name, setting=where, metric="tokens as with the full cache", unit="", value=alike)
            recalled = recall(engine, model_name, pairs, asked)
            bench.row(subject=name, setting=where, metric="recalled values", unit="", value=recalled)
        for name, peer, papers in (("kv_merger", "h2o", (287,)), ("h2o", "sink_window", ())):
            bench.compared(
                subject=name,
                peer=peer,
                setting=where,
                metric="loss of what follows",
                unit="nats/token",
                values=found[name],
                peer_values=found[peer],
                better="lower",
                papers=papers if budget > 0.25 else (),
            )


def served(engine: Engine, prompts: list[list[int]], output: int) -> float:
    """Tokens a second that come out of the engine."""
    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    begun = time.perf_counter()
    finished(engine, [Request(str(number), prompt, sampling) for number, prompt in enumerate(prompts)])
    return len(prompts) * output / (time.perf_counter() - begun)


def throughput(bench: Bench, model: Decoder) -> None:
    """Tokens a second from a pool of fixed size, and how many requests run at a time."""
    count, length, output, pool = (8, 64, 32, 512) if bench.quick else (REQUESTS, IN, OUT, POOL)
    draw = numpy_generator(0, "bench/kv/throughput")
    prompts = [[int(token) for token in draw.integers(4, 4000, size=length)] for _ in range(count)]
    kinds = {"full": {"name": "full"}, **policies(BUDGETS[0])}
    engines = {name: opened(model, kv, pool, sequences=64) for name, kv in kinds.items()}
    runs = {name: functools.partial(served, engine, prompts, output) for name, engine in engines.items()}
    setting = f"{SPEED}, {count} requests of {length} + {output} tokens, a pool for {pool:,}, {BUDGETS[0]:.0%} kept"
    values = bench.turns(runs, setting, 3)
    for name in list(runs)[1:]:
        bench.compared(
            subject=name,
            peer="full",
            setting=setting,
            metric="serving throughput",
            unit="tokens/s",
            values=values[name],
            peer_values=values["full"],
            papers=(411,) if name == "h2o" else (),
        )
    for name, engine in engines.items():
        together = most_together(engine, prompts, output)
        bench.row(subject=name, setting=setting, metric="requests at a time", unit="", value=together)


def most_together(engine: Engine, prompts: list[list[int]], output: int) -> float:
    """How many sequences decode at a time, in the mean over the steps in which any does."""
    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), prompt, sampling))
    seen = []
    while engine.busy:
        engine.step()
        seen.append(sum(each.decoding for each in engine.memory.running))
    engine.memory.pool.forget()
    return statistics.fmean(each for each in seen if each)


def main(bench: Bench) -> None:
    """Measures quality, then throughput."""
    small = hub.load(SPEED, device=bench.device, dtype=torch.float32).eval()
    throughput(bench, small)
    name = SPEED if bench.quick else QUALITY
    quality(bench, name, hub.load(name, device=bench.device, dtype=torch.float32).eval())
