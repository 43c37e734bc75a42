"""A deterministic engine on CUDA: the same bits alone and in any batch."""

from __future__ import annotations

import random

import pytest
import torch

from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request

pytestmark = pytest.mark.gpu

SHAPE = DecoderConfig(
    vocabulary=4000,
    hidden=512,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=64,
    ffn=1024,
    context=512,
    qk_norm=True,
    init_std=0.05,
)


def engine(cache: int, tokens: int) -> Engine:
    model = Decoder(SHAPE).initialize(0).to("cuda", torch.bfloat16).eval()
    config = EngineConfig(deterministic=True, tokens=tokens, sequences=32, cache_tokens=cache, check=True)
    return build_engine(model, config)


def answers(subject: Engine, todo: list[Request]) -> dict[str, list[object]]:
    told: dict[str, list[object]] = {request.id: [] for request in todo}
    for request in todo:
        subject.add(request)
    while subject.busy:
        for delta in subject.step():
            told[delta.id] += [*delta.tokens, *(delta.logprobs or [])]
    return told


def test_every_bit_is_the_same_alone_and_in_any_batch() -> None:
    draw = random.Random(5)
    prefix = [draw.randrange(4000) for _ in range(200)]
    todo = []
    for number in range(40):
        prompt = prefix[: draw.randrange(200)] + [draw.randrange(4000) for _ in range(draw.randrange(1, 60))]
        sampling = SamplingParams(temperature=0.9 * (number % 2), seed=number, max_tokens=32, logprobs=2)
        todo.append(Request(str(number), prompt, sampling))
    crowd = engine(cache=900, tokens=96)
    together = answers(crowd, todo)
    assert crowd.snapshot().preemptions > 0 and crowd.snapshot().cached_tokens > 0
    for request in todo[::5]:
        assert answers(engine(cache=2400, tokens=512), [request])[request.id] == together[request.id]
