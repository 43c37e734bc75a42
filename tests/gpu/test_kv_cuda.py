"""Caches that are compressed on the device: in a deterministic engine the tokens are those of each request alone, and
with graphs, compiled, nearly so."""

from __future__ import annotations

import pytest
import torch

from nearly import agreement
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.ops.paged.codecs.fp8 import Fp8
from penstock.ops.paged.flashinfer import FlashInfer
from penstock.policy import index
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.kv.policies.contract import Budgeted
from penstock.serve.messages import Request
from penstock.testing.attention_paged import Place
from penstock.testing.kv_codec import check_windowed

pytestmark = pytest.mark.gpu

SHAPE = DecoderConfig(
    vocabulary=2000, hidden=512, layers=4, heads=8, kv_heads=2, head_dim=128, ffn=1024, context=1024, qk_norm=True
)
BUDGETED = [kind() for each in index().entries("kv.policy") if issubclass(kind := each.load(), Budgeted)]
#: Of those that kernels read.
NAMES = [each.policy_name for each in BUDGETED if each.fitted(SHAPE).view is None]


def engine_of(name: str, **options: object) -> Engine:
    with torch.device("cuda"):
        model = Decoder(SHAPE)
    model = model.initialize(0).to("cuda", torch.bfloat16).eval()
    kv = {"name": name, "budget": 0.3, "every": 32}
    # A share of the memory would count what the engines of earlier tests still hold.
    common = {"kv": kv, "sequences": 16, "cache_tokens": 20_000, "check": True}
    return build_engine(model, EngineConfig.model_validate({**common, **options}))


def told(engine: Engine, numbers: range) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number in numbers:
        prompt = [(7 * number + place * (3 + number)) % SHAPE.vocabulary for place in range(150 + 11 * number)]
        engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)))
    while engine.busy:
        for delta in engine.step():
            found.setdefault(delta.id, []).extend(delta.tokens)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_tokens_do_not_depend_on_the_batch(name):
    engine = engine_of(name, deterministic=True)
    together = told(engine, range(12))
    assert engine.snapshot().dropped_tokens > 1000
    for number in (0, 5, 11):
        engine.memory.pool.forget()
        assert told(engine, range(number, number + 1))[str(number)] == together[str(number)]


@pytest.mark.parametrize(
    "options",
    [
        {"kv": {"name": "minicache", "start": 0, "every": 32}},
        {"kv": {"name": "pyramidkv", "budget": 0.3, "every": 32}},
        {"kv": {"name": "shadow", "budget": 0.3, "outliers": 2, "every": 32}},
        {"kv": {"name": "block_topk", "budget": 0.3, "block": 4, "newest": 1}},
        {"codec": {"name": "int8", "residual": 64}},
    ],
)
def test_what_the_readable_backend_reads_is_what_it_reads_on_the_cpu(options):
    found = []
    for device in ("cuda", "cpu"):
        model = Decoder(SHAPE).initialize(0).to(device).eval()
        config = EngineConfig.model_validate({**options, "sequences": 4, "cache_tokens": 2000, "check": True})
        engine = build_engine(model, config)
        found.append(told(engine, range(3)))
        assert (engine.snapshot().dropped_tokens > 0) == config.kv.compresses
    assert agreement(*found) > 0.8


@pytest.mark.parametrize("name", NAMES)
def test_graphs_give_nearly_the_tokens_of_the_eager_pass(name):
    found = [told(engine_of(name, compile=compiled), range(12)) for compiled in (True, False)]
    assert agreement(*found) > 0.8


def test_a_cache_in_fp8_says_nearly_the_same_with_graphs_and_without():
    options = {"kv": {"name": "full"}, "codec": "fp8"}
    found = [told(engine_of("full", **options, compile=compiled), range(12)) for compiled in (True, False)]
    assert agreement(*found) > 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_to_windows_and_to_fp8_is_put_together(dtype):
    place = Place(torch.device("cuda", 0), dtype, (64, 128))
    if (reason := FlashInfer().serves(*place[:2], 128)) is not None:
        pytest.skip(reason)
    for dim in place.head_dims:
        check_windowed(Fp8(), FlashInfer(), place._replace(head_dims=(dim,)))


def test_fp8_with_windows_says_nearly_what_the_readable_backend_does():
    options = {"kv": {"name": "full"}, "codec": {"name": "fp8", "residual": 64}}
    # There are no graphs for it.
    options |= {"compile": False}
    found = [told(engine_of("full", **options, attention=each), range(6)) for each in ("flashinfer", "reference")]
    assert agreement(*found) > 0.8
