"""Small engines that draft, and what they say of requests of all kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.core.randomness import numpy_generator
from penstock.models.decoder import Decoder
from penstock.models.heads.contract import HeadModule
from penstock.ops.paged.reference import Reference
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.decode.momentum import Momentum
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Delta, Request
from penstock.speculate.contract import Drafter
from penstock.speculate.controllers.contract import Controller
from penstock.speculate.controllers.fixed import Fixed
from penstock.speculate.verifiers.contract import Verifier
from penstock.testing.serve_model import SHAPE, draft_of, head_for, predictor_of, small_model

#: What requests of all kinds ask for.
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.7},
    {"temperature": 0.4, "top_k": 5, "logprobs": 2},
    {"temperature": 0.3, "top_p": 0.9, "n": 2},
    {"temperature": 0, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    {"temperature": 0.5, "presence_penalty": 0.4, "logit_bias": {3: 1.0}},
    {"temperature": 0, "rule": Momentum(alpha=0.02)},
    {"temperature": 0, "stop_tokens": (7,), "min_tokens": 6},
    {"temperature": 0, "prompt_logprobs": 1},
    {"temperature": 0.4, "bad_words": tuple((token, token) for token in range(0, 50, 2)), "min_tokens": 2},
    {"temperature": 0, "allowed_tokens": tuple(range(3, 40)), "logprobs": 0},
    {"temperature": 0.6, "drafts": False},
]


def engine_with(
    drafter: Drafter | None,
    model: Decoder | None = None,
    controller: Controller | None = None,
    verifier: Verifier | None = None,
    draft: Decoder | HeadModule | None = None,
    cache_tokens: int = 400,
    tree: Sequence[int] = (),
    tokens: int = 40,
) -> Engine:
    """A small engine that drafts as much as it may, unless it has a ``controller``."""
    sizes = {"tokens": tokens, "sequences": 8, "block_size": 4, "cache_tokens": cache_tokens}
    more = {"draft_tree": tuple(tree), **({} if verifier is None else {"verifier": verifier})}
    drafts = {} if drafter is None else {"draft": drafter, "controller": controller or Fixed()}
    config = EngineConfig.model_validate({"attention": Reference(), "check": True, **drafts, **sizes})
    config = config.model_copy(update=more)
    target = model or small_model()
    if draft is None:
        draft = draft_of(target) if drafter is None or drafter.head is None else head_for(drafter, target)
    predictor = None
    if drafter is not None and config.controller.predicts and isinstance(draft, Decoder):
        predictor = predictor_of(draft)
    return build_engine(target, config, draft=draft, predictor=predictor)


def outcomes(engine: Engine) -> dict[tuple[str, int], list[int]]:
    """The tokens of each continuation of a request of each kind."""
    return {name: tokens_of(deltas) for name, deltas in played(engine, 0, times=1).items()}


def played(engine: Engine, seed: int, times: int = 2) -> dict[tuple[str, int], list[Delta]]:
    """All deltas of requests of all kinds, whose prompts repeat themselves."""
    draw = numpy_generator(seed, "testing/drafter")
    found: dict[tuple[str, int], list[Delta]] = {}
    for number, kind in enumerate(KINDS * times):
        piece = [int(token) for token in draw.integers(SHAPE.vocabulary, size=draw.integers(2, 7))]
        prompt = (piece * 12)[: int(draw.integers(8, 40))]
        sampling = SamplingParams.model_validate({"max_tokens": 24, "seed": number, **kind})
        engine.add(Request(str(number), prompt, sampling))
        for _ in range(int(draw.integers(3))):
            gather(engine, found)
    while engine.busy:
        gather(engine, found)
    return found


def gather(engine: Engine, found: dict[tuple[str, int], list[Delta]]) -> None:
    """Puts what a step of ``engine`` says to what was ``found``."""
    for delta in engine.step():
        found.setdefault((delta.id, delta.index), []).append(delta)


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def logprobs_of(deltas: list[Delta]) -> list[float]:
    return [each.logprob for delta in deltas for told in (delta.prompt_logprobs, delta.logprobs) for each in told or []]
