"""Engines whose caches hold keys and values in fewer bits."""

from __future__ import annotations

import copy

import pytest
import torch

from penstock.core.errors import PenstockError, UsageError
from penstock.ops.paged.contract import PagedAttention
from penstock.ops.paged.reference import Reference
from penstock.serve import sizing
from penstock.serve.build import build_engine, build_runner
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.messages import Request
from penstock.testing.engine.requests import numbers
from penstock.testing.serve_model import small_model


def said(engine, count=3):
    """What greedy requests are told, all at once."""
    tokens = {str(number): [] for number in range(count)}
    for number in tokens:
        engine.add(Request(number, numbers(f"codec {number}", 20), SamplingParams(temperature=0, max_tokens=12)))
    while engine.busy:
        for delta in engine.step():
            tokens[delta.id] += delta.tokens
    return tokens


def test_as_many_bits_as_the_dtype_has_give_the_same_tokens():
    model = copy.deepcopy(small_model()).bfloat16()
    found = [said(build_engine(model, EngineConfig(codec=codec, cache_tokens=400))) for codec in ("plain", "bf16")]
    assert found[0] == found[1]


def test_the_same_memory_has_more_blocks(monkeypatch):
    monkeypatch.setattr(sizing, "free_memory", lambda: 2 * 10**6)
    config = EngineConfig(memory=1.0, sequences=8)
    plain, coded = (build_runner(small_model(), config.model_copy(update={"codec": each})) for each in codecs("int8"))
    # Heads of 8 numbers: 32 bytes in float32, and 12 as bytes with a step.
    assert plain.cache.shape.block_bytes == 2 * 2 * 2 * 16 * 32 and coded.cache.shape.block_bytes == 2 * 2 * 2 * 16 * 12
    assert plain.blocks == 10**6 // 4096 and coded.blocks == 10**6 // 1536
    assert coded.memory["cache"] == (coded.blocks + 1) * 1536


def codecs(name):
    return EngineConfig().codec, EngineConfig(codec=name).codec


def test_deterministic_engines_read_codes():
    model = copy.deepcopy(small_model())
    config = EngineConfig(codec="int8", deterministic=True, cache_tokens=400)
    assert said(build_engine(model, config), 1)["0"] == said(build_engine(model, config), 3)["0"]


class Narrow(Reference):
    """Reads what is plain."""

    policy_name = "narrow"
    reads = PagedAttention.reads


def test_a_backend_that_cannot_read_a_codec_is_refused_by_name():
    with pytest.raises(UsageError, match="'narrow' does not serve here: it cannot read blocks in int8"):
        build_engine(small_model(), EngineConfig(codec="int8", attention=Narrow()))


def test_float64_is_read_by_the_readable_backend():
    model = copy.deepcopy(small_model()).double()
    runner = build_runner(model, EngineConfig(codec="int8", cache_tokens=100))
    assert type(runner.cache).__name__ == "ReferenceCache" and runner.cache.shape.dtype == torch.float64


def test_windows_take_what_they_are_said_to():
    model = copy.deepcopy(small_model())
    config = EngineConfig(codec={"name": "int8", "residual": 20}, sequences=8, cache_tokens=100, draft="ngram")
    runner = build_runner(model, config)
    shape = runner.cache.shape
    # 20 tokens are 2 blocks of 16; as many as are drafted, 1 block, may be computed for nothing. 64 numbers of 4 bytes
    # a token.
    assert shape.residual.tokens == 32 and shape.residual.places == 48 and 0 < config.draft.most <= 16
    assert runner.memory["windows"] == shape.residual_bytes == 8 * 48 * 2 * 2 * 2 * 8 * 4
    # The kernel reads a vector past the end.
    assert vars(runner.cache)["_windows"].memory.nbytes == shape.residual_bytes + 64
    assert shape.block_bytes == 2 * 2 * 2 * 16 * 12, "blocks are as large as without windows"


@pytest.mark.parametrize("draft", [None, "ngram"])
def test_the_kernel_and_the_readable_backend_read_the_same_windows(draft):
    options = {
        "codec": {"name": "int8", "residual": 16},
        "cache_tokens": 400,
        "sequences": 4,
        "tokens": 32,
        "draft": draft,
    }
    engines = [
        build_engine(small_model(), EngineConfig(**options, attention=name, check=True))
        for name in ("cpu", "reference")
    ]
    assert said(engines[0]) == said(engines[1])


def test_the_memory_of_windows_is_not_for_blocks(monkeypatch):
    monkeypatch.setattr(sizing, "free_memory", lambda: 2 * 10**6)
    config = EngineConfig(memory=1.0, sequences=8, codec={"name": "int8", "residual": 32})
    runner = build_runner(small_model(), config)
    assert runner.blocks == (10**6 - 8 * 32 * 256) // 1536
    with pytest.raises(PenstockError, match=r"take 0\.00 GiB for 256 sequences") as raised:
        build_runner(small_model(), config.model_copy(update={"sequences": 256}))
    assert "Lower engine.sequences or engine.codec.residual" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"codec": {"name": "plain", "residual": 32}}, "'plain' has all tokens"),
        ({"deterministic": True}, "deterministic engines"),
        ({"tensor_parallel": 2}, "divided among ranks"),
        ({"kv_reuse": "ape"}, "kv_reuse = ape"),
        ({"kv": "block_topk"}, "kv = block_topk"),
        ({"draft": "python-1m"}, "what drafts here"),
        ({"draft": "ngram", "draft_tree": "2"}, "trees need"),
    ],
)
def test_what_windows_do_not_go_together_with(options, reason):
    with pytest.raises(ValueError, match=reason):
        EngineConfig(**{"codec": {"name": "int8", "residual": 32}, **options})


def test_windows_do_not_go_together_with_tokens_that_share_places():
    config = EngineConfig(codec={"name": "bf16", "residual": 32}, kv="pyramidkv")
    with pytest.raises(UsageError, match=r"codec.residual counts windows in places.*tokens of some layers"):
        build_engine(small_model(), config)


def test_a_backend_without_windows_is_refused_by_name():
    config = EngineConfig(codec={"name": "int8", "residual": 32}, attention="invariant")
    with pytest.raises(UsageError, match="'invariant' does not serve here: it has no windows in full precision"):
        build_engine(small_model(), config)
