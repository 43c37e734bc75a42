"""Serving: tokens a second of many requests at once, and waiting times where requests arrive over time.

On CUDA: random weights in the shapes of Qwen3-0.6B and Qwen3-8B, bf16, and four workloads: 256 requests with 100 to
1,024 tokens in and out (nano-vllm's); 16 groups of 32 requests that share 1,024 tokens, with 64 own tokens in and 64
out; one request with 128 in and 256 out; 128 prompts of 2,048 tokens. The peer's figures are those of ``bench/peers``,
measured on such a device by themselves, not in the same run; the share of the roofline is against the copy and matrix
rates measured here.

On the CPU: 64 requests of a small model and 24 of a larger one, with 32 to 256 tokens in and out, in one run with
transformers' own generation, in static batches of the better of two sizes, and with its continuous batching.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers

from penstock.core.bench import Bench
from penstock.core.garbage import settled
from penstock.core.progress import show
from penstock.core.results import Row, peers_folder, read_results
from penstock.models import hub
from penstock.models.blank import without_weights
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.serve.batching.sarathi import Sarathi
from penstock.serve.build import build_engine
from penstock.serve.choose.sampler import Sampled
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.batch import Batch
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request

#: Whose figures stand beside ours on CUDA: a name in ``bench/peers``, and a subject there.
PEER = ("vllm-0.22.0", "vLLM 0.22.0")
SHAPES = {
    "Qwen3-0.6B shape": DecoderConfig(
        vocabulary=151936, hidden=1024, layers=28, heads=16, kv_heads=8, head_dim=128, ffn=3072, context=4096,
        qk_norm=True, tied=True,
    ),
    "Qwen3-8B shape": DecoderConfig(
        vocabulary=151936, hidden=4096, layers=36, heads=32, kv_heads=8, head_dim=128, ffn=12288, context=4096,
        qk_norm=True,
    ),
}  # fmt: skip
#: Requests a second of the online runs.
RATES = {"Qwen3-0.6B shape": (8.0, 32.0), "Qwen3-8B shape": (4.0, 8.0)}
#: What is known beforehand is planned as a whole.
OFFLINE = EngineConfig(batching="batchllm", tokens=16384, sequences=512)
SMALL = DecoderConfig(
    vocabulary=32768, hidden=768, layers=12, heads=12, kv_heads=6, head_dim=64, ffn=2304, context=1024, qk_norm=True,
    tied=True,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Workload:
    """Prompts with the tokens wanted after each; ``counted`` tokens make the figure."""

    name: str
    prompts: list[list[int]]
    outputs: list[int]
    counted: int
    temperature: float = 0.6


def cuda_workloads() -> list[Workload]:
    """The four workloads; all token ids are uniform in 0 .. 10,000."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, 10000) for _ in range(draw.randint(100, 1024))] for _ in range(256)]
    outputs = [draw.randint(100, 1024) for _ in range(256)]
    mixed = Workload("256 requests, 100 to 1,024 in and out", prompts, outputs, sum(outputs))
    prefixes = [[draw.randint(0, 10000) for _ in range(1024)] for _ in range(16)]
    prompts = [prefixes[g] + [draw.randint(0, 10000) for _ in range(64)] for g in range(16) for _ in range(32)]
    draw.shuffle(prompts)
    shared = Workload("16 groups of 32 with 1,024 tokens in common", prompts, [64] * 512, 512 * 64)
    prompts = [[draw.randint(0, 10000) for _ in range(128)]]
    single = Workload("one request, 128 in and 256 out", prompts, [256], 256)
    prompts = [[draw.randint(0, 10000) for _ in range(2048)] for _ in range(128)]
    prefill = Workload("128 prompts of 2,048 tokens (tokens in)", prompts, [1] * 128, 128 * 2048)
    return [single, mixed, shared, prefill]


def peer_rows() -> dict[str, Row]:
    """What the peer was measured to do by itself, by setting."""
    name, subject = PEER
    results = [result for result in read_results(peers_folder()) if result.name == name]
    return {row.setting: row for result in results for row in result.rows if row.subject == subject}


def run(engine: Engine, work: Workload) -> float:
    """Counted tokens a second of ``work``, from an empty cache."""
    engine.memory.pool.forget()
    begun = time.perf_counter()
    for index, (prompt, count) in enumerate(zip(work.prompts, work.outputs, strict=True)):
        sampling = SamplingParams(temperature=work.temperature, max_tokens=count, ignore_eos=True, seed=index)
        engine.add(Request(str(index), prompt, sampling))
    while engine.busy:
        engine.step()
    return work.counted / (time.perf_counter() - begun)


