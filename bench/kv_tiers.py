"""Time to the first token of a long conversation that comes back: from host memory, from disk, and computed again.

On the CPU python-6m and smollm2 answer; on CUDA random weights in the shape of Qwen3-8B, in bf16, of which a
conversation has 16,384 tokens.
"""

from __future__ import annotations

import gc
import os
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


def first_token(bench: Bench, engine: Engine, text: list[int], cached: bool) -> float:
    """Seconds from the request to the first token; whether the beginning of ``text`` was there is checked."""
    engine.add(Request("a", text, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)))
    found = 0

    def answer() -> None:
        nonlocal found
        while engine.busy:
            for delta in engine.step():
                found = delta.cached

    seconds = bench.seconds(answer)
    assert found == (len(text) - 1) // 16 * 16 * cached, f"{found} of {len(text)} tokens were there"
    return seconds


def drop(folder: Path) -> None:
    """Takes the files of ``folder`` out of the system's own cache, so that they are read from the disk."""
    for path in folder.rglob("*.kv"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@torch.inference_mode()
def measured(bench: Bench, name: str, length: int, folder: Path) -> dict[str, list[float]]:
    """Seconds to the first token of each conversation, by where its beginning was."""
    model = modelled(name, length, bench.device)
    draw = numpy_generator(0, "bench/kv_tiers")
    texts = draw.integers(model.config.vocabulary, size=(COUNT, length)).tolist()
    engine = opened(model, length, bench.device, folder)
    first_token(bench, engine, texts[0][1:200], False)
    # Each conversation drives out the one before it.
    seconds = {"computed again": [first_token(bench, engine, text, False) for text in texts]}
    seconds["from the host's memory"] = [first_token(bench, engine, text, True) for text in texts]
    engine.close()
    del engine
    gc.collect()
    drop(folder)
    engine = opened(model, length, bench.device, folder)
    seconds["from disk, after a restart"] = [first_token(bench, engine, text, True) for text in texts]
    engine.close()
    return seconds


def main(bench: Bench) -> None:
    """Measures each model."""
    lengths = (QUICK if bench.quick else LENGTHS)[bench.device.type]
    for name, length in lengths.items():
        with tempfile.TemporaryDirectory() as folder:
            seconds = measured(bench, name, length, Path(folder))
        again = seconds.pop("computed again")
        for place, values in seconds.items():
            bench.compared(
                subject=place,
                peer="computed again",
                setting=f"{name}, a conversation of {length:,} tokens",
                metric="time to the first token",
                unit="s",
                better="lower",
                values=values,
                peer_values=again,
            )
