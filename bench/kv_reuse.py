"""What contexts cost that other requests have had, encoded apart (APE) or moved and computed again in part
(Cache-Craft), beside sharing of prefixes alone.

Time: smollm2 is asked about a few chunks of text out of a small library, drawn anew and in another order for each
request; every chunk was read by an earlier one. The time from the request to its first token is measured. Quality:
pieces of a dictionary are contexts, which another request had in the opposite order, and one of them has the value that
is asked for: how often it is the most likely answer, and its loss. It is measured where contexts are read in a row;
where they are encoded apart: as they are (a temperature and a scale of 1), and as APE weighs them; and where they are
moved: as they are, and with a part of them computed again, as Cache-Craft chooses it.
"""

from __future__ import annotations

import functools
import math
import statistics
from typing import Any, NamedTuple

import torch

from penstock.core.bench import Bench
from penstock.core.errors import PenstockError
from penstock.core.randomness import numpy_generator
from penstock.data.corpora.stdlib import StandardLibrary
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.serve.opening import dtype_of

MODEL, QUICK = "smollm2", "python-1m"
#: The library's chunks, their tokens, those of a request, and requests.
LIBRARY, CHUNK, CHOSEN, REQUESTS = 12, 256, 4, 16
#: Questions, of each its dictionaries and their pairs, and how many are asked and answered before it: by then a small
#: model knows what is asked.
QUESTIONS, BOOKS, PAIRS, SHOWN = 32, 4, 3, 4
# fmt: off
NAMES = (
    "Anna", "Boris", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "James", "Karen", "Maria",
    "Nina", "Oscar", "Paula", "Quentin", "Rosa", "Simon", "Tina", "Ulrich", "Vera", "Walter", "Xenia", "Yuri",
)
CITIES = (
    "Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Tokyo", "Cairo", "Oslo", "Delhi", "Boston", "Chicago",
    "Lisbon", "Dublin", "Prague", "Athens", "Lima", "Sydney", "Toronto", "Dallas", "Zurich", "Milan", "Moscow", "Seoul",
)
# fmt: on
POLICIES: dict[str, dict[str, Any]] = {
    "prefix": {"name": "prefix"},
    "ape, T = S = 1": {"name": "ape", "temperature": 1, "scale": 1},
    "ape": {"name": "ape"},
    "cache_craft, nothing again": {"name": "cache_craft", "recompute": 0},
    "cache_craft": {"name": "cache_craft"},
}
#: The papers of those that are compared with reading in a row.
PAPERS = {"ape": (340,), "cache_craft": (225,)}


class Question(NamedTuple):
    """What is asked about ``contexts``, as tokens: the ``answer`` follows the question."""

    contexts: list[list[int]]
    question: list[int]
    answer: list[int]


def opened(model: Decoder, reuse: str) -> Engine:
    """An engine with room for everything."""
    options = {"kv_reuse": POLICIES[reuse], "cache_tokens": 16384, "sequences": 32, "tokens": 2048}
    return build_engine(model, EngineConfig.model_validate(options))


