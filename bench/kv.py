"""What a compressed cache costs in quality, and what it brings in requests and tokens a second, by policy and budget.

Quality: smollm2 reads the beginning of a file of the standard library; then the cache is compressed, and the loss of
what follows is measured, token by token, as the cache goes on being compressed. Beside it, how many of the tokens that
it writes are those of the full cache, and how many values it recalls of a list that was read before the cache was
compressed. Layers that share keys and values are measured in the same way, by where they begin to, and low-rank keys
with values on the host by how much of them a step sees.

Throughput: 256 long requests are served from a pool of fixed bytes, with the full cache and with a quarter of it. On
the CPU python-6m does, there in other codecs too, with and without eviction, each once: the kernel reads int8 and fp8,
and the readable backend decodes int4. Keys of low rank are for that backend as well, take longest by far, and have 48
requests, beside the full cache with as many. On CUDA it is random weights in the shape of Qwen3-8B, in
bf16, which have no quality to measure: there the cache in fp8 has the same bytes too, and the steps of as many
sequences are timed with each, which tells what the upkeep of a small cache costs.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from typing import Any, NamedTuple

import torch

from penstock.core.bench import Bench, load
from penstock.core.garbage import settled
from penstock.core.progress import show
from penstock.core.randomness import numpy_generator
from penstock.data.corpora.stdlib import StandardLibrary
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.ops.paged.codecs.contract import Codec
from penstock.ops.paged.codecs.plain import Plain
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

QUALITY, SHAPE = "smollm2", "Qwen3-8B shape"
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
EVERY = 32
#: Of the policies with a budget, those that are measured on CUDA: one looks at nothing, the others at attention.
ON_CUDA = ("sink_window", "h2o", "snapkv")
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


class Served(NamedTuple):
    """What is served: so many ``requests``, of ``length`` tokens in and ``output`` out, with up to ``sequences`` at a
    time and ``tokens`` a step, from a pool with the bytes of ``pool`` tokens in the model's own dtype."""

    requests: int
    length: int
    output: int
    pool: int
    sequences: int
    tokens: int

    @property
    def whole(self) -> int:
        """A number of requests that the pool has room for with all that they read and write."""
        return self.pool // (self.length + self.output) - 2

    def prompts(self) -> list[list[int]]:
        """What the requests read."""
        draw = numpy_generator(0, "bench/kv/throughput")
        return [[int(token) for token in draw.integers(4, 4000, size=self.length)] for _ in range(self.requests)]


QUICK = Served(requests=8, length=64, output=32, pool=512, sequences=64, tokens=1024)
SERVED = {
    "cpu": Served(requests=256, length=448, output=128, pool=4096, sequences=64, tokens=1024),
    "cuda": Served(requests=256, length=2048, output=128, pool=40_960, sequences=128, tokens=4096),
}
#: For keys of low rank, whose attention takes longest by far on the CPU.
FEW = SERVED["cpu"]._replace(requests=48)
#: What an engine is warmed up with: so many of the requests, for so many tokens.
WARM, WARM_OUTPUT = 8, 8


def policies(budget: float) -> dict[str, dict[str, Any]]:
    """The options of every policy that has a budget."""
    names = [each.name for each in index().entries("kv.policy") if issubclass(each.load(), Budgeted)]
    return {name: {"name": name, "budget": budget, "every": EVERY} for name in names}


def left_by(policy: CachePolicy, model: Decoder, tokens: int) -> float:
    """What is left on the device of a cache with so many tokens, where it is compressed by then."""
    fitted = policy.fitted(model.config)
    due = fitted.due(tokens, 0, 0)
    return 1.0 if due is None or due > tokens else fitted.keeps(tokens) / tokens


def opened(model: Decoder, options: dict[str, Any], cached: int, sequences: int = 8, tokens: int = 1024) -> Engine:
    """An engine with a cache for so many tokens, and the ``options``."""
    sizes = {"cache_tokens": cached, "sequences": sequences, "tokens": tokens}
    return build_engine(model, EngineConfig.model_validate({**sizes, **options}), report=show)


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
        return opened(self._model, {"kv": kv}, self._room)

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