def online(engine: Engine, work: Workload, rate: float) -> tuple[list[float], list[float]]:
    """Seconds to the first token, and per token after it, of each request of ``work`` when they arrive as a Poisson
    process of ``rate`` a second, under ``sarathi``."""
    engine.memory.pool.forget()
    engine.steps.batcher = Sarathi().start(engine.limits)
    draw = random.Random(1)
    due, arrival = [], 0.0
    for _ in work.prompts:
        arrival += draw.expovariate(rate)
        due.append(arrival)
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    begun, sent = time.perf_counter(), 0
    while sent < len(due) or engine.busy:
        now = time.perf_counter() - begun
        while sent < len(due) and due[sent] <= now:
            sampling = SamplingParams(
                temperature=work.temperature, max_tokens=work.outputs[sent], ignore_eos=True, seed=sent
            )
            engine.add(Request(str(sent), work.prompts[sent], sampling))
            sent += 1
        for delta in engine.step() if engine.busy else ():
            now = time.perf_counter() - begun
            first.setdefault(int(delta.id), now)
            last[int(delta.id)] = now
    to_first = [first[index] - due[index] for index in first]
    per_token = [(last[i] - first[i]) / (work.outputs[i] - 1) for i in first if work.outputs[i] > 1]
    return to_first, per_token


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lie."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


class Roofline:
    """The least time of each step: the bytes of the weights and of the keys and values read over the copy rate, or the
    operations over the matrix rate, whichever is more. What several sequences have in common is read once.

    Attributes:
        seconds: the sum over the steps of a run; 0 before there was one.
        steps: how many there were.
    """

    def __init__(self, engine: Engine, rates: tuple[float, float]) -> None:
        config, cache = engine.executor.model.config, engine.executor.cache.shape
        self._engine, (self._copy, self._matmul) = engine, rates
        matrices = engine.executor.model.parameter_count() - (0 if config.tied else config.vocabulary * config.hidden)
        self._weights, self._head = matrices, config.vocabulary * config.hidden
        self._token_bytes = cache.block_bytes / cache.block_size
        self._pair = 4 * config.layers * config.heads * config.head_dim
        self.seconds, self.steps = 0.0, 0

    def run(self, work: Workload) -> float:
        """:func:`run`, counting what its steps cost at least."""
        with self.counting():
            return run(self._engine, work)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what the steps meanwhile cost at least, from 0 on."""
        self.seconds, self.steps, runner = 0.0, 0, self._engine.executor
        launch = runner.launch

        def counted(batch: Batch) -> Sampled | None:
            self.seconds += self._least(batch)
            self.steps += 1
            return launch(batch)

        runner.launch = counted  # type: ignore[method-assign]
        yield
        runner.launch = launch  # type: ignore[method-assign]

    def _least(self, batch: Batch) -> float:
        tokens, scored = batch.tokens, sum(entry.scored for entry in batch.entries)
        read = self._read(batch)
        pairs = sum(entry.count * (entry.start + (entry.count + 1) / 2) for entry in batch.entries)
        flops = 2 * (self._weights - self._head) * tokens + 2 * self._head * scored + self._pair * pairs
        return max((2 * self._weights + self._token_bytes * read) / self._copy, flops / self._matmul)

    def _read(self, batch: Batch) -> int:
        """Cached tokens that the sequences of ``batch`` see; a block that several have counts once."""
        tables, size = batch.tables, self._engine.executor.block_size
        lengths = [entry.start + entry.count for entry in batch.entries]
        blocks = [tables[entry.slot, : n // size] for entry, n in zip(batch.entries, lengths, strict=True)]
        return size * len(np.unique(np.concatenate(blocks))) + sum(n % size for n in lengths)


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 2 GiB, on the CPU of 128 MiB."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source))


def matmul_rate(device: torch.device) -> float:
    """Operations a second of a bf16 product of two matrices of 8,192, on the CPU of two of 1,024 in fp32."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _best(lambda: a @ a)


def _wait() -> None:
    """Until a GPU, where there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(6):
        _wait()
        begun = time.perf_counter()
        work()
        _wait()
        times.append(time.perf_counter() - begun)
    return min(times)


def on_cuda(bench: Bench) -> None:
    """The four workloads with each shape, and requests that arrive over time."""
    rates = copy_rate(bench.device), matmul_rate(bench.device)
    for name, shape in SHAPES.items():
        engine = build_engine(random_model(shape, bench.device), OFFLINE, report=show)
        with settled():  # as a server is
            measure_workloads(bench, name, engine, rates)
            measure_waiting(bench, name, engine)
        del engine
        gc.collect()
        torch.cuda.empty_cache()


def measure_workloads(bench: Bench, name: str, engine: Engine, rates: tuple[float, float]) -> None:
    """Tokens a second of each workload, and the share of what the device's ``rates`` allow."""
    peers = peer_rows()
    for work in cuda_workloads():
        roofline = Roofline(engine, rates)
        row = bench.measure(
            subject="penstock",
            setting=f"{name}: {work.name}",
            metric="throughput",
            unit="tokens/s",
            # The first run, which warms up and is not timed, is the one whose steps are counted.
            run=lambda r=roofline, w=work: run(engine, w) if r.seconds else r.run(w),
            repetitions=5 if len(work.prompts) == 1 else 3,
        )
        theirs = peers[row.setting]
        beside = {"peer": f"{theirs.subject}, measured by itself", "peer_value": theirs.value}
        bench.rows[-1] = row.model_copy(update={**beside, "ratio": row.value / theirs.value})
        share = roofline.seconds * row.value / work.counted
        bench.row(subject="penstock", setting=row.setting, metric="share of the roofline", value=share, unit="")


