"""What it costs that a request has the same bits alone and in any batch: a deterministic engine beside a free one.

On CUDA a model with random weights in the shape of Qwen3-0.6B, in bf16; on the CPU python-6m in fp32. The free engine
picks kernels by the batch and, on CUDA, compiles the model and replays graphs.
"""

from __future__ import annotations

import random

from penstock.core.bench import Bench, load
from penstock.core.garbage import settled
from penstock.core.progress import show
from penstock.serve.build import build_engine
from penstock.serve.config import EngineConfig


def main(bench: Bench) -> None:
    """Measures the two in turn: one request, many of mixed lengths, and groups with a common prefix."""
    serve, on_cuda = load("serve"), bench.device.type == "cuda"
    shape, model = serve.served(bench.device)
    common = EngineConfig(batching="batchllm", sequences=64, cache_tokens=131_072 if on_cuda else 32_768)
    free, deterministic = (
        build_engine(model, common.model_copy(update={"deterministic": each}), report=show) for each in (False, True)
    )
    shrink = 16 if bench.quick else 1 if on_cuda else 4
    with settled():
        for name, prompts, outputs in loads(model.config.vocabulary, shrink):
            work = serve.Workload(name, prompts, outputs, sum(outputs))
            bench.compare(
                subject="deterministic",
                peer="free",
                setting=f"{shape}: {name}",
                metric="throughput",
                unit="tokens/s",
                run=lambda w=work: serve.run(deterministic, w),
                peer_run=lambda w=work: serve.run(free, w),
                repetitions=3,
            )


def loads(vocabulary: int, shrink: int) -> list[tuple[str, list[list[int]], list[int]]]:
    """Prompts, and how many tokens are wanted after each, by name; everything is ``shrink`` times shorter."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(count)]

    single = [tokens(128 // shrink)], [256 // shrink]
    lengths = [(draw.randint(100, 1024) // shrink, draw.randint(100, 512) // shrink) for _ in range(64)]
    mixed = [tokens(length) for length, _ in lengths], [count for _, count in lengths]
    prefixes = [tokens(1024 // shrink) for _ in range(4)]
    shared = [prefix + tokens(64 // shrink) for prefix in prefixes for _ in range(16)], [64 // shrink] * 64
    first, last = 100 // shrink, 1024 // shrink
    return [
        (f"one request, {128 // shrink} in and {256 // shrink} out", *single),
        (f"64 requests, {first} to {last:,} in and {first} to {512 // shrink} out", *mixed),
        (f"4 groups of 16 with {last:,} tokens in common", *shared),
    ]
