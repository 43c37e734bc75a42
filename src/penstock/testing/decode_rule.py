"""The law of ``decode.rule``."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.randomness import numpy_generator
from penstock.models.decoder import Decoder
from penstock.ops.paged.reference import Reference
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.decode.contract import DecodeRule
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.loops.overlapped import Overlapped
from penstock.serve.messages import Request
from penstock.testing.serve_model import SHAPE, small_model

#: Tokens that each request of the suite asks for.
LENGTH = 24


def check_rule(rule: DecodeRule, limit: DecodeRule, options: dict[str, float]) -> None:
    """Asserts the law: ``limit`` is the rule with the options that make it plain decoding, ``options`` are such of a
    request that go with it."""
    model, draw = small_model(), numpy_generator(0, "testing/prompts")
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
