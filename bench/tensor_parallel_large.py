"""A model that a single device has hardly room for, divided between two: how fast one request is decoded.

On two GPUs the shape of Llama 3 70B in fp8. Its weights are holes in a file, which read as zeros, and take no room on
disk; reading them from the device's memory takes as long as that of others. On the CPU the shape of python-6m shows
that it works.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
from pathlib import Path

import torch

from penstock.core.bench import Bench, load
from penstock.core.errors import UsageError
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
from penstock.serve.opening import open_engine
from penstock.serve.ranks.runner import LeadingRunner

RANKS = 2

#: That of Llama 3 70B.
LARGE = DecoderConfig(
    vocabulary=128256, hidden=8192, layers=80, heads=64, kv_heads=8, head_dim=128, ffn=28672, context=4096,
)  # fmt: skip


def main(bench: Bench) -> None:
    """Measures on two devices, or in two processes."""
    if bench.device.type == "cuda" and torch.cuda.device_count() < RANKS:
        raise UsageError(f"this benchmark needs {RANKS} CUDA devices")
    if bench.quick or bench.device.type == "cpu":
        decode(bench, "python-6m, fp8", hub.load("python-6m").config)
    else:
        decode(bench, "Llama 3 70B shape, fp8", LARGE)


def decode(bench: Bench, name: str, shape: DecoderConfig) -> None:
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
