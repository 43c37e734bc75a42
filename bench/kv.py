"""What a compressed cache costs in quality, and what it brings in requests and tokens a second, by policy and budget.

Quality: smollm2 reads the beginning of a file of the standard library; then the cache is compressed, and the loss of
what follows is measured, token by token, as the cache goes on being compressed. Beside it, how many of the tokens that
it writes are those of the full cache, and how many values it recalls of a list that was read before the cache was
compressed. Layers that share keys and values are measured in the same way, by where they begin to, and low-rank keys
with values on the host by how much of them a step sees. Throughput: python-6m serves many long requests from a pool of
fixed size, with the full cache, with a quarter of it, and with low-rank keys.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from typing import Any, NamedTuple

import torch

from penstock.core.bench import Bench
from penstock.core.randomness import numpy_generator
from penstock.data.corpora.stdlib import StandardLibrary
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.policy import index
from penstock.serve.build import build_engine
from penstock.serve.choose.logprobs import TokenLogprobs
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.kv.policies.block_topk import BlockTopK
from penstock.serve.kv.policies.contract import Budgeted, CachePolicy
from penstock.serve.kv.policies.minicache import MiniCache
from penstock.serve.kv.policies.shadow import ShadowKV
from penstock.serve.messages import Request

QUALITY, SPEED = "smollm2", "python-6m"
BUDGETS = (0.25, 0.35, 0.5)
#: Tokens of a text before the first compression, and behind it.
READ, FOLLOW, TEXTS = 512, 128, 6
#: Of the texts, so many are written on.
WRITTEN = 3
#: Lists of so many pairs; of each the first questions are shown with their answers, and the next ones count.
LISTS, PAIRS, SHOWN, ASKED = 12, 8, 4, 3
#: Where layers may begin to share keys and values.
STARTS = (0.5, 0.0)
#: What a step sees of tokens whose keys are of low rank.
SEEN = (0.1, 0.25)
#: Requests, their tokens in and out, and the tokens that the pool has room for.
REQUESTS, IN, OUT, POOL = 48, 448, 128, 4096
EVERY = 32
NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "James", "Karen", "Maria")
CITIES = (
    "Paris",
    "London",
    "Berlin",
    "Madrid",
    "Rome",
    "Vienna",
    "Tokyo",
    "Cairo",
    "Oslo",
    "Delhi",
    "Boston",
    "Chicago",
)


def policies(budget: float) -> dict[str, dict[str, Any]]:
    """The options of every policy that has a budget."""
    names = [each.name for each in index().entries("kv.policy") if issubclass(each.load(), Budgeted)]
    return {name: {"name": name, "budget": budget, "every": EVERY} for name in names}


def left_by(policy: CachePolicy, model: Decoder, tokens: int) -> float:
    """What is left on the device of a cache with so many tokens, where it is compressed by then."""
    fitted = policy.fitted(model.config)
    due = fitted.due(tokens, 0, 0)
    return 1.0 if due is None or due > tokens else fitted.keeps(tokens) / tokens


def opened(model: Decoder, kv: dict[str, Any], tokens: int, sequences: int = 8) -> Engine:
    return build_engine(
        model, EngineConfig.model_validate({"kv": kv, "cache_tokens": tokens, "sequences": sequences, "tokens": 1024})
    )


def finished(engine: Engine, requests: list[Request]) -> dict[str, Any]:
    """What came of ``requests``: the tokens of each, and the log-probabilities of its prompt."""
    for request in requests:
        engine.add(request)
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    rated: dict[str, list[TokenLogprobs]] = {}
    while engine.busy:
        for delta in engine.step():
            tokens[delta.id] += delta.tokens
            if delta.prompt_logprobs is not None:
                rated[delta.id] = list(delta.prompt_logprobs)
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
    return [-statistics.fmean(token.logprob for token in rated[each.id]) for each in asked]


def written(engine: Engine, todo: list[list[int]], read: int, count: int) -> list[list[int]]:
    """What is written behind the first ``read`` tokens of each text."""
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    asked = [Request(str(number), text[:read], sampling) for number, text in enumerate(todo)]
    return list(finished(engine, asked)["tokens"].values())


class Question(NamedTuple):
    """A list of pairs and questions for them: ``prompt`` tokens, of which the first ``given`` are the list; and of each
    of the last answers, which of the tokens are it."""

    prompt: list[int]
    given: int
    answers: list[slice]


def questions(name: str, lists: int, pairs: int) -> list[Question]:
    """Dictionaries of so many ``pairs``, as Python writes them, and behind each the values of some of its keys, the
    last of which are to be recalled: by then a small model knows what is asked."""
    tokenizer, found = hub.load_tokenizer(hub.resolve(name)), []
    for number in range(lists):
        draw = numpy_generator(number, "bench/kv/recall")
        keys, values = ([str(each) for each in draw.permutation(words)[:pairs]] for words in (NAMES, CITIES))
        head = "codes = {\n" + "".join(f'    "{key}": "{value}",\n' for key, value in zip(keys, values, strict=True))
        prompt = tokenizer(head + "}\n")["input_ids"]
        given, answers = len(prompt), []
        for place in draw.permutation(pairs)[: SHOWN + ASKED]:
            # Each piece is cut into tokens by itself, so that where a value begins does not depend on what it is.
            for piece in (f'assert codes["{keys[place]}"] ==', f' "{values[place]}', '"\n'):
                answers.append(len(prompt))
                prompt += tokenizer(piece, add_special_tokens=False)["input_ids"]
        begins = [slice(*answers[first : first + 2]) for first in range(1, len(answers), 3)]
        found.append(Question(prompt, given, begins[SHOWN:]))
    return found


def recall(engine: Engine, todo: list[Question]) -> tuple[list[bool], list[float]]:
    """Of each value that is to be recalled, whether it is the most likely answer, and its loss in nats. The cache is
    compressed before the first question is known: that is what it has to stand."""
    asked = []
    for number, each in enumerate(todo):
        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, prompt_logprobs_from=each.given)
        asked.append(Request(str(number), each.prompt, sampling, given=each.given))
    rated = finished(engine, asked)["rated"]
    right, lost = [], []
    for request, each in zip(asked, todo, strict=True):
        before = len(each.prompt) - len(rated[request.id])
        for answer in each.answers:
            own = rated[request.id][answer.start - before : answer.stop - before]
            right.append(all(token.rank == 1 for token in own))
            lost.append(-math.fsum(token.logprob for token in own))
    return right, lost


class Quality:
    """What is measured of an engine whose cache is compressed, beside the same with the full cache.

    Args:
        bench: takes the figures.
        name: of the ``model``.
    """

    def __init__(self, bench: Bench, name: str, model: Decoder) -> None:
        self._bench, self._model = bench, model
        self.read, self._follow, count = (96, 48, 2) if bench.quick else (READ, FOLLOW, TEXTS)
        self._texts = texts(name, count, self.read + self._follow)
        self._questions = questions(name, 2 if bench.quick else LISTS, PAIRS)
        self._room = 16 * (self.read + self._follow + 400)
        self.setting = f"{name}, {self.read} tokens read"
        full = self._opened({"name": "full"})
        self.plain, self._said = losses(full, self._texts, self.read), self._written(full)
        self._recall("full", full, self.setting)

    def _opened(self, kv: dict[str, Any]) -> Engine:
        return opened(self._model, kv, self._room)

    def _written(self, engine: Engine) -> list[list[int]]:
        return written(engine, self._texts[:WRITTEN], self.read, self._follow // 2)

    def of(self, name: str, kv: dict[str, Any], where: str, papers: tuple[int, ...] = ()) -> list[float]:
        """Loss, agreement and recall of the policy ``name`` with the options ``kv``: the losses by text."""
        engine, bench = self._opened(kv), self._bench
        found = losses(engine, self._texts, self.read)
        bench.compared(
            subject=name,
            peer="full",
            setting=where,
            better="lower",
            metric="loss of what follows",
            unit="nats/token",
            values=found,
            peer_values=self.plain,
            claim="parity",
            papers=papers,
        )
        both = zip(itertools.chain(*self._written(engine)), itertools.chain(*self._said), strict=True)
        alike = statistics.fmean(one == other for one, other in both)
        bench.row(subject=name, setting=where, metric="tokens as with the full cache", unit="", value=alike)
        self._recall(name, engine, where)
        return found

    def _recall(self, name: str, engine: Engine, where: str) -> None:
        right, lost = recall(engine, self._questions)
        self._bench.row(subject=name, setting=where, metric="recalled values", unit="", value=statistics.fmean(right))
        loss = {"metric": "loss of recalled values", "unit": "nats", "better": "lower"}
        self._bench.row(subject=name, setting=where, **loss, value=statistics.fmean(lost))


def quality(bench: Bench, name: str, model: Decoder) -> None:
    """That of every policy at every budget, and of layers that share, beside the full cache and beside one another."""
    measured = Quality(bench, name, model)
    for start in STARTS:
        paired = MiniCache(start=start, every=EVERY)
        where = f"{measured.setting}, {left_by(paired, model, measured.read):.0%} kept"
        measured.of("minicache", paired.describe(), where, papers=(210,))
    for seen in SEEN:
        shadow = ShadowKV(budget=seen, every=EVERY)
        left = left_by(shadow, model, measured.read)
        where = f"{measured.setting}, {left:.0%} on the device, {seen:.0%} seen"
        measured.of("shadow", shadow.describe(), where, papers=(299,))
        measured.of("block_topk", BlockTopK(budget=seen).describe(), f"{measured.setting}, {seen:.0%} seen")
    for budget in BUDGETS[: 1 if bench.quick else None]:
        where = f"{measured.setting}, {budget:.0%} kept"
        found = {
            name: measured.of(name, kv, where, papers=(348,) if name == "scissorhands" and budget <= 0.25 else ())
            for name, kv in policies(budget).items()
        }
        for one, peer, papers in (("kv_merger", "h2o", (287,)), ("h2o", "sink_window", ())):
            bench.compared(
                subject=one,
                peer=peer,
                setting=where,
                metric="loss of what follows",
                unit="nats/token",
                values=found[one],
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
    shadow = ShadowKV(budget=SEEN[0], every=EVERY)
    kinds = {"full": {"name": "full"}, **policies(BUDGETS[0]), "shadow": shadow.describe()}
    kinds["snapkv under pressure"] = {**kinds["snapkv"], "when": "pressure"}
    engines = {name: opened(model, kv, pool, sequences=64) for name, kv in kinds.items()}
    runs = {name: functools.partial(served, engine, prompts, output) for name, engine in engines.items()}
    served_there = f"{SPEED}, {count} requests of {length} + {output} tokens, a pool for {pool:,}"
    settings = dict.fromkeys(kinds, f"{served_there}, {BUDGETS[0]:.0%} kept")
    settings["shadow"] = f"{served_there}, {left_by(shadow, model, length):.0%} on the device, {SEEN[0]:.0%} seen"
    values = bench.turns(runs, settings["full"], 3)
    papers = {"h2o": (411,), "shadow": (299,)}
    for name in list(runs)[1:]:
        bench.compared(
            subject=name,
            peer="full",
            setting=settings[name],
            metric="serving throughput",
            unit="tokens/s",
            values=values[name],
            peer_values=values["full"],
            papers=papers.get(name, ()),
        )
    for name, engine in engines.items():
        together = most_together(engine, prompts, output)
        bench.row(subject=name, setting=settings[name], metric="requests at a time", unit="", value=together)


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
