"""Requests that ask for more than temperature and cuts, in an engine, beside decoding without one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from penstock.core.errors import UsageError
from penstock.core.randomness import derive, uniforms
from penstock.models.decoder import Decoder
from penstock.ops.paged.reference import Reference
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.decode.fire import Fire
from penstock.serve.decode.momentum import Momentum
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Delta, Finish, Request
from penstock.testing.reference import distribution, greedy, next_logits, pick, sample
from penstock.testing.serve_model import SHAPE

#: A cache so small that sequences are preempted.
TIGHT = 112


@pytest.fixture(scope="module")
def model() -> Decoder:
    return Decoder(SHAPE).initialize(0).eval()


def engine(model: Decoder, loop: str = "overlapped", cache: int = 1000, stop: tuple[int, ...] = ()) -> Engine:
    sizes = {"tokens": 24, "sequences": 8, "block_size": 4, "cache_tokens": cache}
    config = EngineConfig.model_validate({"attention": Reference(), "loop": loop, "check": True, **sizes})
    return build_engine(model, config, frozenset(stop))


def run(subject: Engine, requests: list[Request], seed: int = 0) -> dict[tuple[str, int], list[Delta]]:
    """All deltas of each continuation, for requests that arrive at random times."""
    draw, todo = random.Random(seed), list(requests)
    found: dict[tuple[str, int], list[Delta]] = {}
    while todo or subject.busy:
        if todo and draw.random() < 0.5:
            subject.add(todo.pop(0))
        for delta in subject.step():
            found.setdefault((delta.id, delta.index), []).append(delta)
    assert subject.memory.pool.held == 0
    return found


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def oracle(model: Decoder, prompt: list[int], sampling: SamplingParams, stop: tuple[int, ...] = ()) -> list[int]:
    """Everything that a request can ask for, by the definitions, from a forward pass over the whole text."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < sampling.max_tokens:
        count, made = len(tokens) - len(prompt), tokens[len(prompt) :]
        scores = next_logits(model, tokens).tolist()
        for token in range(len(scores)):
            scores[token] += sampling.logit_bias.get(token, 0.0)
            if token in tokens:
                scores[token] *= sampling.repetition_penalty ** (-1 if scores[token] > 0 else 1)
            scores[token] -= sampling.frequency_penalty * made.count(token)
            scores[token] -= sampling.presence_penalty * (token in made)
            if token in stop and count < sampling.min_tokens:
                scores[token] = -float("inf")
        chances = distribution(torch.tensor(scores, dtype=torch.float64), sampling)
        tokens.append(pick(chances, float(uniforms(derive(sampling.seed, "sample"), np.array([count]))[0])))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def wishes(index: int) -> dict:
    """Options of the request number ``index``: all kinds in turn."""
    kinds: list[dict] = [
        {"temperature": 0},
        {"temperature": 0.8},
        {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "top_p": 0.8, "presence_penalty": -0.5, "repetition_penalty": 1.1},
        {"temperature": 1.2, "top_k": 8, "logit_bias": {3: 2.0, 9: -100.0}, "logprobs": 2},
        {"temperature": 1.0, "min_p": 0.02, "min_tokens": 9, "prompt_logprobs": 1},
    ]
    return kinds[index % len(kinds)]


@pytest.mark.parametrize(("loop", "cache"), [("plain", TIGHT), ("overlapped", TIGHT), ("overlapped", 1000)])
def test_seeded_requests_give_the_same_alone_and_in_any_batch(model, loop, cache):
    draw, stop = random.Random(1), (7, 11)
    prefix = [draw.randrange(50) for _ in range(20)]
    requests = []
    for index in range(14):
        prompt = prefix[: draw.randrange(20)] + [draw.randrange(50) for _ in range(draw.randrange(1, 12))]
        sampling = SamplingParams(max_tokens=draw.randrange(1, 24) + 8, seed=index, **wishes(index))
        requests.append(Request(str(index), prompt, sampling))
    subject = engine(model, loop, cache, stop)
    found = run(subject, requests)
    assert (subject.snapshot().preemptions > 0) == (cache == TIGHT)
    for request in requests:
        wanted = oracle(model, request.prompt, request.sampling, stop)
        assert tokens_of(found[request.id, 0]) == wanted, request.sampling


def test_blind_requests_and_others_in_one_batch(model):
    """A rule that follows the text makes the engine wait for it; nobody's tokens change."""
    prompts = [[i, 2 * i + 1, 5] for i in range(6)]
    samplings = [SamplingParams(seed=i, max_tokens=20, temperature=0.9 * (i % 2)) for i in range(6)]
    ruled = SamplingParams(temperature=0, max_tokens=20, rule=Momentum())
    requests = [Request(str(i), prompt, each) for i, (prompt, each) in enumerate(zip(prompts, samplings, strict=True))]
    requests.insert(2, Request("ruled", [1, 2, 3], ruled))
    subject = engine(model)
    found = run(subject, requests)
    for prompt, sampling, request in zip(prompts, samplings, (r for r in requests if r.id != "ruled"), strict=True):
        wanted = sample(model, prompt, sampling) if sampling.temperature else greedy(model, prompt, 20)
        assert tokens_of(found[request.id, 0]) == wanted


def test_fire_draws_one_hot_token(model):
    sampling = SamplingParams(temperature=0, max_tokens=10, seed=5, rule=Fire(temperature=50.0, top_k=20))
    (first, *rest) = tokens_of(run(engine(model), [Request("1", [4, 4], sampling)])["1", 0])
    hot = SamplingParams(temperature=50.0, top_k=20, max_tokens=1, seed=5)
    assert [first] == sample(model, [4, 4], hot)
    assert rest == greedy(model, [4, 4, first], 9)


