"""The law of ``kv.reuse``: contexts that requests name, inside of the engine, beside an oracle without a cache.

What each clause is there to catch:

- :func:`check_one`: contexts at other positions than they say, that are seen by what stands before them, or that change
  attention where nothing is to be changed;
- :func:`check_scores`: a context that sees another one or is left out, a temperature or a scale at the wrong place;
- :func:`check_order`: contexts that know in which order they came;
- :func:`check_apart`: blocks that depend on contexts, and are found by a text that has others or none;
- :func:`check_found`: what is in the cache and computed all the same, or counted wrongly; a block that is taken for
  that of another text; a text that is not found behind the contexts that it had;
- :func:`check_kept`: a context that is computed where a request that was kept has it; what a kept text has behind the
  prompt, taken for what stands behind contexts;
- :func:`check_moved`: keys that were turned by a wrong angle; a token that is computed again and does not see one that
  is, sees a later one, or is another than the policy names; attention that is weighed for other tokens or texts;
- :func:`check_in_a_row`: blocks with moved contexts, or what was computed behind such, in others' prefixes;
- :func:`check_nearer`: tokens that are computed again to no use;
- :func:`check_counted`: what is taken from where contexts are cached and computed all the same, or counted wrongly;
- :func:`check_crowd`: a request whose tokens depend on the batch, on chunks, on whom it shares contexts with, or on
  having been preempted; blocks that are lost; contexts that are overwritten, or go to others' prefixes.

The oracles are :class:`~penstock.testing.beside_scores.BesideScores`, and for contexts that are moved
:class:`~penstock.testing.moved_scores.MovedTexts`. Where a policy moves contexts, what a request finds depends on those
that came before it: clauses that leave this open are checked of the limiting case.
"""

from __future__ import annotations

import copy
import functools
import itertools
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
from penstock.serve.engine.batch import Awaited, Batch
from penstock.serve.engine.engine import Engine
from penstock.serve.kv.disk import DiskBlocks
from penstock.serve.kv.host import HostBlocks
from penstock.serve.kv.reuse.contract import Reuse, Weighing
from penstock.serve.kv.tiers import Tiers
from penstock.serve.messages import Request
from penstock.testing.at_once import AtOnce
from penstock.testing.beside_scores import BesideScores
from penstock.testing.engine.requests import numbers
from penstock.testing.moved_scores import MovedScores, MovedTexts
from penstock.testing.reference import continued
from penstock.testing.serve_model import SHAPE

#: Texts of which requests have some as contexts, and what stands before and behind them.
CONTEXTS = [numbers(f"context {index}", length) for index, length in enumerate((13, 4, 9, 1, 16, 8))]
BEFORE, BEHIND = numbers("before contexts", 7), numbers("behind contexts", 5)


@functools.cache
def deep_model() -> Decoder:
    """The small model with a layer more: what is wrong of keys and values in the second one is seen in those of others
    in the third."""
    return Decoder(SHAPE.model_copy(update={"layers": 3})).initialize(0).eval()


@functools.cache
def exact_model() -> Decoder:
    """The same in float64, whose scores can be compared to 1e-5."""
    return copy.deepcopy(deep_model()).double()


def check(policy: Reuse, crowds: int = 4) -> None:
    """Asserts the law."""
    check_scene(policy)
    for seed in range(crowds):
        check_crowd(policy.limit() if policy.moves else policy, seed)
        if policy.moves:
            check_crowd(policy, seed)


def check_scene(policy: Reuse) -> None:
    """Asserts the law of one request after the other."""
    row = policy.limit() if policy.moves else policy
    check_one(policy)
    check_scores(row)
    check_order(policy)
    check_apart(row)
    check_found(row)
    check_kept(row)
    if policy.moves:
        for graded in (policy, policy.grades()[0]):
            check_moved(graded)
            check_in_a_row(graded)
        check_nearer(policy)
        check_counted(policy)


