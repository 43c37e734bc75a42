"""What adapters cost: batches in which 32 are mixed, one is everybody's, or nobody has one though 32 are loaded,
beside the same requests on an engine without any.

On CUDA random weights in the shape of Qwen3-8B, bf16, with adapters of rank 16 on all matrices; on the CPU python-6m in
fp32, with rank 4: what a batch has to read of 32 adapters is a sixth of the weights there, and more than a half here.
"""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from penstock.core.bench import Bench, load
from penstock.core.garbage import settled
from penstock.core.progress import show
from penstock.models.adapters import low_rank
from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.train.tuners.lora import LoRA

ADAPTERS = 32


def main(bench: Bench) -> None:
    """Measures an engine with adapters and one without in turn."""
    serve, on_cuda = load("serve"), bench.device.type == "cuda"
    shape, model = serve.served(bench.device)
    if on_cuda and not bench.quick:
        shape = "Qwen3-8B shape"
        model = serve.random_model(serve.SHAPES[shape], bench.device)
    rank, common = 16 if on_cuda else 4, {"sequences": 256, "cache_tokens": 65_536 if on_cuda else 16_384}
    with tempfile.TemporaryDirectory() as name:
        folder = written(Path(name), model, rank)
        plain = build_engine(copy.deepcopy(model), EngineConfig.model_validate(common), report=show)
        # The same numbers in each slot: there they take the memory, and the time, of any others.
        names = [str(number) for number in range(ADAPTERS)]
        options = {**common, "adapters": dict.fromkeys(names, folder)}
        adapted = build_engine(model, EngineConfig.model_validate(options), report=show)
    with settled():
        for setting, count, choose in (
            (f"{ADAPTERS} requests, each with another of {ADAPTERS}", ADAPTERS, lambda place: names[place]),
            (f"requests with {ADAPTERS} in turn", 256, lambda place: names[place % ADAPTERS]),
            ("requests with the same one", 256, lambda _: names[0]),
            (f"requests with none, {ADAPTERS} loaded", 256, lambda _: ""),
        ):
            count = count if on_cuda and not bench.quick else min(count, 32)
            work = requests(count, model.config.vocabulary, 1 if on_cuda and not bench.quick else 8)
            said = setting if setting.startswith(str(count)) else f"{count} {setting}"
            bench.compare(
                subject=f"adapters of rank {rank}",
                peer="the model alone",
                setting=f"{shape}: {said}",
                metric="throughput",
                unit="tokens/s",
                run=lambda w=work, c=choose: run(adapted, w, c),
                peer_run=lambda w=work: run(plain, w, lambda _: ""),
                repetitions=3,
                claim="parity",
            )


def requests(count: int, vocabulary: int, shrink: int) -> list[tuple[list[int], int]]:
    """Prompts, and how many tokens are wanted after each."""
    draw = random.Random(0)
    lengths = [(draw.randint(64, 256) // shrink, 256 // shrink) for _ in range(count)]
    return [([draw.randrange(3, vocabulary) for _ in range(length)], wanted) for length, wanted in lengths]


def run(engine: Engine, work: list[tuple[list[int], int]], choose: Callable[[int], str]) -> float:
    """Tokens a second of ``work``, from an empty cache; by its place, a request's adapter is what ``choose`` says."""
    engine.memory.pool.forget()
    begun = time.perf_counter()
    for place, (prompt, wanted) in enumerate(work):
        sampling = SamplingParams(temperature=0.6, max_tokens=wanted, ignore_eos=True, seed=place)
        engine.add(Request(str(place), prompt, sampling, adapter=choose(place)))
    while engine.busy:
        engine.step()
    return sum(wanted for _, wanted in work) / (time.perf_counter() - begun)


def written(folder: Path, model: Decoder, rank: int) -> Path:
    """The folder of an adapter with random numbers on all matrices of ``model``."""
    tuner = LoRA(rank=rank)
    tuner.attach(model, 0)
    for _, layer in low_rank.attached(model):
        for b in layer.b.values():
            torch.nn.init.normal_(b, std=0.01)
    tuner.write(model, folder, "the model")
    tuner.detach(model)
    return folder
