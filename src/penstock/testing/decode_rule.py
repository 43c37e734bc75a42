"""The law of ``decode.rule``.

What each clause is there to catch:

- the limiting case is plain decoding: a rule that does something where it should do nothing, options that are ignored,
  draws or scores of another row;
- the neighbours' tokens stay, and a sequence's own do not depend on the batch: rows or companions that are mixed up,
  scores that are changed in place, statistics over all rows instead of each;
- one forward pass a token: a rule that computes more than its sequence and its companions;
- texts that are superposed are those of the definition, see :func:`check_superposed`: crossed texts that are not the
  best, a row that is another sum of embeddings, stands elsewhere, does not see those before it, or is not what it was
  once it is computed again; texts that end too early or too late, or whose news are mixed up; more rows for more texts;
- the cost of choosing does not grow with the batch, see :func:`check_operations`: a rule that is asked row by row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.core.randomness import numpy_generator
from penstock.models.decoder import Decoder
from penstock.models.prompted import PromptedDecoder
from penstock.ops.paged.reference import Reference
from penstock.serve.build import build_engine
from penstock.serve.choose.proposals import Proposals
from penstock.serve.choose.sampler import Sampled, Sampler
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.decode.contract import DecodeRule
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.loops.overlapped import Overlapped
from penstock.serve.messages import Delta, Finish, Request
from penstock.serve.run.runner import Runner
from penstock.serve.run.step import Step
from penstock.testing.reference import next_logits
from penstock.testing.serve_model import SHAPE, small_mixture, small_model

#: Tokens that each request of the suite asks for.
LENGTH = 24


def check(rule: DecodeRule) -> None:
    """Asserts the law."""
    check_tokens(rule)
    check_operations(rule)
    check_superposed(rule)


def model_for(rule: DecodeRule) -> Decoder:
    """A small model, with experts where the rule wants some."""
    return small_model() if rule.again is None else small_mixture()


def check_operations(rule: DecodeRule) -> None:
    """Asserts that choosing calls PyTorch no more often for eight sequences than for two."""

    def count(sequences: int) -> int:
        options, engine = rule.limit().options, tiny_engine(model_for(rule))
        for number in range(sequences):
            sampling = SamplingParams.model_validate({"max_tokens": 8, "seed": number, **options, "rule": rule})
            engine.add(Request(str(number), [number, 1, 2], sampling))
        runner = engine.executor
        assert isinstance(runner, Runner)
        for _ in range(4):
            engine.step()
        batch = engine.steps.form()
        assert batch is not None
        step = runner.plan(batch)
        logits = torch.zeros(len(step.asked.slots), SHAPE.vocabulary)
        operations = Operations()
        with operations:
            Sampler(16, SHAPE.vocabulary, logits.device).sample(logits, step.asked)
        return operations.calls

    assert count(8) <= count(2), "choosing costs more operations for more sequences"


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def check_tokens(rule: DecodeRule) -> None:
    """Asserts what a rule does to tokens, its own and others'."""
    limit, options = rule.limit().rule, rule.limit().options
    model, draw = model_for(rule), numpy_generator(0, "testing/prompts")
    prompts = [draw.integers(0, SHAPE.vocabulary, draw.integers(1, 12)).tolist() for _ in range(6)]
    plain = [SamplingParams.model_validate({"max_tokens": LENGTH, "seed": i, **options}) for i in range(len(prompts))]
    ruled, limited = ([each.model_copy(update={"rule": chosen}) for each in plain] for chosen in (rule, limit))
    expected = decode(tiny_engine(model), prompts, plain)
    assert decode(tiny_engine(model), prompts, limited) == expected, "the limiting case is not plain decoding"
    together = decode(tiny_engine(model), prompts * 2, ruled + plain)
    assert together[len(prompts) :] == expected, "the rule changes its neighbours' tokens"
    for prompt, sampling, found in zip(prompts, ruled, together[: len(prompts)], strict=True):
        engine = tiny_engine(model)
        assert decode(engine, [prompt], [sampling]) == [found], "the rule's tokens depend on the batch"
        steps = engine.snapshot().steps
        assert steps == LENGTH, f"{steps} forward passes for {LENGTH} tokens"


