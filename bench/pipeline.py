"""Pipeline schedules on the GPUs of one host, against torch.distributed.pipelining with the same stages.

A Llama shape of about 3 B parameters in bf16 on sequences of 4,096 tokens; forward and backward without an optimizer.
Each schedule of ours runs with its layers and loss as they are, and compiled; PyTorch's as they are, and compiled where
they do not split the backward pass, which it cannot do with compiled stages. Those that stand beside one of PyTorch's
take turns with it. Schedules that are searched for are made for the times that were measured a moment before. Other
rows say what each held at its peak, how long its devices idled, and how far the simulator is from the measured time of
a step, at the costs of the step before. Without several GPUs, tiny shapes over gloo show that it works.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.core.bench import Bench
from penstock.core.errors import PenstockError
from penstock.models.attention import CausalRows
from penstock.models.config import DecoderConfig
from penstock.parallel.world import World
from penstock.pipeline.ir.schedule import Schedule
from penstock.pipeline.partition.balanced import cut
from penstock.pipeline.run.compiled import compile_layers, compiled
from penstock.pipeline.run.grid import Grid
from penstock.pipeline.run.profile import gathered, measured
from penstock.pipeline.run.runtime import Step
from penstock.pipeline.run.stages import Part, Stage
from penstock.pipeline.simulate.simulator import Costs, Simulation, simulate
from penstock.pipeline.simulate.times import Times
from penstock.policy import create
from penstock.testing.pipeline_peer import ours, theirs
from penstock.testing.workers import Workers, serve
from penstock.train.pipeline.profiling import alone

#: With the head, 31 layers are 4 units of work for each of 8 stages: no schedule has to wait for the largest one.
LARGE = {"hidden": 3072, "layers": 31, "heads": 24, "kv_heads": 8, "head_dim": 128, "ffn": 8192, "vocabulary": 32000}
TINY = {"hidden": 64, "layers": 8, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 128, "vocabulary": 512}

#: PyTorch's schedules, and those of ours that stand beside each: of the same name first, or else of the nearest memory.
BESIDE = {
    "Schedule1F1B": ("1f1b",),
    "ScheduleInterleaved1F1B": ("interleaved_1f1b",),
    "ScheduleInterleavedZeroBubble": ("zb_h1", "zb_auto"),
    "ScheduleZBVZeroBubble": ("v_zb", "v_auto"),
    "ScheduleDualPipeV": ("dualpipev", "v_half"),
}
#: Schedules that are searched for, and those whose measured times they are made for.
SEARCHED = {"zb_auto": "zb_h1", "v_auto": "v_zb"}
#: Schedules that papers set beside 1F1B in throughput. All of them are claimed to be faster in a step.
CLAIMS = {
    "interleaved_1f1b": (6,), "zb_h1": (3,), "zb_auto": (3,), "v_zb": (3, 21), "v_half": (21,), "v_auto": (21,),
}  # fmt: skip
#: PyTorch's schedules that do not split the backward pass.
WHOLE = ("Schedule1F1B", "ScheduleInterleaved1F1B")
#: What is said after the name of a subject whose layers and loss are compiled.
COMPILED = ", compiled"
#: How many stages PyTorch's schedules have on a device.
CHUNKS = {"Schedule1F1B": 1}

#: Steps of a repetition, which is their median: to make a subject anew takes longer.
STEPS, REPETITIONS = 2, 3
#: Seconds after which an order counts as hanging; the first one waits for the processes to start, and the first of what
#: is compiled for the compiler.
PATIENCE, COMPILING = 90.0, 400.0


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """By PyTorch's own operators: its runtime cannot split the backward pass of others."""
    logits = F.linear(hidden.flatten(0, 1), weight).float()
    return F.cross_entropy(logits, targets.flatten(), reduction="sum")


COMPILED_LOSS = compiled(summed_loss)


