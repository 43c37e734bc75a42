"""Time to the first token of a long conversation that comes back: from host memory, from disk, and computed again.

On the CPU python-6m and smollm2 answer; on CUDA random weights in the shape of Qwen3-8B, in bf16, of which a
conversation has 16,384 tokens. What is sooner computed than read stays on disk: beside the time, it is told how much of
a conversation was read.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
from pathlib import Path

import torch

from penstock.core.bench import Bench, load
from penstock.core.progress import show
from penstock.core.randomness import numpy_generator
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.serve.opening import dtype_of

#: Models, and the tokens of a conversation, by the kind of device.
LENGTHS = {"cpu": {"python-6m": 992, "smollm2": 1024}, "cuda": {"Qwen3-8B shape": 16_384}}
QUICK = {"cpu": {"python-6m": 256}, "cuda": {"Qwen3-0.6B shape": 256}}

#: Where the beginning of a conversation is.
AGAIN, HOST_MEMORY, DISK = "computed again", "from the host's memory", "from disk, after a restart"

#: Conversations, of which the cache holds one.
COUNT = 3

#: Bytes of the host's memory for the others, and the most tokens of a step.
HOST = {"cpu": 2 * 10**9, "cuda": 16 * 10**9}
TOKENS = {"cpu": 2048, "cuda": 8192}


def modelled(name: str, length: int, device: torch.device) -> Decoder:
    """The model ``name``, for texts of ``length`` tokens and an answer."""
    if device.type == "cuda":
        serve = load("serve")
        found: Decoder = serve.random_model(serve.SHAPES[name].model_copy(update={"context": length + 16}), device)
        return found
    return hub.load(name, device=device, dtype=dtype_of(EngineConfig(), device)).eval()


def opened(model: Decoder, length: int, device: torch.device, folder: Path) -> Engine:
    """An engine whose cache has room for one conversation."""
    tiers = {"kv_host": HOST[device.type], "kv_disk": folder}
    sizes = {"cache_tokens": length + 64, "context": length + 16, "sequences": 1, "tokens": TOKENS[device.type]}
    return build_engine(model, EngineConfig.model_validate({**sizes, **tiers}), report=show)


def first_token(bench: Bench, engine: Engine, text: list[int]) -> tuple[float, float]:
    """Seconds from the request to the first token, and the share of the whole blocks of ``text`` that was there."""
    engine.add(Request("a", text, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)))
    found = 0

    def answer() -> None:
        nonlocal found
        while engine.busy:
            for delta in engine.step():
                found = delta.cached

    return bench.seconds(answer), found / ((len(text) - 1) // 16 * 16)


def drop(folder: Path) -> None:
    """Takes the files of ``folder`` out of the system's own cache, so that they are read from the disk."""
    for path in folder.rglob("*.kv"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@torch.inference_mode()
def measured(bench: Bench, name: str, length: int, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """What :func:`first_token` says of each conversation, by where its beginning was."""
    model = modelled(name, length, bench.device)
    draw = numpy_generator(0, "bench/kv_tiers")
    texts = draw.integers(model.config.vocabulary, size=(COUNT, length)).tolist()
    engine = opened(model, length, bench.device, folder)
    first_token(bench, engine, texts[0][1:200])
    # Each conversation drives out the one before it.
    found = {AGAIN: [first_token(bench, engine, text) for text in texts]}
    found[HOST_MEMORY] = [first_token(bench, engine, text) for text in texts]
    engine.close()
    del engine
    gc.collect()
    drop(folder)
    engine = opened(model, length, bench.device, folder)
    found[DISK] = [first_token(bench, engine, text) for text in texts]
    engine.close()
    there = {place: [share for _, share in values] for place, values in found.items()}
    assert set(there[AGAIN]) == {0} and set(there[HOST_MEMORY]) == {1}, there
    return found


def main(bench: Bench) -> None:
    """Measures each model."""
    lengths = (QUICK if bench.quick else LENGTHS)[bench.device.type]
    for name, length in lengths.items():
        with tempfile.TemporaryDirectory() as folder:
            found = measured(bench, name, length, Path(folder))
        setting = f"{name}, a conversation of {length:,} tokens"
        seconds = {place: [each for each, _ in values] for place, values in found.items()}
        for place in (HOST_MEMORY, DISK):
            bench.compared(
                subject=place,
                peer=AGAIN,
                setting=setting,
                metric="time to the first token",
                unit="s",
                better="lower",
                values=seconds[place],
                peer_values=seconds[AGAIN],
            )
        shares = [share for _, share in found[DISK]]
        bench.row(
            subject=DISK,
            setting=setting,
            metric="share that was read",
            unit="",
            value=statistics.median(shares),
            low=min(shares),
            high=max(shares),
            repetitions=COUNT,
        )
