"""What adapters cost: batches in which 32 are mixed, one is everybody's, or nobody has one though 32 are loaded,
beside the same requests on an engine without any.

On CUDA random weights in the shape of Qwen3-8B, bf16, with adapters of rank 16 on all matrices; on the CPU python-6m in
fp32, with rank 4: what a batch has to read of 32 adapters is a sixth of the weights there, and more than a half here.
Then adapters as PEFT makes them where nothing else is said: rank 8, on the projections of queries and values.
"""

from __future__ import annotations

import copy
import functools
import gc
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
#: PEFT's own choice, for models such as these.
RANK, TARGETS = 8, ("q_proj", "v_proj")


def main(bench: Bench) -> None:
    """Measures an engine with adapters and one without in turn."""
    serve, on_cuda = load("serve"), bench.device.type == "cuda"
    shape, model = serve.served(bench.device)
    if on_cuda and not bench.quick:
        shape = "Qwen3-8B shape"
        model = serve.random_model(serve.SHAPES[shape], bench.device)
    common = {"sequences": 256, "cache_tokens": 65_536 if on_cuda else 16_384}
    plain = build_engine(copy.deepcopy(model), EngineConfig.model_validate(common), report=show)
    everywhere = 16 if on_cuda else 4
    for subject, tuner in (
        (f"adapters of rank {everywhere}", LoRA(rank=everywhere)),
        (f"adapters of rank {RANK} on {' and '.join(TARGETS)}", LoRA(rank=RANK, targets=TARGETS)),
    ):
        measure(bench, subject, shape, plain, copy.deepcopy(model), tuner, common)
        gc.collect()  # hooks and graphs hold each other


def measure(
    bench: Bench, subject: str, shape: str, plain: Engine, model: Decoder, tuner: LoRA, common: dict[str, int]
) -> None:
    """Rows of an engine of ``model`` with what ``tuner`` makes, beside the ``plain`` one."""
    large = bench.device.type == "cuda" and not bench.quick
    with tempfile.TemporaryDirectory() as name:
        folder = written(Path(name), model, tuner)
        # The same numbers in each slot: there they take the memory, and the time, of any others.
        names = [str(number) for number in range(ADAPTERS)]
        options = {**common, "adapters": dict.fromkeys(names, folder)}
        adapted = build_engine(model, EngineConfig.model_validate(options), report=show)
    settings: list[tuple[str, int, Callable[[int], str]]] = [
        (f"{ADAPTERS} requests, each with another of {ADAPTERS}", ADAPTERS, lambda place: names[place]),
        (f"requests with {ADAPTERS} in turn", 256, lambda place: names[place % ADAPTERS]),
        ("requests with the same one", 256, lambda _: names[0]),
        (f"requests with none, {ADAPTERS} loaded", 256, lambda _: ""),
    ]
    with settled():
        for setting, count, choose in settings:
            count = count if large else min(count, 32)
            work = requests(count, model.config.vocabulary, 1 if large else 8)
            said = setting if setting.startswith(str(count)) else f"{count} {setting}"
            bench.compare(
                subject=subject,
                peer="the model alone",
                setting=f"{shape}: {said}",
                metric="throughput",
                unit="tokens/s",
                run=functools.partial(run, adapted, work, choose),
                peer_run=functools.partial(run, plain, work, lambda _: ""),
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


def written(folder: Path, model: Decoder, tuner: LoRA) -> Path:
    """The folder of an adapter with random numbers that ``tuner`` makes for ``model``."""
    tuner.attach(model, 0)
    for _, layer in low_rank.attached(model):
        for b in layer.b.values():
            torch.nn.init.normal_(b, std=0.01)
    tuner.write(model, folder, "the model")
    tuner.detach(model)
    return folder