class StageModule(nn.Module):
    """A stage as a function of one tensor."""

    def __init__(self, part: Part, stage: Stage, context: CausalRows) -> None:
        super().__init__()
        self.part, self.stage, self.context = part, stage, context

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states from tokens or hidden states."""
        return self.part.run(self.stage.layers, x, self.context, last=self.stage.ends).hidden


class Subjects:
    """In a worker: the schedules by order. One at a time is in memory."""

    def __init__(self, world: World) -> None:
        self.on_cuda = torch.cuda.device_count() >= world.size
        self.device = torch.device(f"cuda:{world.local_rank}" if self.on_cuda else "cpu")
        if self.on_cuda:
            torch.cuda.set_device(self.device)
        self.grid = Grid(world, world.size, PATIENCE / 3)
        self.length = 4096 if self.on_cuda else 32
        self.config = DecoderConfig(**(LARGE if self.on_cuda else TINY), context=self.length)
        self.dtype = torch.bfloat16 if self.on_cuda else torch.float32
        self.microbatches = 4 * world.size
        shape = (self.microbatches, 1, self.length)
        self.tokens = torch.randint(self.config.vocabulary, shape, generator=torch.Generator().manual_seed(0))
        self.tokens = self.tokens.to(self.device)
        world.sum_([torch.zeros(1, device=self.device)])  # NCCL begins with all processes, for PyTorch's schedules too
        self.prepared = ""
        self.found: dict[str, Costs] = {}
        self.searched: dict[str, Schedule] = {}

    def __call__(self, order: str) -> dict[str, Any]:
        """Answers ``order``, the name of a schedule of either side, with what a step took."""
        if order != self.prepared:
            self._prepare(order)
        seconds, step = self._timed()
        answer = {"seconds": seconds, "peak": torch.cuda.max_memory_allocated() if self.on_cuda else 0}
        if step is not None:
            real = self._measured(step)
            answer["simulated"] = simulate(self.schedule, self.costs).makespan / real.makespan
            answer["idle"] = real.bubble_share
            self.costs = self.found[order] = real.costs
        return answer

    def _timed(self) -> tuple[float, Step | None]:
        """Seconds of a step of the slowest process, from when all begin until all work of their devices is done."""
        for parameter in self.parameters:
            parameter.grad = None
        self._synchronize()
        self.grid.world.barrier()
        began = time.perf_counter()
        step = self.step()
        self._synchronize()
        return self.grid.world.largest(time.perf_counter() - began)[0], step

    def _prepare(self, order: str) -> None:
        """Puts a subject in the place of the former one, and makes two steps: the first loads kernels, finds memory."""
        self.step = self.schedule = None
        self.parameters: list[nn.Parameter] = []
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
        name = order.removesuffix(COMPILED)
        self.compiles = name != order
        if name in SEARCHED and order not in self.searched:
            self.searched[order] = self._search(name, self.found[order.replace(name, SEARCHED[name])])
        self.step = self._peer(name) if name.startswith("Schedule") else self._own(name, self.searched.get(order))
        self.prepared = order
        self._timed()
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        _, step = self._timed()
        if step is not None:
            self.costs = self.found[order] = self._measured(step).costs

    def _peer(self, order: str) -> Callable[[], None]:
        device, devices = self.grid.device, self.grid.devices
        count = devices * CHUNKS.get(order, 2)
        folded = order in ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")
        held = sorted({device, count - 1 - device}) if folded else list(range(device, count, devices))
        modules = self._modules(count, held)
        return theirs(order, self.grid, modules, count, self._loss(modules), self.tokens, self.tokens)

    def _search(self, name: str, costs: Costs) -> Schedule:
        """What the schedule ``name`` is at measured times, which all processes have alike."""
        times = Times(
            forward=costs.forward,
            input_grad=costs.input_grad,
            weight_grad=costs.weight_grad,
            transfer=costs.link.latency,
        )
        return create("pipeline.schedule", name, times=times).build(self.grid.devices, self.microbatches)

    def _own(self, name: str, searched: Schedule | None) -> Callable[[], Step]:
        self.schedule = searched or create("pipeline.schedule", name).build(self.grid.devices, self.microbatches)
        held = [stage for stage, where in enumerate(self.schedule.placement) if self.grid.device in where]
        modules = self._modules(self.schedule.stages, held)
        message = (1, self.length, self.config.hidden)
        loss = self._loss(modules)
        return ours(self.schedule, self.grid, modules, loss, self.tokens, self.tokens, message, self.dtype)

    def _modules(self, count: int, held: list[int]) -> dict[int, nn.Module]:
        cuts = cut(self.config, count, self.length)
        stages = [Stage(layers, number == 0, number == count - 1) for number, layers in enumerate(cuts)]
        context = CausalRows.of(self.length, self.device)
        with self.device:
            parts = {stage: Part(self.config, [stages[stage]]).to(self.device, self.dtype) for stage in held}
        self.parameters = [parameter for part in parts.values() for parameter in part.parameters()]
        modules = {stage: StageModule(part, stages[stage], context) for stage, part in parts.items()}
        if self.compiles:
            self._compile(modules)
            self.grid.world.barrier()  # which waits longer than a pipeline does
        return modules

    def _compile(self, modules: dict[int, StageModule]) -> None:
        """Compiles and runs each stage by itself, whole and split: in a schedule the others would wait too long."""
        loss = self._loss(modules)
        hidden = torch.randn(1, self.length, self.config.hidden, dtype=self.dtype, device=self.device)
        for module in modules.values():
            compile_layers(module.part)

            def run(x: Tensor, module: StageModule = module) -> list[Tensor]:
                out = module(self.tokens[0] if module.stage.begins else x)
                return [loss(out, self.tokens[0]) if module.stage.ends else out]

            for split in (False, True):
                alone(run, hidden.detach().requires_grad_(), contextlib.nullcontext(), split=split)

    def _loss(self, modules: dict[int, nn.Module]):
        heads = [module.part.head.weight for module in modules.values() if hasattr(module.part, "head")]
        sum_of = COMPILED_LOSS if self.compiles else summed_loss
        return lambda hidden, targets: sum_of(hidden, heads[0], targets) / self.tokens.numel()

    def _measured(self, step: Step) -> Simulation:
        """The step of all processes; no bytes, since the time does not depend on them."""
        none = [0.0] * self.schedule.stages
        spans = gathered(self.grid, self.schedule, step.spans)
        return measured(self.schedule, spans, activation=none, weights=none, message=0.0)

    def _synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)


@dataclasses.dataclass
class Group:
    """One of PyTorch's schedules and those of ours that take turns with it."""

    peer: str
    names: list[str]
    asked: str = ""

    @property
    def orders(self) -> list[str]:
        """All that is measured: as it is, and then compiled."""
        whole = [self.peer + COMPILED] if self.peer in WHOLE else []
        return [*self.names, self.peer, *(name + COMPILED for name in self.names), *whole]

    def leave_out_asked(self) -> None:
        """Without what was asked last, and what would be made for its times; all of them where it is PyTorch's."""
        failed = self.asked.removesuffix(COMPILED)
        gone = self.names if failed == self.peer else (failed, *(own for own, of in SEARCHED.items() if of == failed))
        self.names = [name for name in self.names if name not in gone]