def library(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """The first tokens of files of the standard library."""
    encoded = (tokenizer(each.text, add_special_tokens=False)["input_ids"] for each in StandardLibrary().documents())
    long = (ids[:length] for ids in encoded if len(ids) >= length)
    return [next(long) for _ in range(count)]


def first_token(engine: Engine, request: Request) -> None:
    """Computes a request for one token."""
    engine.add(request)
    while engine.busy:
        engine.step()


def times(bench: Bench, name: str, model: Decoder) -> None:
    """Those of requests for chunks that earlier ones had, in turn with each policy."""
    tokenizer = hub.load_tokenizer(hub.resolve(name))
    count, length, chosen, requests = (4, 32, 2, 2) if bench.quick else (LIBRARY, CHUNK, CHOSEN, REQUESTS)
    chunks, before = library(tokenizer, count, length), tokenizer("Some files:\n")["input_ids"]
    behind, one = tokenizer("\nTheir imports:\n")["input_ids"], SamplingParams(temperature=0, max_tokens=1)
    engines = {reuse: opened(model, reuse) for reuse in ("prefix", *PAPERS)}
    found: dict[str, list[float]] = {reuse: [] for reuse in engines}
    draw = numpy_generator(0, "bench/kv_reuse")

    def asked(contexts: list[list[int]]) -> Request:
        return Request("a", [*before, *behind], one, contexts=contexts, shared=len(before))

    for engine in engines.values():
        for first in range(0, count, chosen):
            first_token(engine, asked(chunks[first : first + chosen]))
    for _ in range(requests):
        places = draw.permutation(count)[:chosen]
        for reuse, engine in engines.items():
            request = asked([chunks[place] for place in places])
            found[reuse].append(bench.seconds(functools.partial(first_token, engine, request)))
    for subject, papers in PAPERS.items():
        bench.compared(
            subject=subject,
            peer="prefix",
            setting=f"{name}, {chosen} of {count} chunks of {length} tokens, shuffled",
            metric="time to the first token",
            unit="s",
            better="lower",
            values=found[subject],
            peer_values=found["prefix"],
            papers=papers,
        )


def questions(tokenizer: Any, count: int) -> list[Question]:
    """Pieces of a dictionary, as Python writes them, and a value of one of them that is asked for."""

    def tokens(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    made = []
    for number in range(count):
        draw = numpy_generator(number, "bench/kv_reuse/questions")
        keys, values = ([str(each) for each in draw.permutation(words)] for words in (NAMES, CITIES))
        lines = [f'codes["{key}"] = "{value}"\n' for key, value in zip(keys, values, strict=True)]
        books = ["".join(lines[first : first + PAIRS]) for first in range(0, BOOKS * PAIRS, PAIRS)]
        *shown, asked = draw.permutation(BOOKS * PAIRS)[: SHOWN + 1].tolist()
        before = "".join(f'assert codes["{keys[place]}"] == "{values[place]}"\n' for place in shown)
        question = tokens(f'{before}assert codes["{keys[asked]}"] ==')
        made.append(Question([*map(tokens, books)], question, tokens(f' "{values[asked]}')))
    return made


def recalled(engine: Engine, todo: list[Question], before: list[int]) -> tuple[list[bool], list[float]]:
    """Of each answer whether it is the most likely one, and its loss in nats, once another request has had the contexts
    in the opposite order."""
    rated, one = {}, SamplingParams(temperature=0, max_tokens=1)
    for number, each in enumerate(todo):
        other = [*before, *each.question]
        first_token(engine, Request("other", other, one, contexts=each.contexts[::-1], shared=len(before)))
        prompt = [*before, *each.question, *each.answer]
        first = len(prompt) - len(each.answer)
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, prompt_logprobs_from=first)
        engine.add(Request(str(number), prompt, params, contexts=each.contexts, shared=len(before)))
        while engine.busy:
            for delta in engine.step():
                if delta.prompt_logprobs is not None:
                    rated[number] = list(delta.prompt_logprobs)
    right = [all(token.rank == 1 for token in rated[number]) for number in range(len(todo))]
    return right, [-math.fsum(token.logprob for token in rated[number]) for number in range(len(todo))]


def quality(bench: Bench, name: str, model: Decoder) -> None:
    """How many values are recalled with each policy, and their loss."""
    tokenizer = hub.load_tokenizer(hub.resolve(name))
    todo, before = questions(tokenizer, 2 if bench.quick else QUESTIONS), tokenizer("codes = {}\n")["input_ids"]
    setting, losses = f"{name}, {BOOKS} contexts of {PAIRS} pairs", {}
    for reuse in POLICIES:
        right, losses[reuse] = recalled(opened(model, reuse), todo, before)
        if reuse == "prefix" and not any(right) and not bench.quick:
            raise PenstockError(
                f"{name} recalls nothing, even of contexts in a row: what it loses where they are not cannot be seen",
                hint="Measure with a model that recalls some of it.",
            )
        bench.row(subject=reuse, setting=setting, metric="recalled values", unit="", value=statistics.fmean(right))
    pairs = [(subject, "prefix") for subject in PAPERS]
    for subject, peer in (*pairs, ("ape", "ape, T = S = 1"), ("cache_craft", "cache_craft, nothing again")):
        bench.compared(
            subject=subject,
            peer=peer,
            setting=setting,
            metric="loss of recalled values",
            unit="nats",
            better="lower",
            values=losses[subject],
            peer_values=losses[peer],
            papers=PAPERS[subject] if peer != "prefix" else (),
        )


@torch.inference_mode()
def main(bench: Bench) -> None:
    """Measures both."""
    name = QUICK if bench.quick else MODEL
    model = hub.load(name, device=bench.device, dtype=dtype_of(EngineConfig(), bench.device)).eval()
    times(bench, name, model)
    quality(bench, name, model)
