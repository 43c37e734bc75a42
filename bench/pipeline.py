"""Pipeline schedules on the GPUs of one host, against torch.distributed.pipelining with the same stages.

A Llama shape of about 3 B parameters in bf16 on sequences of 4,096 tokens; forward and backward without an optimizer.
Every row also says what it held at its peak, and how far the simulator is from the time that was measured. Without
several GPUs, and with --quick, tiny shapes over gloo show that it works.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penstock.core.bench import Bench
from penstock.models.attention import CausalRows
from penstock.models.config import DecoderConfig
from penstock.ops.cross_entropy import linear_cross_entropy
from penstock.parallel.world import World
from penstock.pipeline.grid import Grid
from penstock.pipeline.profile import gathered, measured
from penstock.pipeline.simulator import simulate
from penstock.pipeline.stages import Part, cut
from penstock.policy import create
from penstock.testing.pipeline_peer import ours, theirs
from penstock.testing.workers import Workers, serve

PAPERS = [3, 21]

LARGE = {"hidden": 3072, "layers": 28, "heads": 24, "kv_heads": 8, "head_dim": 128, "ffn": 8192, "vocabulary": 32000}
TINY = {"hidden": 64, "layers": 8, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 128, "vocabulary": 512}

#: Ours and theirs: the same schedule, or, where we have no schedule of that name, the nearest in placement and memory.
PAIRS = {
    "1f1b": "Schedule1F1B",
    "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "zb_h1": "ScheduleInterleavedZeroBubble",
    "v_zb": "ScheduleZBVZeroBubble",
    "v_half": "ScheduleDualPipeV",
}
#: How many stages PyTorch's schedules have on a device.
CHUNKS = {"Schedule1F1B": 1}


class StageModule(nn.Module):
    """A stage as a function of one tensor."""

    def __init__(self, part: Part, stage: range, context: CausalRows) -> None:
        super().__init__()
        self.part, self.stage, self.context = part, stage, context

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states from tokens or hidden states."""
        return self.part.run(self.stage, x, self.context).hidden


class Subjects:
    """In a worker: the schedules by order. One at a time is in memory."""

    def __init__(self, world: World) -> None:
        self.grid = Grid(world, world.size)
        self.on_cuda = torch.cuda.device_count() >= world.size
        self.device = torch.device(f"cuda:{world.local_rank}" if self.on_cuda else "cpu")
        if self.on_cuda:
            torch.cuda.set_device(self.device)
        self.length = 4096 if self.on_cuda else 32
        self.config = DecoderConfig(**(LARGE if self.on_cuda else TINY), context=self.length)
        self.dtype = torch.bfloat16 if self.on_cuda else torch.float32
        self.microbatches = 4 * world.size
        shape = (self.microbatches, 1, self.length)
        self.tokens = torch.randint(self.config.vocabulary, shape, generator=torch.Generator().manual_seed(0))
        self.tokens = self.tokens.to(self.device)
        self.prepared = ""

    def __call__(self, order: str) -> dict[str, Any]:
        """Answers ``order``, the name of a schedule of either side, with what a step took."""
        if order != self.prepared:
            self._prepare(order)
        for parameter in self.parameters:
            parameter.grad = None
        self._synchronize()
        self.grid.world.barrier()
        began = time.perf_counter()
        step = self.step()
        self._synchronize()
        seconds = self.grid.world.largest(time.perf_counter() - began)[0]
        answer = {"seconds": seconds, "peak": torch.cuda.max_memory_allocated() if self.on_cuda else 0}
        if step is not None:
            real = measured(
                self.schedule, gathered(self.grid, self.schedule, step.spans), **self._sizes(self.schedule.stages)
            )
            answer["simulated"] = simulate(self.schedule, real.costs).makespan / real.makespan
        return answer

    def _prepare(self, order: str) -> None:
        self.step = self.schedule = None
        self.parameters: list[nn.Parameter] = []
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        device, devices, peer = self.grid.device, self.grid.devices, order.startswith("Schedule")
        if peer:
            count = devices * CHUNKS.get(order, 2)
            folded = order in ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")
            held = sorted({device, count - 1 - device}) if folded else list(range(device, count, devices))
        else:
            self.schedule = create("pipeline.schedule", order).build(devices, self.microbatches)
            count = self.schedule.stages
            held = [stage for stage, where in enumerate(self.schedule.placement) if device in where]
        modules = self._modules(count, held)
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        message = (1, self.length, self.config.hidden)
        if peer:
            self.step = theirs(order, self.grid, modules, count, self._loss(modules), self.tokens, self.tokens)
        else:
            self.step = ours(
                self.schedule, self.grid, modules, self._loss(modules), self.tokens, self.tokens, message, self.dtype
            )
        self.prepared = order
        self.step()

    def _modules(self, count: int, held: list[int]) -> dict[int, nn.Module]:
        stages = cut(self.config, count, self.length)
        context = CausalRows.of(self.length, self.device)
        with self.device:
            parts = {stage: Part(self.config, [stages[stage]]).to(self.dtype) for stage in held}
        return {stage: StageModule(part, stages[stage], context) for stage, part in parts.items()}

    def _loss(self, modules: dict[int, nn.Module]):
        heads = [module.part.head.weight for module in modules.values() if hasattr(module.part, "head")]

        def loss(hidden: Tensor, targets: Tensor) -> Tensor:
            return linear_cross_entropy(hidden.flatten(0, 1), heads[0], targets.flatten()) / self.tokens.numel()

        return loss

    def _sizes(self, stages: int) -> dict[str, Any]:
        """Bytes that do not matter to the time."""
        return {"activation": [1.0] * stages, "weights": [1.0] * stages, "message": 1.0}

    def _synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)


