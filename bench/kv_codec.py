"""Codecs of the cache on the CPU: held-out perplexity of python-6m, and requests and tokens a second in the same bytes.

Perplexity is of the beginnings of files of Python's standard library that training would hold out, each read from its
first token; every key and value is coded and decoded before it is attended to, as in a cache. What codecs learn, they
learn of other files. Coupled quantization (270) stands beside its own baseline at the same bits: the same codebooks, by
the same steps, for each channel alone.

Beside each of int4 and the coupled ones at 4 and 2 bits a channel stands the same with windows of 32 tokens in full
precision.

For throughput, a pool of as many bytes as four requests take in fp32 serves 24 of them, greedy, of 32 random tokens in
and 32 out. The kernel reads fp32, bf16, int8 and fp8; the others go through the readable backend, with their codecs.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from penstock.core.bench import Bench
from penstock.core.errors import UsageError
from penstock.core.progress import silent
from penstock.data.building import is_held_out
from penstock.data.corpora.stdlib import StandardLibrary
from penstock.models import hub
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.models.paged import cache_shape
from penstock.ops.paged.codecs.bf16 import Bf16
from penstock.ops.paged.codecs.contract import Codec, LearnedCodec
from penstock.ops.paged.codecs.coupled import Coupled
from penstock.ops.paged.codecs.fp8 import Fp8
from penstock.ops.paged.codecs.int4 import Int4
from penstock.ops.paged.codecs.int8 import Int8
from penstock.ops.paged.codecs.plain import Plain
from penstock.ops.paged.contract import CacheShape
from penstock.serve.build import build_engine
from penstock.serve.calibration import keys_and_values, tables_of
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.testing.kv_codec import CodedRows

MODEL, LENGTH, BLOCK = "python-6m", 256, 16
PROMPT, ANSWER, REQUESTS, FIT = 32, 32, 24, 4
#: Tokens of a window in full precision.
RESIDUAL = 32


def named(channels: int, bits: int) -> str:
    """A codec of codebooks: so many channels to a code of so many bits."""
    return f"coupled, {channels} channel{'s' * (channels > 1)}, {bits} bits"


def codecs() -> dict[str, Codec]:
    """What is measured; the second half are coupled and one by one, at 4, 2 and 1 bits a channel."""
    found: dict[str, Codec] = {"plain, fp32": Plain(), "bf16": Bf16(), "fp8": Fp8(), "int8": Int8(), "int4": Int4()}
    for channels, bits in ((1, 4), (2, 8), (1, 2), (4, 8), (1, 1), (8, 8)):
        found[named(channels, bits)] = Coupled(channels=channels, bits=bits, steps=4)
    return found


def pieces(count: int, held_out: bool) -> torch.Tensor:
    """The beginnings of so many documents that training would, or would not, hold out: int64 [count, LENGTH]."""
    tokenizer, found = hub.load_tokenizer(MODEL), []
    for document in StandardLibrary().documents():
        if is_held_out(document.text, 0.05) == held_out:
            tokens = tokenizer(document.text[: 8 * LENGTH])["input_ids"][:LENGTH]
            found += [torch.tensor(tokens)] if len(tokens) == LENGTH else []
        if len(found) == count:
            break
    return torch.stack(found)


@torch.inference_mode()
def perplexity(model: Decoder, codec: Codec, learned: torch.Tensor | None, texts: torch.Tensor) -> float:
    """Of the tokens of ``texts`` after their first, over a cache in ``codec``."""
    total = 0.0
    for tokens in texts:
        rows = CodedRows(CausalRows.of(len(tokens) - 1), codec, learned, codec.residual)
        hidden = model(tokens[None, :-1], rows).hidden
        total += float(F.cross_entropy(model.logits(hidden)[0].float(), tokens[1:]))
    return math.exp(total / len(texts))


def shape_of(model: Decoder, codec: Codec) -> CacheShape:
    return cache_shape(model.config, BLOCK, torch.float32, torch.device("cpu"), codec)


def engine_of(model: Decoder, codec: Codec, texts: torch.Tensor) -> Engine:
    """An engine whose pool takes the bytes of ``FIT`` requests in fp32."""
    pool = FIT * (PROMPT + ANSWER) // BLOCK * shape_of(model, Plain()).block_bytes
    blocks = pool // shape_of(model, codec).block_bytes
    config = EngineConfig(codec=codec, sequences=REQUESTS, tokens=512, cache_tokens=blocks * BLOCK)
    return build_engine(model, config, report=silent, pieces=texts)


def serve(engine: Engine) -> int:
    """Serves all requests, which come at once. Returns how many ran at a time, at the most."""
    engine.memory.pool.forget()
    draw = torch.Generator().manual_seed(0)
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    for number in range(REQUESTS):
        prompt = torch.randint(4096, (PROMPT,), generator=draw).tolist()
        engine.add(Request(str(number), prompt, sampling))
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, engine.snapshot().running)
    return most


@torch.inference_mode()
def main(bench: Bench) -> None:
    """Measures on the CPU."""
    if bench.device.type != "cpu":
        raise UsageError("the benchmark kv_codec runs on the CPU", hint="Leave --device out, or say --device cpu.")
    model = hub.load(MODEL, dtype=torch.float32).eval()
    learning, texts = pieces(1 if bench.quick else 12, False), pieces(1 if bench.quick else 8, True)
    measured, samples = codecs(), keys_and_values(model, learning)
    found, engines = {}, {}
    for name, codec in measured.items():
        learned = tables_of(codec, samples) if isinstance(codec, LearnedCodec) else None
        found[name] = perplexity(model, codec, learned, texts)
    setting = f"{MODEL}, {len(texts)} texts of {LENGTH} tokens"
    common = {"setting": setting, "metric": "held-out perplexity", "unit": "", "better": "lower"}
    for name in measured:
        if name == "plain, fp32":
            continue
        bench.compared(subject=name, peer="plain, fp32", values=[found[name]], peer_values=[found["plain, fp32"]],
                       **common)  # fmt: skip
    for channels in (2, 4, 8):
        name, alone = named(channels, 8), named(1, 8 // channels)
        bench.compared(subject=name, peer=alone, values=[found[name]], peer_values=[found[alone]], papers=[270],
                       **common)  # fmt: skip
    for name in ("int4", named(2, 8), named(4, 8)):
        codec = measured[name].model_copy(update={"residual": RESIDUAL})
        learned = tables_of(codec, samples) if isinstance(codec, LearnedCodec) else None
        beside = f"{name}, the newest {RESIDUAL} in full"
        bench.compared(subject=beside, peer=name, values=[perplexity(model, codec, learned, texts)],
                       peer_values=[found[name]], **common)  # fmt: skip
    setting = f"{MODEL}: {REQUESTS} requests, {PROMPT} in and {ANSWER} out, the bytes of {FIT} in fp32"
    for name in ("plain, fp32", "bf16", "int8", "int4", named(4, 8)):
        engines[name] = engine_of(model, measured[name], learning)
        bench.row(subject=name, setting=setting, metric="requests at a time", unit="", value=serve(engines[name]))
    tokens = REQUESTS * ANSWER

    def rate(engine: Engine) -> float:
        return tokens / bench.seconds(lambda: serve(engine))

    runs = {name: functools.partial(rate, each) for name, each in engines.items()}
    values = bench.turns({name: runs.pop(name) for name in ("plain, fp32", "bf16", "int8")}, setting, 3, 0)
    for name in ("bf16", "int8"):
        bench.compared(subject=name, peer="plain, fp32", setting=setting, metric="throughput", unit="tokens/s",
                       values=values[name], peer_values=values["plain, fp32"])  # fmt: skip
    for name, run in runs.items():
        bench.row(subject=name, setting=setting, metric="throughput", unit="tokens/s", value=run())