class Figures(NamedTuple):
    """What came of a run: tokens a second, and how many sequences decode at a time, in the mean over the steps in which
    any does."""

    rate: float
    together: float


def served(engine: Engine, prompts: list[list[int]], output: int) -> Figures:
    """Serves the ``prompts``, which come at once."""
    begun, seen = time.perf_counter(), []
    add(engine, prompts, output)
    while engine.busy:
        engine.step()
        seen.append(decoding(engine))
    seconds = time.perf_counter() - begun
    engine.memory.pool.forget()
    return Figures(len(prompts) * output / seconds, statistics.fmean(each for each in seen if each))


def step_time(bench: Bench, engine: Engine, prompts: list[list[int]], output: int) -> float:
    """Milliseconds of a step in which all ``prompts`` decode, in the mean over three quarters of the ``output``: all
    that is done for the cache meanwhile counts."""
    add(engine, prompts, output)
    while engine.busy and decoding(engine) < len(prompts):
        engine.step()
    steps = 3 * output // 4

    def decode() -> None:
        for _ in range(steps):
            engine.step()

    seconds = bench.seconds(decode)
    assert decoding(engine) == len(prompts), f"{decoding(engine)} of {len(prompts)} sequences decoded at the end"
    while engine.busy:
        engine.step()
    engine.memory.pool.forget()
    return 1000 * seconds / steps


def add(engine: Engine, prompts: list[list[int]], output: int) -> None:
    """Asks for so many tokens behind each of the ``prompts``."""
    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add(Request(str(number), prompt, sampling))


def decoding(engine: Engine) -> int:
    """How many sequences do."""
    return sum(each.decoding for each in engine.memory.running)


def room(model: Decoder, codec: Codec, pool: int) -> int:
    """How many tokens in a ``codec`` have the bytes of ``pool`` tokens in the dtype of the ``model``."""
    size, dtype = model.config.head_dim, model.like.dtype
    return pool * Plain().vector_bytes(size, dtype) // codec.vector_bytes(size, dtype)


def compressed(bench: Bench) -> dict[str, dict[str, Any]]:
    """The options of caches that have a quarter of the tokens, by name, and that kernels read."""
    kinds = policies(BUDGETS[0])
    if bench.device.type == "cuda":
        return {name: {"kv": kinds[name]} for name in ON_CUDA}
    kinds["snapkv under pressure"] = {**kinds["snapkv"], "when": "pressure"}
    return {name: {"kv": kv} for name, kv in kinds.items()}


def throughput(bench: Bench, name: str, model: Decoder) -> None:
    """Tokens a second from a pool of fixed size, and how many requests run at a time; on CUDA how long steps take,
    too."""
    work, kept = QUICK if bench.quick else SERVED[bench.device.type], compressed(bench)
    if bench.device.type == "cuda":
        throughput_of(bench, name, model, {**kept, "fp8": {"codec": "fp8"}}, work)
        return
    coded = {"int8": {"codec": "int8"}, "fp8": {"codec": "fp8"}}
    coded |= {f"h2o, {codec}": {**kept["h2o"], "codec": codec} for codec in ("int8", "int4", "fp8")}
    throughput_of(bench, name, model, kept, work, repetitions=2)
    throughput_of(bench, name, model, coded, work, repetitions=1)
    few, shadow = QUICK._replace(requests=4) if bench.quick else FEW, ShadowKV(budget=SEEN[0], every=EVERY)
    throughput_of(bench, name, model, {"shadow": {"kv": shadow.describe()}}, few, repetitions=2)


