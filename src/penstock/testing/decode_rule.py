"""The law of ``decode.rule``.

What each clause is there to catch:

- the limiting case is plain decoding: a rule that does something where it should do nothing, options that are ignored,
  draws or scores of another row;
- the neighbours' tokens stay, and a sequence's own do not depend on the batch: rows or companions that are mixed up,
  scores that are changed in place, statistics over all rows instead of each;
- one forward pass a token: a rule that computes more than its sequence and its companions;
- the cost of choosing does not grow with the batch, see :func:`check_operations`: a rule that is asked row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.core.randomness import numpy_generator
from penstock.models.decoder import Decoder
from penstock.ops.paged.reference import Reference
from penstock.serve.build import build_engine
from penstock.serve.choose.sampler import Sampler
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.decode.contract import DecodeRule
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.loops.overlapped import Overlapped
from penstock.serve.messages import Request
from penstock.serve.run.runner import Runner
from penstock.testing.serve_model import SHAPE, small_mixture, small_model

#: Tokens that each request of the suite asks for.
LENGTH = 24


def check(rule: DecodeRule) -> None:
    """Asserts the law."""
    check_tokens(rule)
    check_operations(rule)


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
