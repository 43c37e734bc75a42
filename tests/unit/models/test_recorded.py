"""Passes that are recorded, within an engine: its texts are those of an engine that records nothing."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.decoder import Decoder
from penstock.ops.calls import records
from penstock.ops.linear import FEW_ON_CPUS
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.serve.run import passes as passes_module
from tiny_adapters import written

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(not records(), reason="this processor has other calls"),
]

#: Whose matrices are large enough for our products.
SHAPE = DecoderConfig(vocabulary=300, hidden=512, layers=3, heads=8, kv_heads=8, head_dim=64, ffn=512, context=256)
OPTIONS = {"sequences": 6, "tokens": 64, "cache_tokens": 1600, "check": True}


def model(**changes) -> Decoder:
    return Decoder(SHAPE.model_copy(update=changes)).initialize(0).eval()


def engines(monkeypatch, decoder: Decoder, **options) -> tuple[Engine, Engine]:
    """One that records, and one that does not."""
    config = EngineConfig.model_validate({**OPTIONS, **options})
    recording = build_engine(copy.deepcopy(decoder), config)
    monkeypatch.setattr(passes_module, "can_record", lambda model: False)
    return recording, build_engine(decoder, config)


def texts(engine: Engine, adapters: tuple[str, ...] = ("",)) -> dict[str, list[int]]:
    """Of more requests than run at a time, of which some end early."""
    found: dict[str, list[int]] = {}
    for number in range(9):
        prompt = [(7 * number + 3 * place) % SHAPE.vocabulary for place in range(3 + 5 * number)]
        sampling = SamplingParams(temperature=number % 2, seed=number, max_tokens=6 + 3 * number, ignore_eos=True)
        name = adapters[number % len(adapters)]
        engine.add(Request(str(number), prompt, sampling, adapter=name))
    while engine.busy:
        for delta in engine.step():
            found.setdefault(delta.id, []).extend(delta.tokens)
    return found


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"layers": 1}, {}),
        ({"layers": 1}, {"deterministic": True}),
        ({"qk_norm": "head", "kv_heads": 4}, {"codec": "int8"}),
        ({"window": 9, "windowed_layers": (0, 2)}, {"draft": "ngram", "controller": "fixed"}),
        ({"norm_place": "both"}, {"codec": "fp8", "batching": "orca"}),
        ({"hidden": 64, "head_dim": 16, "qkv_bias": True}, {}),
        ({"qk_norm": "head"}, {"deterministic": True}),
    ],
)
def test_texts_are_the_same(changes, options, monkeypatch):
    recording, plain = engines(monkeypatch, model(**changes), **options)
    assert texts(recording) == texts(plain)
    passes = recording.executor.passes.recorded._passes
    assert {tokens for _, tokens, _ in passes} >= {1, 4} and not plain.executor.passes.recorded._passes
    ends = recording.executor.passes.recorded._ends
    assert {rows for rows, _ in ends} >= {1, 4} and all(ends.values()) and not plain.executor.passes.recorded._ends
    # And in memory that others have used since.
    assert texts(recording) == texts(plain)


def test_few_tokens_are_recorded_where_many_cannot_be(monkeypatch):
    """In bf16, libraries multiply more than a few rows."""
    recording, plain = engines(monkeypatch, model().bfloat16(), cache_tokens=800)
    assert texts(recording) == texts(plain)
    assert max(tokens for _, tokens, _ in recording.executor.passes.recorded._passes) == FEW_ON_CPUS[torch.bfloat16]


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "gelu"},
        {"residual_scale": 0.5},
        {"moe": MoEConfig(experts=4, ffn=512)},
    ],
)
def test_what_is_more_than_native_calls_goes_on_as_it_is(changes, monkeypatch):
    recording, plain = engines(monkeypatch, model(**changes))
    assert texts(recording) == texts(plain)
    assert not recording.executor.passes.recorded._passes


def test_scores_that_are_more_than_native_calls_are_computed_as_they_are(monkeypatch):
    recording, plain = engines(monkeypatch, model(logits_scale=0.5, logits_cap=30.0))
    assert texts(recording) == texts(plain)
    recorded = recording.executor.passes.recorded
    assert recorded._passes and recorded._ends and not any(recorded._ends.values())


def test_what_nobody_sees_is_found_by_computing_again(monkeypatch):
    """Here NumPy writes to what a layer gives."""

    def changed(module, inputs, out):
        out.numpy()[:, 0] = 1.0

    decoder = model()
    recording, plain = engines(monkeypatch, decoder)
    for engine in (recording, plain):
        engine.executor.model.layers[1].mlp.register_forward_hook(changed)
    assert texts(recording) == texts(plain)
    assert not recording.executor.passes.recorded._passes


def test_weights_that_were_away_are_read_where_they_are_now(monkeypatch):
    recording, plain = engines(monkeypatch, model())
    for engine in (recording, plain):
        weights = {name: each.clone() for name, each in engine.executor.model.state_dict().items()}
        engine.executor.weights.source = lambda weights=weights: weights
    wanted = texts(plain)
    assert texts(recording) == wanted
    recording.control.sleep()
    assert not recording.executor.passes.recorded._passes
    recording.control.wake()
    assert texts(recording) == wanted
    other = model().state_dict() | {"norm.weight": torch.zeros(SHAPE.hidden)}
    other["layers.0.mlp.down.weight"] = torch.randn(SHAPE.hidden, SHAPE.ffn)
    for engine in (recording, plain):
        engine.executor.weights.load(other)
        engine.memory.pool.forget()
    assert texts(recording) == texts(plain) != wanted


def test_passes_with_adapters_are_recorded_apart_whoever_has_which(monkeypatch, tmp_path: Path):
    decoder = model()
    folders = {name: written(tmp_path / name, decoder, seed, rank=4) for seed, name in enumerate("ab")}
    recording, plain = engines(monkeypatch, decoder, adapters=folders)
    for adapters in (("",), ("", "a"), ("a",), ("b", "", "a"), ("",)):
        assert texts(recording, adapters) == texts(plain, adapters)
    recorded = recording.executor.passes.recorded
    assert recorded._passes and recorded.adapted()._passes
    # Others in the place of one: their numbers are read where they are.
    for engine in (recording, plain):
        engine.adapters.drop("a")
        engine.adapters.load("c", written(tmp_path / "c", decoder, 7, rank=4))
    assert texts(recording, ("c", "b")) == texts(plain, ("c", "b"))


def test_no_more_is_kept_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr("penstock.models.recorded.ENOUGH", 1000)
    recording, plain = engines(monkeypatch, model())
    assert texts(recording) == texts(plain)
    assert not recording.executor.passes.recorded._passes