def main(bench: Bench) -> None:
    """Measures in a process for each GPU, or in two."""
    devices = torch.cuda.device_count()
    size = devices if devices > 1 else 2
    with Workers(Path(__file__), size) as workers:
        for name, peer in PAIRS.items():
            compare(bench, workers, size, name, peer, real=devices > 1)


def compare(bench: Bench, workers: Workers, size: int, name: str, peer: str, *, real: bool) -> None:
    """Measures one pair: each repetition is the median of some steps, since building a subject anew costs more."""
    answers: dict[str, list[dict[str, Any]]] = {name: [], peer: []}
    steps = 2 if bench.quick else 5

    def rate(order: str) -> float:
        found = [workers.ask(order) for _ in range(steps)]
        answers[order] += [{**ranks[0], "peak": max(rank["peak"] for rank in ranks)} for ranks in found]
        seconds = sorted(ranks[0]["seconds"] for ranks in found)[steps // 2]
        return 4 * size * (4096 if real else 32) / seconds

    setting = f"{size} devices, {4 * size} microbatches, " + ("3 B parameters" if real else "tiny shapes, gloo")
    bench.compare(
        subject=name,
        peer=f"torch.distributed.pipelining, {peer}",
        setting=setting,
        metric="throughput",
        unit="tokens/s",
        run=lambda: rate(name),
        peer_run=lambda: rate(peer),
        repetitions=5,
    )
    peaks = {order: max(answer["peak"] for answer in found) for order, found in answers.items()}
    if real:
        bench.row(
            subject=name,
            peer=f"torch.distributed.pipelining, {peer}",
            setting=setting,
            metric="peak memory of a device",
            unit="GB",
            better="lower",
            value=peaks[name] / 1e9,
            peer_value=peaks[peer] / 1e9,
            ratio=peaks[name] / peaks[peer],
        )
    shares = sorted(answer["simulated"] for answer in answers[name])
    bench.row(
        subject=name,
        setting=setting,
        metric="simulated makespan of the measured one",
        unit="",
        value=shares[len(shares) // 2],
    )


if __name__ == "__main__":
    serve(Subjects)
