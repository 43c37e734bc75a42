"""What opening a model costs, counted: modules that are not imported, bytes that are not taken."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from gguf_files import SHAPE, coded, write
from penstock.models import hub
from penstock.ops import native
from penstock.serve import sizing
from penstock.serve.build import build_engine, build_runner
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.link.starting import Starting
from penstock.serve.messages import Request
from penstock.serve.opening import open_engine
from penstock.serve.sizing import weight_bytes
from penstock.testing.serve_model import small_model
from penstock.testing.transformers_peer import peer
from tiny_adapters import written

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")

#: What takes long to import, and what only some programs need of it.
HEAVY = ("torch", "transformers", "numpy", "fastapi", "pydantic", "llguidance")


def imported(code: str) -> set[str]:
    """The modules that a process has after ``code``."""
    script = f"{code}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_an_engines_process_is_started_before_anything_large_is_imported():
    found = imported("import penstock.cli, penstock.cli.serve, penstock.serve.link.starting, penstock.core.garbage")
    assert not found & set(HEAVY)


def test_a_model_on_a_cpu_is_opened_without_what_compiles_and_what_transformers_knows_of_models():
    found = imported(
        "from penstock.serve.opening import open_engine\n"
        "from penstock.serve.config import EngineConfig\n"
        "open_engine('python-1m', EngineConfig(cache_tokens=256, sequences=2), 'cpu')"
    )
    for module in ("torch._inductor", "torch._dynamo", "sympy", "triton", "fastapi", "flashinfer"):
        assert module not in found
    assert not [each for each in found if each.startswith("transformers.models.")]


def test_the_tokenizer_of_a_boxed_model_is_the_one_that_transformers_finds():
    folder = hub.resolve("python-6m")
    ours, theirs = hub.load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = "def f(x):\n    return x ** 2  # \u00e4 \u4e2d<|endoftext|>"
    assert type(ours) is type(theirs)
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert (ours.special_tokens_map, ours.model_max_length) == (theirs.special_tokens_map, theirs.model_max_length)
    assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])


def test_a_tokenizer_that_is_there_is_not_loaded_again(monkeypatch):
    folder = hub.resolve("python-1m")
    tokenizer = hub.load_tokenizer(folder)
    monkeypatch.setattr(hub, "load_tokenizer", None)
    open_engine(folder, EngineConfig(cache_tokens=256, sequences=2), "cpu", tokenizer=tokenizer)


@pytest.mark.parametrize("least", [1 << 12, 1 << 18], ids=["weights", "least"])
def test_the_cache_of_a_cpu_is_no_larger_than_the_model_or_a_small_one(least, monkeypatch):
    """By the block, counted from the shape: it has as many as fit into the larger of both, and no more."""
    monkeypatch.setattr(sizing, "LEAST_CPU_SHARE", least)
    model = small_model()
    runner = build_runner(model, EngineConfig(block_size=4, sequences=2, tokens=16, context=16))
    shape = model.config
    block = 2 * shape.layers * 4 * shape.kv_heads * shape.head_dim * torch.float32.itemsize
    assert runner.blocks == max(least, weight_bytes(model)) // block


def test_the_cache_of_a_cpu_has_room_for_a_sequence(monkeypatch):
    monkeypatch.setattr(sizing, "LEAST_CPU_SHARE", 1)
    monkeypatch.setattr("penstock.serve.build.weight_bytes", lambda model: 1)
    runner = build_runner(small_model(), EngineConfig(block_size=4, sequences=2, tokens=16, context=50))
    assert runner.blocks == 13


@needs_compiler
@pytest.mark.parametrize("kind", ["plain", "adapter", "quantized"])
def test_all_native_kernels_that_are_used_were_built_before(kind, tmp_path, monkeypatch):
    built, used, load, serves = set(), set(), native.load, native.serves
    monkeypatch.setattr(native, "build", lambda sources, report: built.update(sources))
    monkeypatch.setattr(native, "load", lambda source: (used.add(source), load(source))[1])
    monkeypatch.setattr(native, "serves", lambda source: (used.add(source), serves(source))[1])
    adapters = {"a": written(tmp_path / "a", small_model(), 0)} if kind == "adapter" else {}
    model = copy.deepcopy(small_model())
    if kind == "quantized":
        write(tmp_path / "m.gguf", peer("llama", **SHAPE), "llama", coded("Q4_0"))
        model = hub.load_for_inference(tmp_path / "m.gguf")
    engine = build_engine(model, EngineConfig(cache_tokens=256, sequences=2, adapters=adapters))
    sampling = SamplingParams(max_tokens=3, logprobs=2, ignore_eos=True)
    engine.add(Request("asked", [1, 2, 3], sampling, adapter="a" if adapters else ""))
    while engine.busy:
        engine.step()
    assert used <= built and len(used) == (5 if kind == "plain" else 6)


def test_a_process_that_nobody_wants_ends():
    starting = Starting()
    starting.close()
    assert starting.process.poll() is not None
