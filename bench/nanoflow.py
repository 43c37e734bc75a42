"""Compute and memory at the same time: products beside decode attention, and serving steps in nano-batches.

On CUDA only. First the operations of one layer of the Qwen3-8B shape: the products of 2,048 tokens, and paged attention
of 256 sequences of about 1,000 tokens; one after the other, both at once on two streams, and both at once on two sets
of multiprocessors. Then the engine with random weights in that shape, while prompts arrive all the time: `nanoflow`
beside `sarathi`, in one run. It is given the rates measured here, but told that operations do not slow each other, for
steps to be split at all: what comes of that shows whether the device has room for two of them.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from penstock.core.bench import Bench, load
from penstock.core.errors import UsageError
from penstock.core.progress import show
from penstock.core.randomness import numpy_generator
from penstock.models.config import DecoderConfig
from penstock.models.decoder import FeedForward
from penstock.ops.paged.contract import CacheShape, PagedAttention, PagedBatch, PagedCache
from penstock.ops.paged.flashinfer import FlashInfer
from penstock.plan.nano_batches import Rates
from penstock.serve.batching.contract import Batching
from penstock.serve.batching.nanoflow import NanoFlow
from penstock.serve.batching.sarathi import Sarathi
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request

SHAPE = "Qwen3-8B shape"
#: Layers that follow each other in a run of the operations.
LAYERS = 20
#: Multiprocessors that attention has, of the 132 of an H100, where they are split.
SHARES = (24, 48)


class Operations:
    """The two kinds of work of a layer, on the device.

    Args:
        model: the shape of the layer.
        policy: attention over the cache.
        device: where all of it lies, in ``dtype``.
        tokens: that the products are over.
        lengths: of the sequences that attention is for.

    Attributes:
        flops: of the products; ``bytes`` of keys and values that attention reads.
    """

    def __init__(
        self,
        model: DecoderConfig,
        policy: PagedAttention,
        device: torch.device,
        dtype: torch.dtype,
        tokens: int,
        lengths: list[int],
    ) -> None:
        heads = model.heads + 2 * model.kv_heads
        with device:
            self._linear = [
                torch.nn.Linear(model.hidden, heads * model.head_dim, bias=False),
                torch.nn.Linear(model.heads * model.head_dim, model.hidden, bias=False),
                FeedForward(model, model.ffn),
            ]
        for module in self._linear:
            module.to(dtype)
        self._inputs = [
            torch.randn(tokens, size, device=device, dtype=dtype)
            for size in (model.hidden, model.heads * model.head_dim, model.hidden)
        ]
        batch, blocks = decode_batch(lengths, 16)
        shape = CacheShape(1, model.heads, model.kv_heads, model.head_dim, blocks, 16, dtype, device)
        self._cache: PagedCache = policy.open(shape)
        self._cache.plan(batch)
        self._query, self._key, self._value = (
            torch.randn(len(lengths), count, model.head_dim, device=device, dtype=dtype)
            for count in (model.heads, model.kv_heads, model.kv_heads)
        )
        self._scale = model.head_dim**-0.5
        self.flops = 2 * tokens * sum(each.numel() for module in self._linear for each in module.parameters())
        self.bytes = sum(lengths) * shape.block_bytes // shape.block_size

    @torch.inference_mode()
    def multiply(self) -> None:
        """The products."""
        for module, given in zip(self._linear, self._inputs, strict=True):
            module(given)

    @torch.inference_mode()
    def attend(self) -> Tensor:
        """The attention."""
        return self._cache.attend(0, self._query, self._key, self._value, scale=self._scale, window=None)


def decode_batch(lengths: list[int], block_size: int) -> tuple[PagedBatch, int]:
    """A batch of one new token for each sequence, whose blocks lie scattered, and how many blocks there are."""
    pages = [-(-length // block_size) for length in lengths]
    order = numpy_generator(0, "bench/nanoflow").permutation(sum(pages)).tolist()
    tables = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    for row, count, end in zip(tables, pages, itertools.accumulate(pages), strict=True):
        row[:count] = torch.tensor(order[end - count : end])
    last = torch.tensor(lengths) - 1
    blocks = tables.gather(1, (last // block_size).unsqueeze(1)).squeeze(1)
    return PagedBatch(
        starts=torch.arange(len(lengths) + 1, dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        tables=tables,
        slots=blocks.long() * block_size + last % block_size,
    ), sum(pages)


def queue(*works: tuple[torch.Stream, Callable[[], object]]) -> None:
    """Queues each of ``works`` on its stream, for all layers. Nothing is queued before, and whoever times this waits
    for the device: the streams need no events between them."""
    for _ in range(LAYERS):
        for stream, work in works:
            with torch.cuda.stream(stream):
                work()


def split_streams(device: torch.device, count: int) -> list[torch.Stream]:
    """Two streams: one has ``count`` multiprocessors, rounded up to what the device can part, the other has the rest.

    Raises:
        ImportError, RuntimeError: the device or what is installed cannot do that.
    """
    from flashinfer.green_ctx import split_device_green_ctx_by_sm_count

    numbered = torch.device(device.type, torch.cuda.current_device())
    streams: list[torch.Stream] = split_device_green_ctx_by_sm_count(numbered, [count])[0]
    return streams


def operations(bench: Bench) -> Rates:
    """Products and attention, in turn and at once; the rates of the faster way to do both at once."""
    draw = random.Random(0)
    lengths = [draw.randint(900, 1100) for _ in range(256)]
    model = load("serve").SHAPES[SHAPE]
    layers = Operations(model, FlashInfer(), bench.device, torch.bfloat16, 2048, lengths)
    main = torch.cuda.current_stream(bench.device)

    def layer(run: Callable[[], object]) -> float:
        """Milliseconds that a layer takes: the least of five, for clocks and kernels are warm by then."""
        return min(1000 * bench.seconds(run) / LAYERS for _ in range(5))

    alone = {work: layer(lambda work=work: queue((main, work))) for work in (layers.multiply, layers.attend)}
    compute, memory = alone[layers.multiply], alone[layers.attend]
    setting = f"{SHAPE}, a layer: products of 2,048 tokens, attention of 256 sequences of 1,000"
    for metric, value, unit in (
        ("products alone", layers.flops / compute / 1e9, "TFLOP/s"),
        ("attention alone", layers.bytes / memory / 1e9, "TB/s"),
        ("bound, the longer of the two", max(compute, memory), "ms"),
    ):
        better = "lower" if unit == "ms" else "higher"
        bench.row(subject="penstock", setting=setting, metric=metric, unit=unit, value=value, better=better)
    ways = {"at once, on two streams": (torch.cuda.Stream(bench.device, priority=-1), main)}
    for count in SHARES:
        try:
            attending, multiplying = split_streams(bench.device, count)
            ways[f"at once, attention on {count} multiprocessors of its own"] = attending, multiplying
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            bench.console.print(f"no split into {count} and the other multiprocessors: {error}", markup=False)
    shares: list[float] = []
    for name, (attending, multiplying) in ways.items():
        row = bench.compare(
            subject=name,
            peer="one after the other",
            setting=setting,
            metric="time of a layer",
            unit="ms",
            better="lower",
            run=lambda a=attending, m=multiplying: layer(lambda: queue((a, layers.attend), (m, layers.multiply))),
            peer_run=lambda: layer(lambda: queue((main, layers.attend), (main, layers.multiply))),
            papers=[194],
        )
        # While both run, each goes at this share of its speed: then the time is min / share + max - min.
        left = row.value - abs(compute - memory)
        share = min(compute, memory) / left if left > 0 else 1.0
        bench.row(subject=name, setting=setting, metric="speed of each beside the other", unit="", value=share)
        shares.append(share)
    return Rates(
        flops=1000 * layers.flops / compute, bandwidth=1000 * layers.bytes / memory, beside=min(max(shares), 1.0)
    )


def requests(count: int, length: int, fewest: int, most: int, vocabulary: int) -> list[Request]:
    """Requests of ``length`` tokens for ``fewest`` to ``most`` more: as they end at different times, prompts come in
    beside decodes all through the run."""
    draw = random.Random(0)
    return [
        Request(
            str(place),
            [draw.randrange(vocabulary) for _ in range(length)],
            SamplingParams(temperature=0.6, max_tokens=draw.randint(fewest, most), ignore_eos=True, seed=place),
        )
        for place in range(count)
    ]


def serve(engine: Engine, policy: Batching, work: list[Request]) -> tuple[float, float]:
    """Tokens in and out a second of ``work`` under ``policy``, and the share of steps that had two parts."""
    engine.memory.pool.forget()
    engine.steps.batcher = policy.start(engine.limits)
    for request in work:
        engine.add(request)
    parts: list[int] = []
    begun = time.perf_counter()
    while engine.busy:
        engine.step()
        parts.append(len(engine.steps.last.parts))
    seconds = time.perf_counter() - begun
    tokens = sum(len(request.prompt) + request.sampling.max_tokens for request in work)
    return tokens / seconds, statistics.mean(count > 1 for count in parts)


def engines(bench: Bench, rates: Rates) -> None:
    """The engine under both policies, on one model with one set of graphs."""
    common = load("serve")
    model = common.random_model(common.SHAPES[SHAPE], bench.device)
    engine = build_engine(model, EngineConfig(batching="sarathi", tokens=1536, sequences=128), report=show)
    work = requests(32 if bench.quick else 192, 1024, 64, 192, 10_000)
    shares: list[float] = []
    hopeful = NanoFlow(rates=rates.model_copy(update={"beside": 1.0}))

    def nanoflow() -> float:
        rate, share = serve(engine, hopeful, work)
        shares.append(share)
        return rate

    setting = f"{SHAPE}: {len(work)} requests, 1,024 in and 64 to 192 out, 128 at a time, steps of 1,536 tokens"
    subject = "nanoflow, overlap taken for free"
    bench.compare(
        subject=subject,
        peer="sarathi",
        setting=setting,
        metric="throughput, in and out",
        unit="tokens/s",
        run=nanoflow,
        peer_run=lambda: serve(engine, Sarathi(), work)[0],
        repetitions=2,
        papers=[194],
    )
    bench.row(subject=subject, setting=setting, metric="share of steps in two parts", unit="", value=shares[-1])


def main(bench: Bench) -> None:
    """Measures on the device of ``bench``.

    Raises:
        UsageError: it is no CUDA device, or FlashInfer is not there.
    """
    if bench.device.type != "cuda":
        raise UsageError(
            "this benchmark is about what a GPU does at the same time, and the device is a CPU",
            hint="Run it with --device cuda on a machine that has one.",
        )
    reason = FlashInfer().serves(bench.device, torch.bfloat16, 128)
    if reason is not None:
        raise UsageError(f"this benchmark needs FlashInfer: {reason}")
    rates = operations(bench)
    options = " ".join(f"--set batching.rates.{name}={value:.3g}" for name, value in rates.model_dump().items())
    bench.console.print(f"options for these rates: {options}", markup=False)
    torch.cuda.empty_cache()
    engines(bench, rates)
