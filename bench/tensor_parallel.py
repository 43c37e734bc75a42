"""A model on two devices beside the same on one: one request at a time, and many with mixed lengths.

On CUDA random weights in the shape of Qwen3-8B, bf16, divided between two GPUs over NCCL, with compiled passes and
graphs; on the CPU python-6m in fp32, divided between two processes over gloo, which have half of the cores each. What a
rank has of the weights and of the cache is measured beside the whole.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from penstock.core.bench import Bench, load
from penstock.core.errors import UsageError
from penstock.core.garbage import settled
from penstock.core.progress import show
from penstock.models import hub
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.opening import open_engine
from penstock.serve.ranks.runner import LeadingRunner

RANKS = 2


def main(bench: Bench) -> None:
    """Measures the two in turn."""
    measure(bench, "tensor_parallel")


def measure(bench: Bench, way: str) -> None:
    """Measures a model that is divided in this ``way``, an option of the engine, beside one that is not."""
    serve, on_cuda = load("serve"), bench.device.type == "cuda"
    if on_cuda and torch.cuda.device_count() < RANKS:
        raise UsageError(f"this benchmark needs {RANKS} CUDA devices")
    shape = "Qwen3-8B shape" if on_cuda else "python-6m"
    if on_cuda and bench.quick:
        shape = "Qwen3-0.6B shape"
    config = EngineConfig(sequences=256 if on_cuda else 16, cache_tokens=131_072 if on_cuda else 16_384, compile=True)
    with contextlib.ExitStack() as opened:
        folder = opened.enter_context(stored(shape, bench.device)) if on_cuda else hub.resolve(shape)
        alone, divided = (
            opened.enter_context(
                contextlib.closing(open_engine(folder, config.model_copy(update={way: ranks}), bench.device.type, show))
            )
            for ranks in (1, RANKS)
        )
        compare(bench, serve, shape, alone, divided)


def compare(bench: Bench, serve: object, shape: str, alone: Engine, divided: Engine) -> None:
    """Memory of a rank, then throughput."""
    executor = divided.executor
    assert isinstance(executor, LeadingRunner)
    for use in ("weights", "cache"):
        bench.compare(
            subject=f"a rank of {RANKS}",
            peer="one device",
            setting=shape,
            metric=f"memory for {use}",
            unit="MB",
            better="lower",
            run=lambda u=use: executor.memory[u] / 1e6,
            peer_run=lambda u=use: alone.executor.memory[u] / 1e6,
            repetitions=1,
        )
    with settled():
        for name, prompts, outputs in loads(bench):
            work = serve.Workload(name, prompts, outputs, sum(outputs))  # type: ignore[attr-defined]
            bench.compare(
                subject=f"{RANKS} devices" if bench.device.type == "cuda" else f"{RANKS} processes",
                peer="one device" if bench.device.type == "cuda" else "one process",
                setting=f"{shape}: {name}",
                metric="throughput",
                unit="tokens/s",
                run=lambda w=work: serve.run(divided, w),  # type: ignore[attr-defined]
                peer_run=lambda w=work: serve.run(alone, w),  # type: ignore[attr-defined]
                repetitions=3,
            )


def loads(bench: Bench) -> list[tuple[str, list[list[int]], list[int]]]:
    """Prompts, and how many tokens are wanted after each, by name."""
    draw, shrink = random.Random(0), 1 if bench.device.type == "cuda" else 8

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, 4000) for _ in range(count)]

    single = 512 // shrink // (8 if bench.quick else 1)
    count = 8 if bench.quick else 256 // shrink
    lengths = [(draw.randint(100, 1024) // shrink, draw.randint(100, 1024) // shrink) for _ in range(count)]
    return [
        (f"one request, {128 // shrink} in and {single} out", [tokens(128 // shrink)], [single]),
        (
            f"{count} requests, {100 // shrink} to {1024 // shrink:,} in and out",
            [tokens(length) for length, _ in lengths],
            [wanted for _, wanted in lengths],
        ),
    ]


@contextlib.contextmanager
def stored(shape: str, device: torch.device) -> Iterator[Path]:
    """A folder with random weights in ``shape``, which ranks read their shares of; its tokenizer is python-6m's, which
    no request here needs."""
    serve = load("serve")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        hub.save(serve.random_model(serve.SHAPES[shape], device), folder)
        for file in hub.resolve("python-6m").glob("tokenizer*"):
            shutil.copy(file, folder)
        yield folder