@pytest.mark.parametrize("loop", ["plain", "overlapped"])
@pytest.mark.parametrize("cache", [TIGHT, 1000])
def test_logprobs_of_prompt_and_continuation_are_the_models(model, loop, cache):
    """Prompts longer than a step's budget, prefixes that are in the cache, preemption: every position is told once."""
    draw = random.Random(2)
    prefix = [draw.randrange(50) for _ in range(40)]
    requests = []
    for index in range(8):
        prompt = prefix[: draw.randrange(1, 40)] + [draw.randrange(50) for _ in range(draw.randrange(1, 9))]
        wanted = {"prompt_logprobs": 3} if index % 2 else {}
        sampling = SamplingParams(temperature=0.7, max_tokens=12, seed=index, logprobs=2, **wanted)
        requests.append(Request(str(index), prompt, sampling))
    requests.append(Request("8", [9], SamplingParams(max_tokens=2, prompt_logprobs=0)))
    found = run(engine(model, loop, cache), requests)
    for request in requests:
        deltas = found[request.id, 0]
        tokens = [*request.prompt, *tokens_of(deltas)]
        told = [each for delta in deltas for each in delta.logprobs or []]
        prompts = [delta.prompt_logprobs for delta in deltas]
        assert prompts[1:] == [None] * (len(deltas) - 1)
        if request.sampling.logprobs is not None:
            check(model, tokens, len(request.prompt), told, 2)
        else:
            assert not told
        if request.sampling.prompt_logprobs is None:
            assert prompts[0] is None
        else:
            check(model, request.prompt, 1, prompts[0], request.sampling.prompt_logprobs)


def check(model: Decoder, tokens: list[int], start: int, told: list, alternatives: int) -> None:
    """The records are those of ``tokens`` from ``start`` on."""
    assert [each.token for each in told] == tokens[start:]
    for place, each in enumerate(told, start):
        logprobs = next_logits(model, tokens[:place]).log_softmax(-1)
        assert each.logprob == pytest.approx(float(logprobs[tokens[place]]), abs=1e-4)
        assert each.rank == int((logprobs > logprobs[tokens[place]]).sum()) + 1
        values, names = logprobs.topk(alternatives)
        assert [token for token, _ in each.top] == names.tolist()
        assert [value for _, value in each.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_rated_prompt_does_not_come_from_the_cache_and_serves_later_ones(model):
    subject, prompt = engine(model), list(range(20))
    plain = SamplingParams(max_tokens=1)
    cached = [
        run(subject, [Request(id, prompt, sampling)])[id, 0][0].cached
        for id, sampling in [("1", plain), ("2", plain.model_copy(update={"prompt_logprobs": 0})), ("3", plain)]
    ]
    assert cached == [0, 0, 16]


def test_best_of_gives_all_continuations_with_logprobs(model):
    sampling = SamplingParams(n=1, best_of=3, seed=4, max_tokens=6)
    found = run(engine(model), [Request("1", [3, 4], sampling)])
    assert sorted(found) == [("1", 0), ("1", 1), ("1", 2)]
    for (_, index), deltas in found.items():
        alone = SamplingParams(seed=4 + index, max_tokens=6)
        assert tokens_of(deltas) == sample(model, [3, 4], alone)
        assert all(len(delta.logprobs or []) == 1 and delta.logprobs[0].top == [] for delta in deltas)


def test_min_tokens_hold_back_the_end(model):
    likely = greedy(model, [3, 4], 1)[0]
    early = run(engine(model, stop=(likely,)), [Request("1", [3, 4], SamplingParams(temperature=0))])["1", 0]
    assert tokens_of(early) == [likely] and early[-1].finish is Finish.STOP
    late = SamplingParams(temperature=0, min_tokens=5, stop_tokens=(8,), max_tokens=30)
    tokens = tokens_of(run(engine(model, stop=(likely,)), [Request("1", [3, 4], late)])["1", 0])
    assert len(tokens) > 5 and not {likely, 8} & set(tokens[:5])


def test_the_end_may_come_right_behind_min_tokens(model):
    """Beside the definition, with ends that are the most probable token as soon as they are allowed."""

    def defined(end: int, least: int) -> list[int]:
        text = [3, 4]
        while len(text) < 14 and (len(text) == 2 or text[-1] != end):
            scores = next_logits(model, text).clone()
            if len(text) - 2 < least:
                scores[end] = -torch.inf
            text.append(int(scores.argmax()))
        return text[2:]

    at_once = 0
    for least in range(6):
        for end in sorted({*greedy(model, [3, 4], 8)}):
            wanted = defined(end, least)
            at_once += len(wanted) == least + 1
            asked = SamplingParams(temperature=0, min_tokens=least, stop_tokens=(end,), max_tokens=12)
            assert tokens_of(run(engine(model), [Request("1", [3, 4], asked)])["1", 0]) == wanted
    assert at_once > 1


@pytest.mark.parametrize("options", [{"logit_bias": {50: 1.0}}, {"stop_tokens": (99,)}])
def test_tokens_that_the_model_does_not_have_are_refused(model, options):
    subject = engine(model)
    with pytest.raises(UsageError, match="outside of the vocabulary of 50"):
        subject.add(Request("1", [1], SamplingParams(**options)))
    assert not subject.busy