def main(bench: Bench) -> None:
    """Measures in a process for each GPU, or in four. After a subject that fails, the others go on in new processes."""
    devices = torch.cuda.device_count()
    size = devices if devices > 1 else 4
    left = [Group(peer, list(names)) for peer, names in BESIDE.items()]
    while left:
        with Workers(Path(__file__), size) as workers:
            try:
                while left:
                    compare(bench, workers, size, left[0], real=devices > 1)
                    left.pop(0)
            except PenstockError as error:
                bench.console.print(f"left out, {left[0].asked}: {error}", style="red")
                left[0].leave_out_asked()
                left = [group for group in left if group.names]
    if devices > 1:
        compare_within_memory(bench)
        compare_with_1f1b(bench)


def compare_with_1f1b(bench: Bench) -> None:
    """Sets each schedule beside 1F1B on the same runtime, as its paper does: the medians of this run, so that the ratio
    has no range."""
    rates, peaks = (
        {row.subject: row for row in bench.rows if row.metric == metric and COMPILED not in row.subject}
        for metric in ("throughput", "peak memory of a device")
    )
    compared = [(rates, papers, name) for name, papers in CLAIMS.items()]
    # Memory is the claim of v_half alone: it is to need less than 1F1B, in activations.
    for rows, papers, name in [*compared, (peaks, (21,), "v_half")]:
        if name in rows and "1f1b" in rows:
            own, plain = rows[name], rows["1f1b"]
            fields = own.model_dump(include={"subject", "setting", "metric", "unit", "better", "value", "repetitions"})
            peer = {"peer": "1f1b", "peer_value": plain.value, "ratio": own.value / plain.value}
            bench.row(**fields, **peer, papers=papers)