def opened(policy: Reuse, **options: object) -> Engine:
    """An engine for the exact model, with small blocks."""
    given = {"attention": Reference(), "tokens": 64, "sequences": 10, "block_size": 4, "cache_tokens": 400}
    return build_engine(
        exact_model(), EngineConfig.model_validate({**given, **options, "kv_reuse": policy, "check": True})
    )


def answered(
    engine: Engine, contexts: Sequence[list[int]], before: list[int] = BEFORE, sources: Sequence[str | None] = ()
) -> tuple[list[int], list[float]]:
    """Six tokens, the most probable ones, and their log-probabilities."""
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=0)
    engine.add(Request("asked", [*before, *BEHIND], sampling, contexts=list(contexts), shared=len(before)), sources)
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
    scores = BesideScores(exact_model(), [*before, *BEHIND, *tokens], contexts, len(before), weighing)
    return _told(scores, [*before, *BEHIND], tokens)


def check_moved(policy: Reuse) -> None:
    """Asserts that scores are those of a text in which the policy left some keys and values as they were in an earlier
    one, whose positions alone are others: where the prompt is computed at once and in chunks."""
    for options in ({}, {"tokens": 10, "sequences": 8}):
        engine, texts = opened(policy, **options), MovedTexts(exact_model(), policy)
        for places in ([0, 1, 2], [2, 1, 0], [1, 2, 4, 3], [0, 1, 2], [4, 0, 5, 2], [0, 1, 2, 5]):
            chosen = [CONTEXTS[place] for place in places]
            for before in (BEFORE, []):
                tokens, logprobs = answered(engine, chosen, before)
                scores = MovedScores(texts, [*before, *BEHIND, *tokens], chosen, len(before))
                texts.remember(before, chosen)
                _near(logprobs, _told(scores, [*before, *BEHIND], tokens), "scores are not those of moved contexts")


def check_in_a_row(policy: Reuse) -> None:
    """Asserts that texts without contexts have the scores that they should have, whatever contexts were moved to where
    their tokens stand before: also where a context that was computed behind others, which had been moved, comes behind
    the same, which had not."""
    engine = opened(policy)
    for places, plain in (([0, 1], 0), ([1, 0, 3], 0), ([1, 0], 1), ([1, 0, 3], 0), ([1, 0, 3], 1), ([0, 1], 1)):
        chosen = [CONTEXTS[place] for place in places]
        text = [*BEFORE, *itertools.chain(*chosen)]
        tokens, logprobs = answered(engine, [], text) if plain else answered(engine, chosen)
        if plain:
            _near(logprobs, _expected([], tokens, None, text), "moved contexts are in others' prefixes")


def check_nearer(policy: Reuse, scenes: int = 16) -> None:
    """Asserts that the log-probabilities of a question behind contexts that were moved come nearer to those in a row,
    on average over so many ``scenes``, the more of the contexts is computed again."""
    errors: dict[int, list[float]] = defaultdict(list)
    for scene in range(scenes):
        contexts = [numbers(f"scene {scene}, context {index}", 12) for index in range(3)]
        order, asked = [contexts[2], contexts[0], contexts[1]], [*BEFORE, *BEHIND]
        scores = BesideScores(exact_model(), asked, order, len(BEFORE), None)
        wanted = np.array(_told(scores, asked[: len(BEFORE) + 1], BEHIND[1:]))
        for grade, graded in enumerate(policy.grades()):
            engine = opened(graded)
            answered(engine, contexts)
            errors[grade].append(float(np.abs(_rated(engine, order) - wanted).mean()))
    means = [float(np.mean(own)) for own in errors.values()]
    assert means == sorted(means, reverse=True), f"the errors, the more is computed again: {means}"
    assert means[-1] < 1e-5 < means[0], f"all is computed again, or nothing, and the errors are {means}"


def _rated(engine: Engine, contexts: Sequence[list[int]]) -> np.ndarray:
    """The log-probabilities of all tokens behind the ``contexts`` but the first."""
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, prompt_logprobs_from=len(BEFORE) + 1)
    engine.add(Request("rated", [*BEFORE, *BEHIND], sampling, contexts=list(contexts), shared=len(BEFORE)))
    told: list[float] = []
    while engine.busy:
        for delta in engine.step():
            told += [each.logprob for each in delta.prompt_logprobs or []]
    return np.array(told)


