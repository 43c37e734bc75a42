"""Formats of weights on the CPU: tokens a second and held-out loss of smollm2 in each, beside llama.cpp on its file.

The model comes in a GGUF file in Q4_1. Every other format holds the numbers that this file stands for, rounded once
more where the format is coarser: their losses tell what is lost on top. Requests are greedy, of 32 tokens in, and 64
out.

llama.cpp decodes the same file with as many threads, in a process of its own, where PENSTOCK_LLAMA says which Python
has it:

    python -m venv .llama && .llama/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    PENSTOCK_LLAMA=.llama/bin/python penstock bench formats

On CUDA it is the shape of a larger model, with random weights: see ``formats_cuda``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType, quantize

from penstock.core.bench import Bench, load
from penstock.core.errors import PenstockError
from penstock.core.processor import fast_dtype
from penstock.core.progress import silent
from penstock.data.building import is_held_out
from penstock.data.corpora.stdlib import StandardLibrary
from penstock.models import hub
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder, Linear
from penstock.models.formats.gguf import Gguf
from penstock.models.formats.schemes import SCHEMES
from penstock.models.quantized import QuantizedLinear
from penstock.ops.quantized.contract import Packed
from penstock.ops.quantized.ggml import Ggml
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request

MODEL = "smollm2"
#: How its file stores most matrices.
STORED = "Q4_1"
PROMPT = 32
LIMITS = EngineConfig(sequences=16, tokens=512, cache_tokens=4096)


class Peer(NamedTuple):
    """Another program that decodes: its name and version, and its tokens a second of so many requests of so many
    tokens."""

    name: str
    rate: Callable[[int, int], float]


def models(scratch: Path) -> dict[str, Decoder]:
    """The model in each format, by the format's name; in bf16 where the processor multiplies in it."""
    plain = hub.load(MODEL, dtype=torch.float32).eval()
    found = {
        "f32": plain,
        "Q8_0": in_blocks(hub.load(MODEL, dtype=torch.float32)).eval(),
        STORED: hub.load_for_inference(MODEL, dtype=torch.float32).eval(),
    }
    if fast_dtype(torch.device("cpu")).choice is torch.bfloat16:
        found["bf16"] = hub.load(MODEL, dtype=torch.bfloat16).eval()
    for scheme in SCHEMES:
        hub.save(plain, scratch / scheme, scheme=scheme)
        found[scheme] = hub.load_for_inference(scratch / scheme, dtype=torch.float32).eval()
    return found


def in_blocks(model: Decoder) -> Decoder:
    """The model with all matrices of its layers and its head in Q8_0."""
    for name, module in list(model.named_modules()):
        if type(module) is Linear:
            blocks = torch.from_numpy(quantize(module.weight.detach().numpy(), GGMLQuantizationType.Q8_0))
            packed = Packed(Ggml(kind="Q8_0"), {"blocks": blocks})
            model.set_submodule(name, QuantizedLinear([packed], module.bias))
    return model


def prompts(count: int) -> list[list[int]]:
    """Random tokens for so many requests."""
    draw = random.Random(0)
    return [[draw.randrange(100, 49000) for _ in range(PROMPT)] for _ in range(count)]


def rate(engine: Engine, count: int, length: int) -> float:
    """Tokens a second of ``count`` requests at once, each of ``length`` tokens, after the first of each."""
    engine.memory.pool.forget()
    sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    for number, prompt in enumerate(prompts(count)):
        engine.add(Request(str(number), prompt, sampling))
    engine.step()
    begun = time.perf_counter()
    while engine.busy:
        engine.step()
    return count * (length - 1) / (time.perf_counter() - begun)


@torch.inference_mode()
def loss(model: Decoder, pieces: list[torch.Tensor]) -> float:
    """Nats a token over ``pieces`` of text."""
    total, count = 0.0, 0
    for tokens in pieces:
        hidden = model(tokens[None, :-1], CausalRows.of(len(tokens) - 1)).hidden
        total += float(F.cross_entropy(model.logits(hidden)[0].float(), tokens[1:], reduction="sum"))
        count += len(tokens) - 1
    return total / count


def held_out(count: int, length: int = 256) -> list[torch.Tensor]:
    """The beginnings of so many documents of the standard library that training would hold out."""
    tokenizer, found = hub.load_tokenizer(MODEL), []
    for document in StandardLibrary().documents():
        if is_held_out(document.text, 0.05):
            tokens = tokenizer(document.text[: 8 * length])["input_ids"][:length]
            found += [torch.tensor(tokens)] if len(tokens) == length else []
        if len(found) == count:
            break
    return found


@contextlib.contextmanager
def llama_cpp() -> Iterator[Peer | None]:
    """llama.cpp, and what measures it at so many requests of so many tokens; None where nobody says where it is.

    Raises:
        PenstockError: it does not run.
    """
    python = os.environ.get("PENSTOCK_LLAMA")
    if python is None:
        yield None
        return
    (file,) = Gguf(hub.resolve(MODEL)).files
    script = Path(__file__).parent / "peers" / "llama_rates.py"
    line = [python, str(script), str(file), str(torch.get_num_threads())]
    # Where PYTHONPATH leads, there may be packages for another Python.
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=alone) as process:
        talk = process.stdin, process.stdout

        def answer() -> Any:
            assert talk[1] is not None
            said = talk[1].readline()
            if not said:
                raise PenstockError("llama.cpp does not run; what it says is above")
            return json.loads(said)

        def measure(count: int, length: int) -> float:
            assert talk[0] is not None
            print(json.dumps({"prompts": prompts(count), "length": length}), file=talk[0], flush=True)
            return float(answer())

        yield Peer(f"llama.cpp of llama-cpp-python {answer()['version']}", measure)
        assert talk[0] is not None
        talk[0].close()


def main(bench: Bench) -> None:
    """Measures on the CPU, or what ``formats_cuda`` does."""
    if bench.device.type == "cuda":
        load("formats_cuda").main(bench)
        return
    length = 16 if bench.quick else 64
    with tempfile.TemporaryDirectory() as folder:
        found = models(Path(folder))
    pieces = held_out(2 if bench.quick else 32)
    for name, model in found.items():
        bench.row(subject=name, setting=MODEL, metric="held-out loss", unit="nats/token", better="lower",
                  value=loss(model, pieces), repetitions=1)  # fmt: skip
    engines = {name: build_engine(model, LIMITS, report=silent) for name, model in found.items()}
    with llama_cpp() as theirs:
        for count in (1, 4, 16):
            runs = {name: functools.partial(rate, engine, count, length) for name, engine in engines.items()}
            setting = f"{MODEL}: {count} request{'s' * (count > 1)}, {PROMPT} in and {length} out"
            pairs = [(name, "f32") for name in runs if name != "f32"]
            if theirs is not None:
                runs[theirs.name] = functools.partial(theirs.rate, count, length)
                pairs.append((STORED, theirs.name))
            values = bench.turns(runs, setting, 3)
            for name, peer in pairs:
                bench.compared(subject=name, peer=peer, setting=setting, metric="throughput", unit="tokens/s",
                               values=values[name], peer_values=values[peer])  # fmt: skip
