"""A model on two devices beside the same on one: one request at a time, and many with mixed lengths.

On CUDA random weights in the shape of Qwen3-8B, bf16, divided between two GPUs over NCCL, with compiled passes and
graphs; on the CPU python-6m in fp32, divided between two processes over gloo, which have half of the cores each. What a
rank has of the weights and of the cache is measured beside the whole.

On CUDA also the shape of Llama 3 70B in fp8, which a single device has hardly room for: how fast one request is
decoded. Its weights are holes in a file, which read as zeros, and take no room on disk; reading them from the device's
memory takes as long as that of others.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
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
from penstock.models.blank import without_weights
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.families.mapping import placed
from penstock.models.formats.safetensors import WEIGHTS
from penstock.models.formats.schemes import described, scheme_of
from penstock.models.hub.family import family_of
from penstock.models.hub.folders import CONFIG
from penstock.models.hub.saving import config_of
from penstock.models.linear import Linear
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.opening import open_engine
from penstock.serve.ranks.runner import LeadingRunner

RANKS = 2

#: That of Llama 3 70B.
LARGE = DecoderConfig(
    vocabulary=128256, hidden=8192, layers=80, heads=64, kv_heads=8, head_dim=128, ffn=28672, context=4096,
)  # fmt: skip


def main(bench: Bench) -> None:
    """Measures the two in turn, and then what is too large for one."""
    measure(bench, "tensor_parallel")
    if bench.device.type == "cuda":
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        serve = load("serve")
        name = "Qwen3-0.6B shape" if bench.quick else "Llama 3 70B shape"
        decode_large(bench, f"{name}, fp8", serve.SHAPES.get(name, LARGE))


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


def decode_large(bench: Bench, name: str, shape: DecoderConfig) -> None:
    """Tokens a second of one request to a model in fp8 that is divided, and what a rank has of its weights."""
    serve = load("serve")
    config = EngineConfig(tensor_parallel=RANKS, sequences=2, tokens=64, cache_tokens=1024)
    with tempfile.TemporaryDirectory() as folder:
        hollow(shape, Path(folder))
        with contextlib.closing(open_engine(folder, config, bench.device.type, show)) as engine:
            assert isinstance(engine.executor, LeadingRunner)
            weights = engine.executor.memory["weights"] / 1e6
            subject, work = f"a rank of {RANKS}", serve.Workload("", [[3] * 16], [32], 32, temperature=0)
            bench.row(subject=subject, setting=name, metric="memory for weights", unit="MB", better="lower",
                      value=weights)  # fmt: skip
            bench.measure(subject=f"{RANKS} devices", setting=f"{name}: one request, 16 in and 32 out",
                          metric="throughput", unit="tokens/s", run=lambda: serve.run(engine, work),
                          repetitions=3)  # fmt: skip


def hollow(shape: DecoderConfig, folder: Path) -> None:
    """Makes a folder of a model of this ``shape`` in fp8, with a scale for each row, whose weights are all zero and
    nowhere on disk; its tokenizer is python-6m's."""
    with without_weights():
        model = Decoder(shape).to(torch.bfloat16)
    family = family_of(model, None)
    quantized = {f"layers.{name}.weight" for name, each in model.layers.named_modules() if type(each) is Linear}
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for ours, there, view in placed(model, family):
        tensors[there] = ("F8_E4M3", view.shape, 1) if ours in quantized else ("BF16", view.shape, 2)
        if ours in quantized:
            tensors[f"{there}_scale"] = ("F32", (view.shape[0], 1), 4)
    header, end = {}, 0
    for there, (dtype, size, width) in tensors.items():
        begin, end = end, end + math.prod(size) * width
        header[there] = {"dtype": dtype, "shape": [*size], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    scheme = described(scheme_of("fp8", {shape.hidden}), {"lm_head"})
    contents = config_of(model, family, torch.bfloat16) | {"quantization_config": scheme}
    (folder / CONFIG).write_text(json.dumps(contents))
    for file in hub.resolve("python-6m").glob("tokenizer*"):
        shutil.copy(file, folder)


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
