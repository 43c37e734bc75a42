"""torch.compile: one graph a shape, no breaks, nothing compiled once training is under way."""

from __future__ import annotations

import copy
import functools
import os

import pytest
import torch
from torch._dynamo.utils import counters

from penstock.core.devices import can_compile
from penstock.core.metrics import read_metrics
from penstock.data.loader import Batch
from penstock.models.attention import PackedRows
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.train.objectives.next_token import NextToken
from penstock.train.precision import Weights
from penstock.train.run import Run
from tiny_chats import chat_config, make_chat_model, turns, write_lines
from tiny_runs import MODEL, VOCABULARY, config

STAGES = {"tokens": 1024, "micro_tokens": 512, "stages": [{"length": 128, "share": 3}, {"length": 256, "share": 2}]}
KINDS = {
    "dense": {"layers": 1},
    "window and norms": {"window": 5, "windowed_layers": [1], "qk_norm": True, "qkv_bias": True, "tied": True},
    "experts": {"layers": 1, "moe": {"experts": 4, "ffn": 24, "shared_ffn": 16, "shared_gate": True}},
    "biased experts": {"layers": 1, "moe": {"experts": 4, "ffn": 24, "router": "sigmoid"}},
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def packed(rows: int, length: int, seed: int) -> tuple[Batch, PackedRows]:
    """A batch of any number of documents, and its context."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (rows, length + 1), generator=generator)
    documents = (torch.rand(rows, length, generator=generator) < 0.2).cumsum(1)
    return Batch(tokens[:, :-1], tokens[:, 1:], documents), PackedRows.of(documents)


def decoder(**changes) -> Decoder:
    return Decoder(DecoderConfig(**{**MODEL, "vocabulary": VOCABULARY, "init_std": 0.1, **changes})).initialize(0)


@pytest.mark.parametrize(
    ("kind", "precision", "backend"),
    [
        pytest.param("window and norms", "fp32", "eager", marks=pytest.mark.slow),
        ("biased experts", "fp32", "eager"),
        ("dense", "bf16", "aot_eager"),
        ("experts", "autocast", "aot_eager"),
    ],
)
def test_a_training_step_is_one_graph(kind, precision, backend):
    """Traced without a break, its backward pass too with ``aot_eager``, for batches with any number of documents."""
    model = decoder(**KINDS[kind])
    weights = Weights(model, precision)
    loss = torch.compile(NextToken(chunk=40).loss, dynamic=False, fullgraph=True, backend=backend)
    for step in range(4):
        with weights.arithmetic(torch.device("cpu")):
            value = loss(model, *packed(4, 32, step)) / 7
        value.backward()
        weights.collect_gradients()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert all(master.grad is not None for master in weights.masters.values())


@pytest.mark.parametrize("recomputes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nothing_is_compiled_after_the_run_has_begun(store, tmp_path, monkeypatch, recomputes):
    """Not at the first update, not when the stage changes, and not in a resumed run; and before it, for each length
    the layers once, however many there are, and embedding, rotary angles, the last norm and the loss."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = {**MODEL, "layers": 9, "vocabulary": VOCABULARY, "context": 256}
    options = config(store, model=model, batch=STAGES, compile=True, steps=10, activation_checkpointing=recomputes)
    trainer = Run.create(options, tmp_path / "run").trainer
    assert trainer.compile() == ""
    assert counters["stats"]["unique_graphs"] == 2 * 5
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    trainer.train()
    assert counters["stats"]["unique_graphs"] == 2 * 5
    assert {record["length"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")} == {128, 256}


def test_layers_with_additions_are_compiled_in_one_piece(tmp_path, monkeypatch):
    """The first, into which no gradient flows, and all others once."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = make_chat_model(tmp_path / "base", layers=3)
    data = {"chats": str(write_lines(tmp_path / "chats.jsonl", [{"messages": turns("what is 1?", "1 a word")}] * 9))}
    tuner = {"name": "lora", "rank": 2}
    options = chat_config(model, data={**data, "held_out": 0.0}, tuner=tuner, compile=True, steps=2)
    trainer = Run.create(options, tmp_path / "run").trainer
    assert trainer.compile() == ""
    assert counters["stats"]["unique_graphs"] == 5 + 1
    trainer.train()
    assert counters["stats"]["unique_graphs"] == 5 + 1


def test_compiling_changes_no_weight_and_no_position(store, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    trainer = Run.create(config(store, compile=True), tmp_path / "run").trainer
    before, position = copy.deepcopy(trainer.weights.masters), copy.deepcopy(trainer.position)
    trainer.compile()
    assert all(torch.equal(before[name], master) for name, master in trainer.weights.masters.items())
    assert trainer.position == position


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="there is no C++ compiler")
def test_what_is_compiled_equals_what_is_not():
    """Loss and gradients by the code that the compiler makes for a dense and a sparse layer, in fp32."""
    moe = {"experts": 4, "ffn": 24, "dense_layers": [0]}
    plain, compiled = decoder(moe=moe), decoder(moe=moe)
    batch, context = packed(2, 16, 0)
    objective = NextToken(chunk=16)
    wanted = objective.loss(plain, batch, context)
    got = torch.compile(objective.loss, dynamic=False, fullgraph=True)(compiled, batch, context)
    wanted.backward()
    got.backward()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for (name, one), other in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_a_compiler_that_does_not_work_is_told_and_done_without(store, tmp_path, monkeypatch):
    """One that is there but cannot make anything, as where the headers of Python are missing."""
    fake = tmp_path / "g++"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(fake),))  # which may have been asked for already
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    model = {**MODEL, "layers": 1, "vocabulary": VOCABULARY}
    trainer = Run.create(config(store, model=model, compile=True, steps=2), tmp_path / "run").trainer
    assert trainer.compile().startswith("the compiler failed")
    assert trainer.train()