def throughput_of(
    bench: Bench, name: str, model: Decoder, caches: dict[str, dict[str, Any]], work: Served, repetitions: int = 2
) -> None:
    """That of the ``caches``, whose options are given by name, beside the full one."""
    served_there = f"{name}, {work.requests} requests of {work.length} + {work.output} tokens, a pool for {work.pool:,}"
    engines, settings, dtype = {}, {}, str(model.like.dtype).removeprefix("torch.")
    plain = any("kv" in options and "codec" not in options for options in caches.values())
    for kind, options in {"full": {"kv": {"name": "full"}}, **caches}.items():
        cached = room(model, codec_of(options), work.pool)
        engines[kind] = opened(model, options, cached, work.sequences, work.tokens)
        settings[kind] = served_there if plain else f"{served_there} in {dtype}"
        if "kv" in options and (plain or kind != "full"):
            settings[kind] += f", {BUDGETS[0]:.0%} kept"
    if "shadow" in caches:
        left = left_by(ShadowKV(budget=SEEN[0], every=EVERY), model, work.length)
        settings["shadow"] = f"{served_there}, {left:.0%} on the device, {SEEN[0]:.0%} seen"
    with settled():
        if bench.device.type == "cuda":
            steps(bench, name, engines, work)
        rates(bench, engines, settings, work, repetitions)


def codec_of(options: dict[str, Any]) -> Codec:
    """The codec of an engine with ``options``."""
    return EngineConfig.model_validate(options).codec


def steps(bench: Bench, name: str, engines: dict[str, Engine], work: Served) -> None:
    """How long a step of as many sequences takes, beside the full cache, and where attention is looked at, beside the
    policy that keeps as much and looks at nothing."""
    prompts = work.prompts()[: work.whole]
    setting = f"{name}, {len(prompts)} sequences of {work.length} + {work.output} tokens"
    runs = {kind: functools.partial(step_time, bench, engine, prompts, work.output) for kind, engine in engines.items()}
    values = bench.turns(runs, setting, 3)
    beside = [(kind, "full") for kind in runs if kind != "full"]
    beside += [(kind, "sink_window") for kind in ON_CUDA if kind != "sink_window"]
    for kind, peer in beside:
        bench.compared(
            subject=kind,
            peer=peer,
            setting=setting,
            metric="time of a step that decodes",
            unit="ms",
            better="lower",
            values=values[kind],
            peer_values=values[peer],
            claim="parity" if kind == "fp8" else "gain",
        )


def rates(bench: Bench, engines: dict[str, Engine], settings: dict[str, str], work: Served, repetitions: int) -> None:
    """What comes out of the ``engines``, all of which serve the same requests."""
    prompts = work.prompts()
    runs = {kind: functools.partial(served, engine, prompts, work.output) for kind, engine in engines.items()}
    for engine in engines.values():
        served(engine, prompts[:WARM], WARM_OUTPUT)
    values = bench.turns(runs, settings["full"], repetitions, 0)
    papers = {"h2o": (411,), "shadow": (299,)}
    for kind in list(runs)[1:]:
        bench.compared(
            subject=kind,
            peer="full",
            setting=settings[kind],
            metric="serving throughput",
            unit="tokens/s",
            values=[each.rate for each in values[kind]],
            peer_values=[each.rate for each in values["full"]],
            papers=papers.get(kind, ()),
        )
    for kind, figures in values.items():
        together = statistics.median(each.together for each in figures)
        bench.row(subject=kind, setting=settings[kind], metric="requests at a time", unit="", value=together)


def subject(bench: Bench) -> tuple[str, Decoder]:
    """The model that serves, by name."""
    serve = load("serve")
    if bench.device.type == "cuda" and not bench.quick:
        return SHAPE, serve.random_model(serve.SHAPES[SHAPE], bench.device)
    found: tuple[str, Decoder] = serve.served(bench.device)
    return found


def main(bench: Bench) -> None:
    """Measures throughput, and on the CPU quality."""
    name, model = subject(bench)
    throughput(bench, name, model)
    if bench.device.type == "cpu":
        read = name if bench.quick else QUALITY
        quality(bench, read, hub.load(read, device=bench.device, dtype=torch.float32).eval())
