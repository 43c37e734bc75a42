"""Serving what users send: cuts of the distribution, log-probabilities, lengths of every size, mixtures of experts.

For a CUDA device: random weights in the shapes of Qwen3-0.6B, of Llama-3-8B, and of Qwen3-30B-A3B cut to 16 layers, in
bf16. Requests that ask for more are set beside the same requests that ask for nothing, in turn. The peer's figures were
measured beside an earlier commit of this project, in one run with it, on such a device; its lists of requests were of
the same kind and not the same, so what compares is one request at a time, and the share that asking for more costs.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterable

import torch

from penstock.core.bench import Bench, load
from penstock.core.devices import label
from penstock.core.errors import UsageError
from penstock.core.garbage import settled
from penstock.core.progress import show
from penstock.core.results import peers_folder, read_results
from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.routers.softmax import SoftmaxRouter
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request

serve = load("serve")

PEER = "vLLM 0.26.0"
DENSE, LARGE, SPARSE = "Qwen3-0.6B shape", "Llama-3-8B shape", "Qwen3-30B-A3B shape, 16 layers"
LLAMA = DecoderConfig(
    vocabulary=128256, hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, context=4096,
)  # fmt: skip
EXPERTS = DecoderConfig(
    vocabulary=151936, hidden=2048, layers=16, heads=32, kv_heads=4, head_dim=128, ffn=6144, context=4096,
    qk_norm=True, moe=MoEConfig(experts=128, ffn=768, router=SoftmaxRouter(top_k=8)),
)  # fmt: skip
#: What requests ask for, by name.
ASKED = {
    "top-p 0.95, top-k 40": {"top_p": 0.95, "top_k": 40},
    "top-p 0.95": {"top_p": 0.95},
    "5 log-probabilities": {"logprobs": 5},
    "top-p 0.95, top-k 40, 5 log-probabilities": {"top_p": 0.95, "top_k": 40, "logprobs": 5},
}
BATCHES = (1, 16, 128, 256)
#: Standard deviation of the scores where they are to be as uneven as a trained model's, so that top-p leaves some
#: hundred tokens; those of random weights are nearly equal, and it leaves 95 in 100 of all.
UNEVEN = 4.0

#: Prompts, with what is wanted after each.
Asking = list[tuple[list[int], SamplingParams]]


def run(engine: Engine, requests: Asking) -> float:
    """Generated tokens a second, from an empty cache."""
    engine.memory.pool.forget()
    begun = time.perf_counter()
    for index, (prompt, sampling) in enumerate(requests):
        engine.add(Request(str(index), prompt, sampling))
    while engine.busy:
        engine.step()
    return sum(sampling.max_tokens for _, sampling in requests) / (time.perf_counter() - begun)


def alike(count: int, asked: dict[str, float], outputs: int = 192) -> Asking:
    """``count`` requests of one length that ask for something."""
    draw = random.Random(count)
    return [
        (
            [draw.randrange(10000) for _ in range(128)],
            SamplingParams(temperature=0.8, max_tokens=outputs, ignore_eos=True, seed=index, **asked),
        )
        for index in range(count)
    ]


def lognormal(count: int) -> Asking:
    """``count`` requests whose lengths are lognormal: 220 in and 180 out in the median, 16 to 2,048."""
    draw = random.Random(2)

    def length(median: float) -> int:
        return int(min(max(median * draw.lognormvariate(0, 0.9), 16), 2048))

    return [
        (
            [draw.randrange(10000) for _ in range(length(220))],
            SamplingParams(temperature=0.8, max_tokens=length(180), ignore_eos=True, seed=index),
        )
        for index in range(count)
    ]


def theirs(bench: Bench, setting: str) -> dict[str, float | str]:
    """The peer's best figure for a setting on such a device, as fields of a row; nothing where it has none."""
    found = [
        row.peer_value
        for result in read_results(peers_folder())
        if result.device == label(bench.device)
        for row in result.rows
        if row.setting == setting and row.peer and row.peer.startswith(PEER) and row.peer_value
    ]
    return {"peer": f"{PEER}, measured by itself", "peer_value": max(found)} if found else {}


def measure(bench: Bench, engine: Engine, setting: str, known: str, requests: Asking) -> None:
    """A row of throughput, beside the peer's of the ``known`` setting."""
    row = bench.measure(
        subject="penstock",
        setting=setting,
        metric="throughput",
        unit="tokens/s",
        run=lambda: run(engine, requests),
    )
    beside = theirs(bench, known)
    if beside:
        bench.rows[-1] = row.model_copy(update={**beside, "ratio": row.value / float(beside["peer_value"])})


def measure_asked(bench: Bench, engine: Engine, name: str, choices: Iterable[str]) -> None:
    """What asking for more costs, at several sizes of the batch."""
    for count in BATCHES[:1] if bench.quick else BATCHES:
        plain = alike(count, {})
        for asked in choices:
            some, setting = alike(count, ASKED[asked]), f"{name}: {count} requests, {asked}"
            row = bench.compare(
                subject="penstock",
                peer="penstock, plain sampling",
                setting=setting,
                metric="throughput",
                unit="tokens/s",
                run=lambda r=some: run(engine, r),
                peer_run=lambda r=plain: run(engine, r),
                repetitions=3,
            )
            beside = theirs(bench, setting)
            if beside:
                own = {"subject": "penstock", "setting": setting, "metric": "throughput", "unit": "tokens/s"}
                bench.row(**own, **beside, value=row.value, ratio=row.value / float(beside["peer_value"]))


def main(bench: Bench) -> None:
    """Measures on the CUDA device of ``bench``."""
    if bench.device.type != "cuda":
        raise UsageError("serve_asked measures large vocabularies and experts", hint="Give --device cuda.")
    for name, shape in ((SPARSE, EXPERTS), (DENSE, serve.SHAPES[DENSE]), (LARGE, LLAMA)):
        model = serve.random_model(shape, bench.device)
        engine = build_engine(model, serve.OFFLINE, report=show)
        with settled():  # as a server is
            one, many = f"{name}: one request", f"{name}: 384 requests, lognormal lengths"
            measure(bench, engine, f"{one}, 128 in and 256 out", one, alike(1, {}, 256))
            measure(bench, engine, many, many, lognormal(24 if bench.quick else 384))
            if name == DENSE:
                measure_asked(bench, engine, name, ASKED)
                deviation = shape.hidden**0.5 * model.embedding.weight.std().item()
                model.norm.weight.data.fill_(UNEVEN / deviation)
                measure_asked(bench, engine, f"{name}, uneven scores", ["top-p 0.95"])
        del engine, model
        gc.collect()
        torch.cuda.empty_cache()
