"""Every family of models, served on a CUDA device: as the CPU does it, and the same when it is done twice."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig

from penstock.core.randomness import numpy_generator
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family
from penstock.ops.paged.cuda import CudaCache
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.testing.enrolled import enrolled
from penstock.testing.transformers_peer import SHAPE, TOKEN_IDS, randomize

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
FAMILIES = enrolled("model.family")
#: Of log-probabilities in fp32, whose products are added up in another order on each device.
TOLERANCE = 1e-3

#: Attention that FlashInfer's kernels do not compute, in a model whose every step can be a graph.
LARGER = {"vocabulary": 2000, "hidden": 512, "layers": 4, "heads": 8, "ffn": 1024, "context": 512}
GROUPED = {"kv_heads": 2, "head_dim": 128}
KINDS = {
    "cap, sinks and windows": {
        **GROUPED, "attention_cap": 3.0, "sinks": True, "window": 20, "windowed_layers": (0, 2),
    },
    "chunks": {**GROUPED, "chunked": True, "window": 24, "windowed_layers": (0, 2)},
    "latent": {
        "kv_heads": 8, "head_dim": 128,
        "latent": {"rank": 512, "rotated": 64, "plain": 64, "value": 64, "query_rank": None},
    },
}  # fmt: skip


def model_of(family: Family) -> Decoder:
    """A small one with random weights, every part of which matters."""
    keys = {**SHAPE, **dict.fromkeys(TOKEN_IDS), **family.example}
    described = AutoConfig.for_model(family.policy_name, **keys).to_dict()
    return randomize(Decoder(family.config_from_hub(described))).eval()


def engine_of(model: Decoder, device: str, dtype: torch.dtype, compiled: bool = False) -> Engine:
    moved = copy.deepcopy(model).to(device, dtype)
    config = EngineConfig(tokens=64, sequences=8, cache_tokens=2048, compile=compiled, check=True)
    engine = build_engine(moved, config)
    if device == "cuda":
        assert isinstance(engine.executor.cache, CudaCache), "attention is the readable backend's"
    return engine


def told(engine: Engine, lengths: list[int], most: int) -> tuple[list[list[int]], list[list[float]]]:
    """What it says to prompts of such lengths, in chunks beside each other's answers: the tokens of each, and the
    log-probabilities of the prompt's and of these."""
    draw, vocabulary = numpy_generator(0, "families"), engine.executor.shape.vocabulary
    tokens, logprobs = ([list[float]() for _ in lengths] for _ in range(2))
    for number, length in enumerate(lengths):
        prompt = draw.integers(vocabulary, size=length).tolist()
        sampling = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, logprobs=0, prompt_logprobs=0)
        engine.add(Request(str(number), prompt, sampling))
    while engine.busy:
        for delta in engine.step():
            tokens[int(delta.id)] += delta.tokens
            for rows in (delta.prompt_logprobs, delta.logprobs):
                logprobs[int(delta.id)] += rows.logprobs if rows is not None else ()
    return tokens, logprobs


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_served_as_on_the_cpu_and_twice_the_same(name: str) -> None:
    """In fp32 as in the CPU's engine, to rounding; in bf16 with the same bits by two engines that do the same."""
    model, lengths = model_of(FAMILIES[name]), [13, 30, 2, 41, 27]
    here, there = (told(engine_of(model, device, torch.float32), lengths, 10) for device in ("cpu", DEVICE))
    assert here[0] == there[0]
    for ours, theirs, length in zip(here[1], there[1], lengths, strict=True):
        assert len(ours) == length - 1 + 10
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=TOLERANCE, atol=TOLERANCE)
    first, second = (told(engine_of(model, DEVICE, torch.bfloat16), lengths, 10) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_say_what_steps_say_that_are_queued(kind: str) -> None:
    """To the rounding of bf16: log-probabilities of the prompts, and of the answers' first tokens."""
    model = Decoder(DecoderConfig(**LARGER, **KINDS[kind])).initialize(0).eval()
    lengths = [100, 7, 60, 33]
    replayed, queued = (engine_of(model, DEVICE, torch.bfloat16, compiled) for compiled in (True, False))
    assert replayed.executor.passes.captured and not queued.executor.passes.captured
    ours, theirs = told(replayed, lengths, 20), told(queued, lengths, 20)
    for number, length in enumerate(lengths):
        own, other = (torch.tensor(each[1][number][:length]) for each in (ours, theirs))
        assert len(own) == length
        torch.testing.assert_close(own, other, rtol=0, atol=0.1)
    again = told(engine_of(model, DEVICE, torch.bfloat16, compiled=True), lengths, 20)
    assert again == ours