def check_counted(policy: Reuse) -> None:
    """Asserts that a request whose contexts are all cached computes, of these, just what the policy names, and says how
    much it has found; that of one where it was, behind the same texts, nothing is computed; and that a request with
    contexts that nobody has had takes nothing."""
    engine, texts = opened(policy, loop="plain"), MovedTexts(exact_model(), policy)
    for places in ([0, 1, 2, 3], [0, 2, 1], [3, 2, 1, 0], [4, 5], [2, 4, 0, 5]):
        contexts, before = [CONTEXTS[place] for place in places], engine.snapshot()
        computed, cached = _computed(engine, contexts)
        now, own = engine.snapshot(), sum(map(len, contexts))
        kept = texts.placed(BEFORE, contexts)[0]
        texts.remember(BEFORE, contexts)
        # What is found in the prefix tree as well is not moved.
        found = len(set(kept) | set(range(cached - (now.reused_tokens - before.reused_tokens))))
        assert computed + cached == len(BEFORE) + len(BEHIND) + own, "what is found is computed, or counted wrongly"
        assert cached == found == now.cached_tokens - before.cached_tokens, f"{cached} tokens are said to be found"
        assert now.held == 0, "contexts are held by nobody"


def _told(scores: BesideScores | MovedScores, text: list[int], tokens: list[int]) -> list[float]:
    """The log-probabilities of ``tokens`` behind the ``text``."""
    places = range(len(tokens))
    return [float(scores.after([*text, *tokens[:place]]).log_softmax(-1)[tokens[place]]) for place in places]


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


def check_kept(policy: Reuse) -> None:
    """Asserts that contexts which are parts of texts that were kept, to whichever of their tokens, are not computed
    again but for their last token, nor is the prompt before them, where contexts are encoded apart; that scores are
    those of a dense softmax all the same; and that nothing is kept in the end."""
    if policy.weighing is None:
        return
    engine, size = opened(policy, loop="plain"), 4
    # One begins as what stands behind the contexts does, and may not be taken for that.
    begun = {"one": [*BEHIND, *CONTEXTS[1]], "other": CONTEXTS[2]}
    for id, context in begun.items():
        engine.add(Request(id, [*BEFORE, *context], SamplingParams(temperature=0, max_tokens=9), keep=True))
    drawn: dict[str, list[int]] = {id: [] for id in begun}
    while engine.busy:
        for delta in engine.step():
            drawn[delta.id] += delta.tokens
    positions: list[int] = []
    launch = engine.executor.launch

    def counted(batch: Batch) -> Awaited | None:
        positions.append(batch.tokens)
        return launch(batch)

    engine.executor.launch = counted  # type: ignore[method-assign]
    for count in (9, 4, 3 + size, 0):
        contexts = [[*begun[id], *drawn[id][:count]] for id in begun]
        positions.clear()
        tokens, logprobs = answered(engine, contexts, sources=list(begun))
        _near(logprobs, _expected(contexts, tokens, policy.weighing), "scores behind what was kept are not dense ones")
        wanted = len(contexts) + len(BEHIND) + len(tokens) - 1
        assert sum(positions) == wanted, f"{sum(positions)} tokens are computed beside kept ones, and {wanted} are new"
    tokens, _ = answered(engine, [contexts[0], CONTEXTS[4]], sources=["one", None])
    for id in begun:
        engine.forget(id)
    assert engine.snapshot().held == 0


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
    preempted, with memory and disk for what leaves it, aborted, cut back and fed, have the tokens of the oracle. Where
    contexts are moved, a first request has had all of them, and the host's memory has room for what it left."""
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
    moved = policy.moves and policy != policy.limit()
    model = exact_model() if moved else deep_model()  # keys that are turned twice are rounded otherwise
    runner, texts = build_runner(model, config), MovedTexts(model, policy)
    with tempfile.TemporaryDirectory() as folder:
        disk = DiskBlocks(Path(folder), "crowd", 1 << 20)
        tiers = Tiers(HostBlocks(runner.cache, 400 if moved else 12), disk, AtOnce()) if moved or seed % 2 else None
        engine = Engine(config, runner, tiers=tiers)
        requests: dict[str, Request] = {}
        told: dict[str, list[int]] = defaultdict(list)
        aborted: set[str] = set()
        if moved:
            answered(engine, CONTEXTS)
            texts.remember(BEFORE, CONTEXTS)
        for number in range(rounds):
            for _ in range(int(draw.integers(4))):
                request = _drawn(draw, str(len(requests)), engine, (len(BEFORE),) if moved else (0, 4, 7))
                requests[request.id] = request
                engine.add(request)
            for _ in range(int(draw.integers(1, 5))):
                _hear(engine, told)
            begun = [id for id, tokens in told.items() if len(tokens) > 3 and id in engine.requests]
            if begun and number % 4 == 1:
                aborted.add(begun[0])
                engine.abort(begun[0])
            elif begun and number % 4 == 3:
                _cut(engine, begun[-1], requests, told, apart=policy.weighing is not None)
        while engine.busy:
            _hear(engine, told)
        now = engine.snapshot()
        assert now.held == now.running == now.waiting == 0, "something is held for ever"
        engine.close()
    for id, request in requests.items():
        wanted = _follows(request, policy.weighing, told[id], texts if moved else None)
        assert told[id] == (wanted[: len(told[id])] if id in aborted else wanted), f"request {id} has other tokens"