def measure_waiting(bench: Bench, name: str, engine: Engine) -> None:
    """Waiting times of requests that arrive at each of the shape's rates."""
    mixed = cuda_workloads()[1]
    few = dataclasses.replace(mixed, prompts=mixed.prompts[:96], outputs=mixed.outputs[:96])
    for rate in RATES[name]:
        times = online(engine, few, rate)
        for metric, values in zip(("time to first token", "time per output token"), times, strict=True):
            for share in (0.5, 0.99):
                bench.row(
                    subject="penstock",
                    setting=f"{name}: {rate:g} requests/s, 100 to 1,024 in and out",
                    metric=f"{metric}, p{100 * share:g}",
                    unit="ms",
                    better="lower",
                    value=1000 * percentile(values, share),
                    low=1000 * min(values),
                    high=1000 * max(values),
                    repetitions=len(values),
                )


def random_model(shape: DecoderConfig, device: torch.device) -> Decoder:
    """A model of ``shape`` in bf16 with weights uniform within 1e-3."""
    with without_weights():
        model = Decoder(shape).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1e-3, 1e-3)
    return model


def served(device: torch.device, small: str = "python-6m") -> tuple[str, Decoder]:
    """The model that a benchmark of the engine serves, by name: on CUDA random weights in the first of :data:`SHAPES`,
    on the CPU the ``small`` one of the package in fp32."""
    if device.type == "cuda":
        name = next(iter(SHAPES))
        return name, random_model(SHAPES[name], device)
    return small, hub.load(small, dtype=torch.float32).eval()


def on_cpu(bench: Bench) -> None:
    """Greedy requests, beside transformers' two ways of generating."""
    models = {"python-6m": hub.load("python-6m", dtype=torch.float32), "120 M, random": Decoder(SMALL).initialize(0)}
    for (name, model), full in zip(models.items(), (64, 24), strict=True):
        count, draw = 6 if bench.quick else full, random.Random(0)
        prompts = [
            [draw.randrange(3, model.config.vocabulary) for _ in range(draw.randint(32, 256))] for _ in range(count)
        ]
        outputs = [draw.randint(32, 256) for _ in range(count)]
        work = Workload("", prompts, outputs, sum(outputs), temperature=0)
        engine = build_engine(model.eval(), EngineConfig(sequences=64))
        theirs = as_transformers(model)
        rates = {size: static_batches(theirs, work, size) for size in (count // 3, count)}
        best = max(rates, key=rates.__getitem__)
        peers = {
            f"transformers generate, batches of {best}": lambda m=theirs, w=work, size=best: static_batches(m, w, size),
            "transformers continuous batching": lambda m=theirs, w=work: continuous_batching(m, w),
        }
        for peer, peer_run in peers.items():
            bench.compare(
                subject="penstock",
                peer=peer,
                setting=f"{name}: {count} requests, 32 to 256 in and out, fp32",
                metric="throughput",
                unit="tokens/s",
                run=lambda e=engine, w=work: run(e, w),
                peer_run=peer_run,
                repetitions=2,
            )


def as_transformers(model: Decoder) -> transformers.PreTrainedModel:
    """The same weights in transformers."""
    with tempfile.TemporaryDirectory() as folder:
        hub.save(model, Path(folder, "model"), family="qwen3" if model.config.qk_norm else "llama")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder, "model"), dtype=torch.float32).eval()
    theirs.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return theirs


@torch.inference_mode()
def static_batches(model: transformers.PreTrainedModel, work: Workload, size: int) -> float:
    """Counted tokens a second in batches of ``size``, in order, each as long as its longest request."""
    begun = time.perf_counter()
    for first in range(0, len(work.prompts), size):
        prompts = work.prompts[first : first + size]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        most = max(work.outputs[first : first + size])
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most)
    return work.counted / (time.perf_counter() - begun)


def continuous_batching(model: transformers.PreTrainedModel, work: Workload) -> float:
    """Counted tokens a second with transformers' continuous batching."""
    begun = time.perf_counter()
    with model.continuous_batching_context_manager(
        continuous_batching_config=transformers.ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=2048)
    ) as manager:
        for index, (prompt, count) in enumerate(zip(work.prompts, work.outputs, strict=True)):
            manager.add_request(prompt, request_id=str(index), max_new_tokens=count, eos_token_id=-1)
        left = len(work.prompts)
        while left:
            result = manager.get_result(timeout=60)
            left -= result is not None and result.is_finished()
        seconds = time.perf_counter() - begun
    return work.counted / seconds


def main(bench: Bench) -> None:
    """Measures on the device of ``bench``."""
    if bench.device.type == "cuda":
        on_cuda(bench)
    else:
        on_cpu(bench)
