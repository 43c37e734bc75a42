"""A deterministic engine: the same bits alone and in any batch, through its own front door."""

from __future__ import annotations

import random

import pytest
import torch

from penstock.core.config import build
from penstock.core.errors import ConfigError, UsageError
from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Delta, Request
from penstock.testing.serve_model import SHAPE

#: What requests ask for, in turn; log-probabilities show the logits, bit for bit.
KINDS = [
    {"temperature": 0, "logprobs": 3},
    {"temperature": 0.8, "logprobs": 1},
    {"temperature": 1.1, "top_p": 0.9, "logprobs": 0},
    {"temperature": 0, "presence_penalty": 0.5, "logprobs": 2, "prompt_logprobs": 1},
]


def engine(dtype: torch.dtype, cache: int, tokens: int, **options) -> Engine:
    model = Decoder(SHAPE).initialize(0).to(dtype).eval()
    sizes = {"tokens": tokens, "sequences": 8, "block_size": 4, "cache_tokens": cache, "check": True}
    return build_engine(model, EngineConfig.model_validate({"deterministic": True, **sizes, **options}))


def requests() -> list[Request]:
    """Some begin alike."""
    draw = random.Random(3)
    prefix = [draw.randrange(50) for _ in range(30)]
    found = []
    for number in range(14):
        prompt = prefix[: draw.randrange(30)] + [draw.randrange(50) for _ in range(draw.randrange(1, 20))]
        sampling = SamplingParams.model_validate({"max_tokens": 14, "seed": number, **KINDS[number % len(KINDS)]})
        found.append(Request(str(number), prompt, sampling))
    return found


def answers(subject: Engine, todo: list[Request]) -> dict[str, list]:
    """All that is said of each request: tokens, and log-probabilities to the last bit."""
    told: dict[str, list] = {request.id: [] for request in todo}
    for request in todo:
        subject.add(request)
    while subject.busy:
        for delta in subject.step():
            told[delta.id] += _said(delta)
    return told


def _said(delta: Delta) -> list:
    return [*delta.tokens, *(delta.logprobs or []), *(delta.prompt_logprobs or [])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_is_the_same_alone_and_in_any_batch(dtype):
    """Together in a cache so small that some are preempted, in chunks of a few tokens, and with drafts; and each alone
    from an empty cache, whole."""
    todo = requests()
    crowd = engine(dtype, cache=140, tokens=12)
    together = answers(crowd, todo)
    assert crowd.snapshot().preemptions > 0 and crowd.snapshot().cached_tokens > 0
    drafted = answers(engine(dtype, cache=600, tokens=40, draft={"name": "ngram", "shortest": 1}), todo)
    for request in todo:
        alone = answers(engine(dtype, cache=600, tokens=64), [request])[request.id]
        assert alone == together[request.id], request.sampling
        assert [each for each in alone if isinstance(each, int)] == [
            each for each in drafted[request.id] if isinstance(each, int)
        ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv": {"name": "shadow", "rank": 0.5}}, r"together with kv = shadow: .*\nLeave out deterministic, or kv\."),
        ({"kv_reuse": "cache_craft"}, r"with kv_reuse = cache_craft: .*\nLeave out deterministic, or kv_reuse\."),
        ({"kv_reuse": "ape"}, "with kv_reuse = ape"),
    ],
)
def test_what_has_no_such_attention_is_told_by_the_user_s_own_options(options, said):
    with pytest.raises(UsageError, match=said) as raised:
        engine(torch.float32, 400, 40, **options)
    assert "invariant" not in str(raised.value)


def test_another_attention_is_refused():
    with pytest.raises(ConfigError, match="deterministic needs the attention 'invariant'"):
        build(EngineConfig, {"deterministic": True, "attention": "reference"})