def _hear(engine: Engine, told: dict[str, list[int]]) -> None:
    for delta in engine.step():
        told[delta.id] += delta.tokens


def _drawn(draw: np.random.Generator, id: str, engine: Engine, shared: Sequence[int]) -> Request:
    chosen = [CONTEXTS[place] for place in draw.permutation(len(CONTEXTS))[: int(draw.integers(5))]]
    before = BEFORE[: int(draw.choice(shared))]
    prompt, size = [*before, *BEHIND[: int(draw.integers(1, 6))]], engine.limits.block_size
    # All has to fit at the same time, each text with a last block that may be nearly empty.
    taken = sum(-(-(len(before) + len(each)) // size) for each in chosen)
    most = min(24, (engine.limits.blocks - taken) * size - len(prompt))
    sampling = SamplingParams(temperature=float(draw.integers(2)), seed=int(draw.integers(2)), max_tokens=max(1, most))
    if not chosen:  # a text that begins as one with a context does, and has none
        return Request(id, [*before, *CONTEXTS[0], *prompt[len(before) :]], sampling)
    return Request(id, prompt, sampling, contexts=chosen, shared=len(before))


def _cut(engine: Engine, id: str, requests: dict[str, Request], told: dict[str, list[int]], *, apart: bool) -> None:
    """Takes the request ``id`` back to its third token, from where it says the same again, and feeds it the fourth."""
    engine.control.pause()  # what is on its way is told first
    _hear(engine, told)
    engine.control.resume()
    if id in engine.requests and requests[id].contexts:
        engine.truncate(id, (len(requests[id].prompt) if apart else requests[id].length) + 3)
        engine.feed(id, told[id][3:4])
        del told[id][4:]


def _follows(
    request: Request, weighing: Weighing | None, guess: list[int], texts: MovedTexts | None = None
) -> list[int]:
    prompt, given = request.prompt, len(request.prompt)
    drawn = Sampling(
        temperature=request.sampling.temperature, seed=request.sampling.seed, max_tokens=request.sampling.max_tokens
    )
    if not request.contexts:
        return continued(deep_model(), prompt, given, drawn, guess=guess)

    def scores(model: Decoder, likely: Sequence[int], given: int) -> BesideScores | MovedScores:
        if texts is not None:
            return MovedScores(texts, likely, request.contexts, request.shared)
        return BesideScores(model, likely, request.contexts, request.shared, weighing)

    return continued(deep_model(), prompt, given, drawn, guess=guess, scores=scores)
