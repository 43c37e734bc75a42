"""The law of ``kv.reuse``: contexts that requests name, inside of the engine, beside an oracle without a cache.

What each clause is there to catch:

- :func:`check_one`: contexts at other positions than they say, that are seen by what stands before them, or that change
  attention where nothing is to be changed;
- :func:`check_scores`: a context that sees another one or is left out, a temperature or a scale at the wrong place;
- :func:`check_order`: contexts that know in which order they came;
- :func:`check_apart`: blocks that depend on contexts, and are found by a text that has others or none;
- :func:`check_found`: what is in the cache and computed all the same, or counted wrongly; a block that is taken for
  that of another text; a text that is not found behind the contexts that it had;
- :func:`check_crowd`: a request whose tokens depend on the batch, on chunks, on whom it shares contexts with, or on
  having been thrown out; blocks that are lost; contexts that are overwritten, or go to others' prefixes.

The oracle is :class:`~penstock.testing.beside_scores.BesideScores`.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from penstock.core.randomness import numpy_generator
from penstock.models.decoder import Decoder
from penstock.models.sampling import Sampling
from penstock.ops.paged.reference import Reference
from penstock.serve.build import build_engine, build_runner
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.kv.disk import DiskBlocks
from penstock.serve.kv.host import HostBlocks
from penstock.serve.kv.reuse.contract import Reuse, Weighing
from penstock.serve.kv.tiers import Tiers
from penstock.serve.messages import Request
from penstock.testing.beside_scores import BesideScores
from penstock.testing.reference import continued
from penstock.testing.serve_batching import AtOnce, numbers
from penstock.testing.serve_model import small_model

#: Texts of which requests have some as contexts, and what stands before and behind them.
CONTEXTS = [numbers(f"context {index}", length) for index, length in enumerate((13, 4, 9, 1, 16, 8))]
BEFORE, BEHIND = numbers("before contexts", 7), numbers("behind contexts", 5)


@functools.cache
def exact_model() -> Decoder:
    """The small model in float64, whose scores can be compared to 1e-5."""
    return copy.deepcopy(small_model()).double()


def check(policy: Reuse, crowds: int = 4) -> None:
    """Asserts the law."""
    check_one(policy)
    check_scores(policy)
    check_order(policy)
    check_apart(policy)
    check_found(policy)
    for seed in range(crowds):
        check_crowd(policy, seed)


def opened(policy: Reuse, **options: object) -> Engine:
    """An engine for the exact model, with small blocks."""
    given = {"attention": Reference(), "tokens": 64, "sequences": 10, "block_size": 4, "cache_tokens": 400}
    return build_engine(
        exact_model(), EngineConfig.model_validate({**given, **options, "kv_reuse": policy, "check": True})
    )


def answered(
    engine: Engine, contexts: Sequence[list[int]], before: list[int] = BEFORE
) -> tuple[list[int], list[float]]:
    """Six tokens, the most probable ones, and their log-probabilities."""
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=0)
    engine.add(Request("asked", [*before, *BEHIND], sampling, contexts=list(contexts), shared=len(before)))
    tokens: list[int] = []
    logprobs: list[float] = []
    while engine.busy:
        for delta in engine.step():
            tokens += delta.tokens
            logprobs += [each.logprob for each in delta.logprobs or []]
    return tokens, logprobs


def _expected(
    contexts: Sequence[list[int]], tokens: list[int], weighing: Weighing | None, before: list[int] = BEFORE
) -> list[float]:
    """The log-probabilities of ``tokens`` behind the contexts."""
    text = [*before, *BEHIND, *tokens]
    scores = BesideScores(exact_model(), text, contexts, len(before), weighing)
    return [float(scores.after(text[: place - len(tokens) + len(text)]).log_softmax(-1)[token])
            for place, token in enumerate(tokens)]  # fmt: skip


def _near(found: list[float], wanted: list[float], what: str) -> None:
    assert len(found) == len(wanted) and np.allclose(found, wanted, rtol=0, atol=1e-5), f"{what}: {found}, not {wanted}"


def check_one(policy: Reuse) -> None:
    """Asserts that in the limiting case one context has the scores of the text in a row, whatever stands before."""
    for before in (BEFORE, BEFORE[:4], []):
        tokens, logprobs = answered(opened(policy.limit()), CONTEXTS[:1], before)
        _near(logprobs, _expected(CONTEXTS[:1], tokens, None, before), "one context is not as good as in a row")


def check_scores(policy: Reuse) -> None:
    """Asserts that scores are those of one softmax over all that is seen, where the prompt is computed at once, in
    chunks, and with its contexts in the cache."""
    for options in ({}, {"tokens": 10, "sequences": 8}):
        engine = opened(policy, **options)
        for chosen in (CONTEXTS[:3], CONTEXTS[1:5], CONTEXTS[2:]):
            tokens, logprobs = answered(engine, chosen)
            _near(logprobs, _expected(chosen, tokens, policy.weighing), "scores are not those of a dense softmax")


def check_order(policy: Reuse) -> None:
    """Asserts that contexts that are encoded apart may come in any order."""
    if policy.weighing is None:
        return
    engine = opened(policy)
    tokens, logprobs = answered(engine, CONTEXTS)
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
        again, found = answered(engine, [CONTEXTS[place] for place in order])
        assert again == tokens
        _near(found, logprobs, "the order of contexts matters")


def check_apart(policy: Reuse) -> None:
    """Asserts that a text with contexts, with others, and without any, one after the other in one cache, has the scores
    that it should have each time."""
    for first in ([], CONTEXTS[:2]):
        engine = opened(policy)
        for chosen in (first, CONTEXTS[2:4], [], CONTEXTS[:2]):
            tokens, logprobs = answered(engine, chosen)
            weighing = policy.weighing if chosen else None
            _near(logprobs, _expected(chosen, tokens, weighing), "a text is taken for one with other contexts")


def check_found(policy: Reuse) -> None:
    """Asserts that once contexts are in the cache, a request computes of its prompt just what it does not find there,
    and says how much that is; and, where they are encoded apart, that they are found in any order, to their last token,
    that what they all begin with is computed once, and that each is in memory once, and takes no place among the
    sequences."""
    engine, size, apart = opened(policy, loop="plain"), 4, policy.weighing is not None
    computed, _ = _computed(engine, CONTEXTS[:4])
    # The last tokens before contexts share a block with what is behind them.
    each = sum(len(BEFORE) % size + len(context) for context in CONTEXTS[:4])
    assert not apart or computed == len(BEFORE) + len(BEHIND) + each, "what contexts begin with is computed with each"
    for order in ([0, 1, 2, 3], [3, 1, 0], [2, 3]):
        contexts, before = [CONTEXTS[place] for place in order], engine.snapshot()
        computed, cached = _computed(engine, contexts)
        now, own = engine.snapshot(), sum(map(len, contexts))
        assert computed + cached == len(BEFORE) + len(BEHIND) + own, "what is found is computed, or counted wrongly"
        assert now.cached_tokens - before.cached_tokens == cached
        assert now.reused_tokens - before.reused_tokens == own * apart
        assert cached >= own * apart + len(BEFORE) // size * size
        # Behind the same contexts, in whatever order, the prompt's own text is found too.
        again = contexts[::-1] if apart else contexts
        text = len(BEFORE) + len(BEHIND) + (0 if apart else own)
        assert _computed(engine, again)[0] == text - (text - 1) // size * size, (
            "a text is not found behind its contexts"
        )
    if apart:
        _check_shared(opened(policy, loop="plain"))


def _asked(id: str, contexts: Sequence[list[int]], count: int) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=count)
    return Request(id, [*BEFORE, *BEHIND], sampling, contexts=list(contexts), shared=len(BEFORE))


def _computed(engine: Engine, contexts: Sequence[list[int]]) -> tuple[int, int]:
    """How many tokens are computed until a first one comes behind ``contexts``, and how many are said to be cached."""
    engine.add(_asked("asked", contexts, 1))
    computed = cached = 0
    while engine.busy:
        cached = max([cached, *(delta.cached for delta in engine.step())])
        computed += engine.snapshot().batch_tokens
    return computed, cached


def _check_shared(engine: Engine) -> None:
    answered(engine, CONTEXTS[:3])
    held = []
    for count in (1, 2, 3):
        engine.add(_asked(str(count), CONTEXTS[:3], 60))
        engine.step()
        held.append(engine.snapshot().held)
        assert engine.memory.free_slots == 10 - count, "a context that is whole takes a place among the sequences"
    own = -(-(len(BEHIND) + len(BEFORE)) // 4) - len(BEFORE) // 4
    assert held[1] - held[0] <= own + 1 and held[2] - held[1] <= own + 1, f"contexts are held once for each: {held}"


def check_crowd(policy: Reuse, seed: int, rounds: int = 14) -> None:
    """Asserts that requests with contexts and without, coming in so many ``rounds`` on a pool so small that they are
    thrown out, with memory and disk for what leaves it, aborted, cut back and fed, have the tokens of the oracle."""
    draw = numpy_generator(seed, "testing/kv_reuse")
    config = EngineConfig(
        kv_reuse=policy,
        attention=Reference(),
        tokens=int(draw.choice([10, 24])),
        sequences=int(draw.choice([6, 10])),
        block_size=int(draw.choice([2, 4])),
        cache_tokens=int(draw.choice([124, 132, 160])),
        check=True,
    )
    runner = build_runner(small_model(), config)
    with tempfile.TemporaryDirectory() as folder:
        disk = DiskBlocks(Path(folder), "crowd", 1 << 20)
        tiers = Tiers(HostBlocks(runner.cache, 12), disk, AtOnce()) if seed % 2 else None
        engine = Engine(config, runner, tiers=tiers)
        requests: dict[str, Request] = {}
        told: dict[str, list[int]] = defaultdict(list)
        aborted: set[str] = set()
        for number in range(rounds):
            for _ in range(int(draw.integers(4))):
                request = _drawn(draw, str(len(requests)), engine)
                requests[request.id] = request
                engine.add(request)
            for _ in range(int(draw.integers(1, 5))):
                _hear(engine, told)
            begun = [id for id, tokens in told.items() if len(tokens) > 3 and id in engine._sequences]
            if begun and number % 4 == 1:
                aborted.add(begun[0])
                engine.abort(begun[0])
            elif begun and number % 4 == 3:
                _cut(engine, begun[-1], requests, told)
        while engine.busy:
            _hear(engine, told)
        now = engine.snapshot()
        assert now.held == now.running == now.waiting == 0, "something is held for ever"
        engine.close()
    for id, request in requests.items():
        wanted = _follows(request, policy.weighing, told[id])
        assert told[id] == (wanted[: len(told[id])] if id in aborted else wanted), f"request {id} has other tokens"


def _hear(engine: Engine, told: dict[str, list[int]]) -> None:
    for delta in engine.step():
        told[delta.id] += delta.tokens


def _drawn(draw: np.random.Generator, id: str, engine: Engine) -> Request:
    chosen = [CONTEXTS[place] for place in draw.permutation(len(CONTEXTS))[: int(draw.integers(5))]]
    before = BEFORE[: int(draw.choice([0, 4, 7]))]
    prompt, size = [*before, *BEHIND[: int(draw.integers(1, 6))]], engine.limits.block_size
    # All has to fit at the same time, each text with a last block that may be nearly empty.
    taken = sum(-(-(len(before) + len(each)) // size) for each in chosen)
    most = min(24, (engine.limits.blocks - taken) * size - len(prompt))
    sampling = SamplingParams(temperature=float(draw.integers(2)), seed=int(draw.integers(2)), max_tokens=max(1, most))
    if not chosen:  # a text that begins as one with a context does, and has none
        return Request(id, [*before, *CONTEXTS[0], *prompt[len(before) :]], sampling)
    return Request(id, prompt, sampling, contexts=chosen, shared=len(before))


def _cut(engine: Engine, id: str, requests: dict[str, Request], told: dict[str, list[int]]) -> None:
    """Takes the request ``id`` back to its third token, from where it says the same again, and feeds it the fourth."""
    engine.pause()  # what is on its way is told first
    _hear(engine, told)
    engine.resume()
    if id in engine._sequences and requests[id].contexts and engine._config.kv_reuse.weighing is not None:
        engine.truncate(id, len(requests[id].prompt) + 3)
        engine.feed(id, told[id][3:4])
        del told[id][4:]


def _follows(request: Request, weighing: Weighing | None, guess: list[int]) -> list[int]:
    prompt, given = request.prompt, len(request.prompt)
    drawn = Sampling(
        temperature=request.sampling.temperature, seed=request.sampling.seed, max_tokens=request.sampling.max_tokens
    )
    if not request.contexts:
        return continued(small_model(), prompt, given, drawn, guess=guess)

    def scores(model: Decoder, likely: Sequence[int], given: int) -> BesideScores:
        return BesideScores(model, likely, request.contexts, request.shared, weighing)

    return continued(small_model(), prompt, given, drawn, guess=guess, scores=scores)