def check_superposed(rule: DecodeRule) -> None:
    """Asserts of one that superposes that the continuations of each request are those of the definition, computed anew
    from the whole text, where requests with few and many of them share a cache that is too small for all; and that a
    request alone takes a pass of one row for each token, however many there are."""
    if not rule.superposes:
        return
    model, draw = small_model(), numpy_generator(0, "testing/superposed")
    sizes = {"tokens": 24, "sequences": 6, "block_size": 4, "cache_tokens": 80, "check": True}
    engine = build_engine(model, EngineConfig(attention=Reference(), loop=Overlapped(), **sizes))
    requests = []
    prompts = [draw.integers(0, 9, 8 + 3 * number).tolist() for number in range(4)]  # few tokens, which come again
    for number, texts in enumerate((1, 3, 8, 2, 5, 4, 3, 1)):
        prompt = prompts[number % 4]  # two have the same, and other rows behind it
        stop = tuple(range(0, SHAPE.vocabulary, 13)) if number % 2 else ()
        given = {"temperature": 0, "max_tokens": 14, "n": texts, "stop_tokens": stop, "logprobs": number % 3}
        sampling = SamplingParams.model_validate({**given, "rule": rule})
        requests.append(Request(str(number), prompt, sampling))
        engine.add(requests[-1])
    found: dict[tuple[str, int], Delta] = {}
    while engine.busy:
        for delta in engine.step():
            assert (delta.id, delta.index) not in found, "a text that is superposed is told twice"
            found[delta.id, delta.index] = delta
    for each in requests:
        wanted = superposed_texts(model, each.prompt, each.sampling)
        own = [found[each.id, index] for index in range(each.sampling.n)]
        assert [tuple(delta.tokens) for delta in own] == [*wanted], "texts that are superposed are others"
        for delta, logprobs in zip(own, wanted.values(), strict=True):
            assert delta.logprobs is not None
            told, ended = [row.logprob for row in delta.logprobs], delta.tokens[-1] in each.sampling.stop_tokens
            assert np.allclose(told, logprobs, atol=1e-4), "log-probabilities are those of other tokens"
            assert delta.finish is (Finish.STOP if ended else Finish.LENGTH), "a text ends for another reason"
    assert engine.snapshot().preemptions, "the cache was large enough for all"
    for texts in (1, 8):
        _check_rows(rule, model, texts)


def _check_rows(rule: DecodeRule, model: Decoder, texts: int) -> None:
    """Asserts that so many ``texts`` that ``rule`` superposes take one row a token."""
    engine, prompt = tiny_engine(model), [3, 1, 4, 1, 5]
    runner, rows = engine.executor, list[int]()
    assert isinstance(runner, Runner)
    execute = runner.execute

    def counting(step: Step, proposals: Proposals | None = None) -> Sampled | None:
        rows.append(sum(part.inputs.shape[1] for part in step.parts))
        return execute(step, proposals)

    vars(runner)["execute"] = counting
    sampling = {"temperature": 0, "max_tokens": LENGTH, "n": texts, "rule": rule}
    decode(engine, [prompt], [SamplingParams.model_validate(sampling)])
    wanted = [len(prompt), *[1] * (LENGTH - 1)]
    assert rows == wanted, f"{texts} texts of {LENGTH} tokens are computed in {rows} rows"


def superposed_texts(
    model: Decoder, prompt: Sequence[int], sampling: SamplingParams
) -> dict[tuple[int, ...], list[float]]:
    """The continuations of ``prompt`` that are superposed, the best first by the mean score of a token, with the
    log-probabilities that ``model`` gave their tokens: by the definition and without a cache."""
    assert sampling.rule is not None
    judge, rows = sampling.rule.judge(prompt), torch.zeros(sampling.max_tokens, SHAPE.hidden)
    assert judge is not None
    texts: dict[tuple[int, ...], float] = {(): 0.0}
    logprobs: dict[tuple[int, ...], list[float]] = {(): []}
    for depth in range(sampling.max_tokens):
        scores = next_logits(PromptedDecoder(model, rows), [*prompt, *range(-1, -1 - depth, -1)]).log_softmax(-1)
        said, tokens = (each.tolist() for each in scores.topk(sampling.n))
        ended = {text: score for text, score in texts.items() if text and text[-1] in sampling.stop_tokens}
        crossed = dict(ended)
        for text in texts.keys() - ended.keys():
            for token, logprob, worth in zip(tokens, said, judge(text, tokens, said), strict=True):
                crossed[*text, token] = texts[text] + worth
                logprobs[*text, token] = [*logprobs[text], logprob]
        texts = {text: crossed[text] for text in sorted(crossed, key=lambda each: -crossed[each])[: sampling.n]}
        going = {text: math.exp(score) for text, score in texts.items() if text[-1] not in sampling.stop_tokens}
        for text, chance in going.items():
            rows[depth] += chance / sum(going.values()) * model.embedding.weight.detach()[text[-1]]
        if not going:
            break
    return {text: logprobs[text] for text in sorted(texts, key=lambda each: -texts[each] / len(each))}


def decode(engine: Engine, prompts: Sequence[list[int]], samplings: Sequence[SamplingParams]) -> list[list[int]]:
    """The tokens after each of ``prompts``, all of them in one engine."""
    found: dict[str, list[int]] = {}
    for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        engine.add(Request(str(index), prompt, sampling))
        found[str(index)] = []
    while engine.busy:
        for delta in engine.step():
            found[delta.id] += delta.tokens
    return list(found.values())


def tiny_engine(model: Decoder) -> Engine:
    """An engine for a model of the suite's shape."""
    sizes = {"tokens": 40, "sequences": 16, "block_size": 4, "cache_tokens": 2000}
    return build_engine(model, EngineConfig(attention=Reference(), loop=Overlapped(), **sizes))
