"""Where a step's time goes while many requests are decoded: kernels by what they are for, beside reading.

For a CUDA device: the requests of ``bench serve_asked`` with lognormal lengths, at several points of their way. A step
cannot be faster than its reads: the weights that it needs, of a mixture only those of experts that are chosen, and the
keys and values of all its sequences, at the rate at which this device copies. The rest of the device's time is
products and small kernels, and what is left of the step is the host's.
"""

from __future__ import annotations

import gc
import time
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from penstock.core.bench import Bench, load
from penstock.core.errors import UsageError
from penstock.core.garbage import settled
from penstock.core.progress import show
from penstock.models.config import DecoderConfig
from penstock.serve.build import build_engine
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request

serve, asked = load("serve"), load("serve_asked")

#: After so many steps, some are profiled.
POINTS = (40, 200, 600)
STEPS = 10
#: What kernels are for, by what their names have in them; the first that fits.
KINDS = {
    "attention": ("flashinfer", "MergeStates"),
    "experts": ("gated_kernel", "down_kernel", "order_kernel", "largest_kernel"),
    "products": ("nvjet", "gemm", "splitK", "few_rows"),
    "rotation and storing": ("rotate_kernel", "store_kernel"),
    "choosing tokens": ("searchsorted", "amax_cat", "cumsum", "floor_kernel"),
}


def kind_of(kernel: str) -> str:
    """What a kernel is for."""
    return next((kind for kind, parts in KINDS.items() if any(part in kernel for part in parts)), "others")


def copy_rate(device: torch.device) -> float:
    """Bytes a second that are read and written by a copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for _ in range(8):
        target.copy_(source)
    torch.cuda.synchronize(device)
    return 8 * 2 * source.numel() / (time.perf_counter() - begun)


def read_bytes(shape: DecoderConfig, lengths: list[int]) -> tuple[float, float]:
    """Bytes of weights and of keys and values in bf16 that a step reads in which sequences of ``lengths`` decode, their
    experts drawn evenly."""
    # Of an embedding that is no head, only the rows of the batch are read.
    weights = float(shape.stored_parameters()) - (0 if shape.tied else shape.vocabulary * shape.hidden)
    if shape.moe is not None:
        experts = shape.layers * shape.moe.experts * 3 * shape.hidden * shape.moe.ffn
        idle = (1 - shape.moe.router.top_k / shape.moe.experts) ** len(lengths)
        weights -= idle * experts
    return 2 * weights, 2.0 * sum(lengths) * shape.layers * 2 * shape.kv_heads * shape.head_dim


def profiled(engine: Engine) -> tuple[dict[str, float], float]:
    """Milliseconds of a step by what its kernels are for, and of the whole step."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    torch.cuda.synchronize()
    whole = (time.perf_counter() - begun) / STEPS
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(STEPS):
            engine.step()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    for each in found.key_averages():
        spent[kind_of(each.key)] += each.self_device_time_total / STEPS / 1e3
    return dict(spent), 1e3 * whole


def measure(bench: Bench, engine: Engine, name: str, shape: DecoderConfig, rate: float) -> None:
    """Rows at each point of a run."""
    for index, (prompt, sampling) in enumerate(asked.lognormal(48 if bench.quick else 384)):
        engine.add(Request(str(index), prompt, sampling))
    step = 0
    for point in POINTS[:1] if bench.quick else POINTS:
        while step < point:
            engine.step()
            step += 1
        lengths = [len(sequence.tokens) for sequence in engine.memory.running]
        spent, whole = profiled(engine)
        step += 2 * STEPS
        weights, cached = (1e3 * size / rate for size in read_bytes(shape, lengths))
        setting = f"{name}: 384 requests, lognormal lengths, step {point}, {len(lengths)} decoding"
        parts = {
            "whole step": whole,
            **spent,
            "host, or waiting": max(whole - sum(spent.values()), 0.0),
            "floor: reading weights": weights,
            "floor: reading keys and values": cached,
        }
        for subject, value in parts.items():
            bench.row(
                subject=subject,
                setting=setting,
                metric="time of a step",
                unit="ms",
                better="lower",
                value=value,
                repetitions=STEPS,
            )
    for index in range(384):
        engine.abort(str(index))
    while engine.busy:
        engine.step()


def main(bench: Bench) -> None:
    """Measures on the CUDA device of ``bench``."""
    if bench.device.type != "cuda":
        raise UsageError("serve_steps reads a GPU's clocks", hint="Give --device cuda.")
    rate = copy_rate(bench.device)
    for name, shape in ((asked.DENSE, serve.SHAPES[asked.DENSE]), (asked.SPARSE, asked.EXPERTS)):
        engine = build_engine(serve.random_model(shape, bench.device), serve.OFFLINE, report=show)
        with settled():  # as a server is
            measure(bench, engine, name, shape, rate)
        del engine
        gc.collect()
        torch.cuda.empty_cache()