def compare_within_memory(bench: Bench) -> None:
    """Sets each of our schedules beside the fastest of PyTorch's that takes no more memory; a fiftieth more is none."""
    rates = [row for row in bench.rows if row.metric == "throughput" and (row.peer or "").startswith("torch")]
    peaks = {row.subject: row for row in bench.rows if row.metric == "peak memory of a device"}
    for own in rates:
        most = 1.02 * peaks[own.subject].value
        within = [row for row in rates if (peaks[row.subject].peer_value or most) < most and row.peer_value]
        if not within:
            continue
        best = max(within, key=lambda row: row.peer_value or 0.0)
        bench.row(
            subject=own.subject,
            peer=f"{best.peer}, the fastest of theirs within the same memory",
            setting=own.setting,
            metric="throughput at equal peak memory",
            unit="tokens/s",
            value=own.value,
            peer_value=best.peer_value,
            ratio=own.value / (best.peer_value or 1.0),
            repetitions=own.repetitions,
        )


def compare(bench: Bench, workers: Workers, size: int, group: Group, *, real: bool) -> None:
    """Measures a group, all of its subjects in turn."""
    answers: dict[str, list[dict[str, Any]]] = {order: [] for order in group.orders}

    def rate(order: str) -> float:
        group.asked = order
        patience = COMPILING if order.endswith(COMPILED) else PATIENCE
        found = [workers.ask(order, patience) for _ in range(STEPS)]
        answers[order] += [{**ranks[0], "peak": max(rank["peak"] for rank in ranks)} for ranks in found]
        return 4 * size * (4096 if real else 32) / statistics.median(ranks[0]["seconds"] for ranks in found)

    setting = f"{size} devices, {4 * size} microbatches, " + ("3 B parameters" if real else "tiny shapes, gloo")
    runs = {order: functools.partial(rate, order) for order in group.orders}
    rates = bench.turns(runs, setting, REPETITIONS, uncounted=0)  # each subject makes two steps that are not counted
    throughput: dict[str, Any] = {"setting": setting, "metric": "throughput", "unit": "tokens/s"}
    for own in (order for order in rates if not order.startswith("Schedule")):
        both = own.endswith(COMPILED) and group.peer in WHOLE
        other = group.peer + COMPILED if both else group.peer
        names = {"subject": own, "peer": f"torch.distributed.pipelining, {other}"}
        bench.compared(**names, **throughput, values=rates[own], peer_values=rates[other])
        if real:
            held, theirs_held = (max(answer["peak"] for answer in answers[order]) / 1e9 for order in (own, other))
            bench.row(
                **names,
                setting=setting,
                metric="peak memory of a device",
                unit="GB",
                better="lower",
                value=held,
                peer_value=theirs_held,
                ratio=held / theirs_held,
            )
        describe(bench, own, setting, answers[own])
    for name in group.names:
        names = {"subject": name + COMPILED, "peer": f"{name}, not compiled"}
        bench.compared(**names, **throughput, values=rates[name + COMPILED], peer_values=rates[name])


def describe(bench: Bench, name: str, setting: str, answers: list[dict[str, Any]]) -> None:
    """How long the devices idled, and how far the simulator was off."""
    idle = [100 * answer["idle"] for answer in answers]
    errors = [100 * abs(answer["simulated"] - 1) for answer in answers]
    for metric, shares in (("idle share of the devices", idle), ("error of the simulated makespan", errors)):
        bench.row(
            subject=name,
            setting=setting,
            metric=metric,
            unit="%",
            better="lower",
            value=statistics.median(shares),
            low=min(shares),
            high=max(shares),
            repetitions=len(shares),
        )


if __name__ == "__main__":
    serve(Subjects)
