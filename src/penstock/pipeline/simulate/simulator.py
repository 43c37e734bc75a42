"""What a schedule costs: when each task runs, how long devices idle, what they hold and send."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from penstock.core.errors import UsageError
from penstock.pipeline.ir.schedule import VOCABULARY, Kind, Schedule, Task
from penstock.pipeline.ir.validate import walk
from penstock.pipeline.ir.versions import peak_versions


@dataclasses.dataclass(frozen=True)
class Link:
    """A way from one device to another: ``latency`` seconds, and ``bandwidth`` bytes a second."""

    latency: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        if not (0 <= self.latency < math.inf and self.bandwidth > 0):
            raise UsageError(
                f"a link has a latency of 0 or more and a positive bandwidth, not {self.latency} and {self.bandwidth}"
            )

    def seconds(self, size: float) -> float:
        """The time of a message of ``size`` bytes."""
        return self.latency + size / self.bandwidth


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the work on one microbatch takes, for each stage. Units are free as long as they agree.

    Attributes:
        forward, input_grad, weight_grad: seconds of F, I and W; B takes I and W together.
        activation: bytes held from the start of F to the end of B or W.
        deferred: of these, the bytes that the end of I leaves for W (M_W of the zero-bubble paper).
        weights: bytes of the gradients, which replicas of a stage exchange.
        message: bytes that pass from a stage to the next in F, and back in I or B.
        shards: seconds of each pass of a shard of the vocabulary, where it is sharded; 0 where it is not said.
        link: the way between any two devices; ``links`` says which (from, to) are different.
        host: the way of offloaded activations between each device and its host's memory, both ways at once.
        overlap: the time of an overlapped pair, as a share of what its forward and its backward take after each other.
    """

    forward: tuple[float, ...]
    input_grad: tuple[float, ...]
    weight_grad: tuple[float, ...]
    activation: tuple[float, ...]
    deferred: tuple[float, ...]
    weights: tuple[float, ...]
    message: float = 1.0
    shards: Mapping[Kind, float] = dataclasses.field(default_factory=dict)
    link: Link = Link()
    links: Mapping[tuple[int, int], Link] = dataclasses.field(default_factory=dict)
    host: Link = Link()
    overlap: float = 1.0

    @classmethod
    def even(
        cls,
        schedule: Schedule,
        *,
        forward: float = 1.0,
        input_grad: float = 1.0,
        weight_grad: float = 1.0,
        activation: float = 1.0,
        weights: float = 1.0,
        message: float = 1.0,
        link: Link = Link(),
    ) -> Costs:
        """Equal stages. The figures are those of a p-th of the model, so that schedules that cut it into more than p
        stages compare with those that do not: a stage takes p/S of them. W needs all that F kept."""
        share = schedule.devices / schedule.stages

        def each(figure: float) -> tuple[float, ...]:
            return (figure * share,) * schedule.stages

        return cls(
            forward=each(forward),
            input_grad=each(input_grad),
            weight_grad=each(weight_grad),
            activation=each(activation),
            deferred=each(activation),
            weights=each(weights),
            message=message,
            link=link,
        )

    def __post_init__(self) -> None:
        if not 0 < self.overlap <= 1:
            raise UsageError(f"an overlapped pair takes a share of its time, above 0 and up to 1, not {self.overlap}")
        lengths = {len(getattr(self, name)) for name in self._per_stage()}
        if len(lengths) > 1:
            raise UsageError(f"the costs speak of different numbers of stages: {sorted(lengths)}")
        for name in self._per_stage():
            for stage, value in enumerate(getattr(self, name)):
                if not 0 <= value < math.inf:
                    raise UsageError(f"costs are finite and not negative: {name} of stage {stage} is {value}")

    @staticmethod
    def _per_stage() -> tuple[str, ...]:
        return ("forward", "input_grad", "weight_grad", "activation", "deferred", "weights")

    def durations(self, kind: Kind) -> tuple[float, ...]:
        """Seconds of ``kind`` for each stage."""
        if kind in VOCABULARY:
            return (self.shards.get(kind, 0.0),) * len(self.forward)
        if kind is Kind.B:
            return tuple(i + w for i, w in zip(self.input_grad, self.weight_grad, strict=True))
        return {Kind.F: self.forward, Kind.I: self.input_grad, Kind.W: self.weight_grad}[kind]

    def between(self, source: int, target: int) -> float:
        """Seconds of a message from one device to another; none within a device."""
        return 0.0 if source == target else self.links.get((source, target), self.link).seconds(self.message)


@dataclasses.dataclass(frozen=True)
class Simulation:
    """One step of ``schedule`` at ``costs``.

    Attributes:
        starts, ends: for each device, the times of the tasks of its list.
        away: when the offloaded activation of (stage, microbatch) has left its device, and when it begins to return.
    """

    schedule: Schedule
    costs: Costs
    starts: tuple[list[float], ...]
    ends: tuple[list[float], ...]
    away: Mapping[tuple[int, int], tuple[float, float]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def makespan(self) -> float:
        """Seconds from the first task to the end of the last one."""
        return max((ends[-1] for ends in self.ends if ends), default=0.0)

    @functools.cached_property
    def busy(self) -> list[float]:
        """For each device, the seconds of its tasks."""
        durations = [self.costs.durations(kind) for kind in Kind]

        def seconds(tasks: Iterable[Task]) -> float:
            return sum(durations[task.kind][task.stage] for task in tasks)

        gain = 1 - self.costs.overlap
        pairs = [itertools.chain(*self.schedule.pairs(device)) for device in range(self.schedule.devices)]
        return [seconds(order) - gain * seconds(own) for order, own in zip(self.schedule.orders, pairs, strict=True)]

    @property
    def bubble_share(self) -> float:
        """The part of all devices' time, from 0 to the makespan, in which they idle."""
        whole = self.schedule.devices * self.makespan
        return 1 - sum(self.busy) / whole if whole else 0.0

    @property
    def bubble_time(self) -> float:
        """The longest time that a device idles between the start of its first task and the end of its last.

        The zero-bubble papers count so: without a synchronisation at the end of the step, a device that starts later
        may end later.
        """
        spans = zip(self.starts, self.ends, self.busy, strict=True)
        return max((ends[-1] - starts[0] - busy for starts, ends, busy in spans if ends), default=0.0)

    @property
    def longest_span(self) -> float:
        """The longest time of a device from the start of its first task to the end of its last: what a step takes where
        no device waits for others at its end."""
        return max(
            (ends[-1] - starts[0] for starts, ends in zip(self.starts, self.ends, strict=True) if ends), default=0.0
        )

    @functools.cached_property
    def gaps(self) -> list[list[tuple[float, float]]]:
        """For each device, the times (start, end) before and between its tasks in which it idles."""
        return [
            [(end, start) for end, start in zip([0.0, *ends], starts, strict=False) if start > end]
            for starts, ends in zip(self.starts, self.ends, strict=True)
        ]

    @functools.cached_property
    def peak_activations(self) -> list[int]:
        """For each device, the most activations (of one stage and microbatch) between F and B or W at once.

        It depends on the order alone, not on the costs, and counts those that are offloaded too.
        """
        change = {Kind.F: 1, Kind.W: -1, Kind.B: -1}
        held = (
            itertools.accumulate((change.get(task.kind, 0) for task in order), initial=0)
            for order in self.schedule.orders
        )
        return [max(counts) for counts in held]

    @functools.cached_property
    def peak_bytes(self) -> list[float]:
        """For each device, the most bytes of activations that it holds at once."""
        return [max(size for _, size in self.memory(device)) for device in range(self.schedule.devices)]

    def memory(self, device: int) -> list[tuple[float, float]]:
        """Steps (time, bytes of activations held from then on) of ``device``; what ends at a time is gone by then."""
        changes: list[tuple[float, float]] = []
        for task, start, end in zip(self.schedule.orders[device], self.starts[device], self.ends[device], strict=True):
            whole, left = self.costs.activation[task.stage], self.costs.deferred[task.stage]
            if task.kind is Kind.F:
                changes.append((start, whole))
                gone, back = self.away.get((task.stage, task.microbatch), (0.0, 0.0))
                if gone < back:
                    changes += [(gone, -whole), (back, whole)]
            elif task.kind not in VOCABULARY:
                changes.append((end, -{Kind.I: whole - left, Kind.W: left, Kind.B: whole}[task.kind]))
        if self.away:
            changes.sort()
        held, steps = 0.0, [(0.0, 0.0)]
        for time, change in changes:
            held += change
            steps.append((time, held))
        return steps

    @functools.cached_property
    def transfers(self) -> int:
        """Messages between different devices.

        With a sharded vocabulary, also a microbatch's hidden states and their gradients to or from each other device,
        at both ends of the model; what the softmax exchanges is small.
        """
        home = {(task.stage, task.microbatch): device for device, task in self.tasks() if task.kind is Kind.F}
        return sum(
            2 * (home[source, microbatch] != home[target, microbatch])  # once forward and once backward
            for microbatch in range(self.schedule.microbatches)
            for source, target in itertools.pairwise(self.schedule.path(microbatch))
        ) + (4 * (self.schedule.devices - 1) * self.schedule.microbatches if self.schedule.barriers else 0)

    @property
    def traffic(self) -> float:
        """Bytes between devices: messages, and ring all-reduces of gradients where stages have replicas.

        The time of these all-reduces is not simulated.
        """
        placed = zip(self.schedule.placement, self.costs.weights, strict=True)
        return self.transfers * self.costs.message + sum(2 * (len(devices) - 1) * size for devices, size in placed)

    def tasks(self) -> list[tuple[int, Task]]:
        """All (device, task)."""
        return [(device, task) for device, order in enumerate(self.schedule.orders) for task in order]

    def summary(self) -> dict[str, Any]:
        """The figures as plain data."""
        gathers, reductions = collectives(self.schedule)
        return {
            "devices": self.schedule.devices,
            "stages": self.schedule.stages,
            "microbatches": self.schedule.microbatches,
            "makespan": self.makespan,
            "longest_span": self.longest_span,
            "bubble_share": self.bubble_share,
            "bubble_time": self.bubble_time,
            "peak_activations": self.peak_activations,
            "peak_bytes": self.peak_bytes,
            "peak_versions": peak_versions(self.schedule),
            "transfers": self.transfers,
            "traffic": self.traffic,
            "gathers": sum(gathers),
            "reductions": sum(reductions),
        }


def simulate(schedule: Schedule, costs: Costs) -> Simulation:
    """Runs ``schedule`` on devices that do one task at a time, in their order, as soon as its input has arrived.

    Transfers overlap with work and with each other. What all shards of the vocabulary make together is there when the
    last of them is done and the longest way from any of them has passed. An offloaded activation leaves after its F and
    returns in time for its backward; see :class:`_HostLink`. Of an overlapped pair, what either makes is there at the
    end of both; its time is shown as if one came after the other. Time and memory are linear in the number of tasks.

    Raises:
        UsageError: the costs are of another number of stages.
        ScheduleError: the schedule deadlocks.
    """
    if len(costs.forward) != schedule.stages:
        raise UsageError(f"costs of {len(costs.forward)} stages do not fit a schedule of {schedule.stages}")
    durations = [costs.durations(kind) for kind in Kind]
    devices = range(schedule.devices)
    delays = [[costs.between(source, target) for target in devices] for source in devices]
    farthest = [max(delays[source][device] for source in devices) for device in devices]
    finished = [0.0] * len(schedule.makers)
    origins = [0] * len(schedule.makers)
    shared = 2 * schedule.stages * schedule.microbatches  # from here on, outputs of all shards
    clocks = [0.0] * schedule.devices
    starts: tuple[list[float], ...] = tuple([] for _ in devices)
    ends: tuple[list[float], ...] = tuple([] for _ in devices)
    hosts = [_HostLink(schedule, costs, device, starts[device]) for device in devices] if schedule.offloaded else []
    tasks = walk(schedule)
    for device, task in tasks:
        paired = task in schedule.overlapped
        together, share = ([task, next(tasks)[1]], costs.overlap) if paired else ([task], 1.0)
        start = clocks[device]
        for each in together:
            needed = schedule.read_by(each)
            if needed >= 0:
                delay = delays[origins[needed]][device] if needed < shared else farthest[device]
                start = max(start, finished[needed] + delay)
            if hosts and each.kind in (Kind.I, Kind.B):
                start = max(start, hosts[device].returned(each))
        for each in together:
            starts[device].append(start)
            start += share * durations[each.kind][each.stage]
            ends[device].append(start)
        for each in together:
            output = schedule.made_by(each)
            if output >= 0:
                finished[output] = max(finished[output], start)
                origins[output] = device
            if hosts and each.kind is Kind.F:
                hosts[device].leaves(each, start)
        clocks[device] = start
    return Simulation(schedule, costs, starts, ends, {key: span for host in hosts for key, span in host.away.items()})


class _HostLink:
    """The copies of one device's activations to the host and back, one at a time each way.

    A return begins early enough to hide behind the tasks before the backward, at their durations, and no earlier.
    """

    def __init__(self, schedule: Schedule, costs: Costs, device: int, starts: list[float]) -> None:
        self._schedule, self._order, self._starts = schedule, schedule.orders[device], starts
        self._seconds = [costs.host.seconds(size) for size in costs.activation]
        durations = [costs.durations(kind) for kind in Kind]
        self._busy = list(itertools.accumulate((durations[t.kind][t.stage] for t in self._order), initial=0.0))
        self._out = self._in = 0.0
        self._gone: dict[tuple[int, int], float] = {}
        self.away: dict[tuple[int, int], tuple[float, float]] = {}

    def leaves(self, task: Task, end: float) -> None:
        """The F ``task`` has ended, and what it left goes to the host if it is to be offloaded."""
        key = task.stage, task.microbatch
        if key in self._schedule.offloaded:
            self._out = self._gone[key] = max(self._out, end) + self._seconds[task.stage]

    def returned(self, task: Task) -> float:
        """When the activation that the next task, the I or B ``task``, needs is on the device."""
        key = task.stage, task.microbatch
        if key not in self._gone:
            return 0.0
        seconds, position = self._seconds[task.stage], len(self._starts)
        first = bisect.bisect_right(self._busy, self._busy[position] - seconds) - 1
        begin = max(self._in, self._gone[key], self._starts[min(max(first, 0), position - 1)])
        self._in = begin + seconds
        self.away[key] = self._gone[key], begin
        return self._in


def collectives(schedule: Schedule) -> tuple[list[int], list[int]]:
    """All-gathers of weights and reduce-scatters of gradients of each stage, if stages are fully sharded.

    A device holds the whole weights of one stage at a time: it gathers them for each run of forwards of that stage, and
    for each run of I or B, that no such task of another stage or direction interrupts (W needs no weights). It reduces
    the gradients after each run of W or B of a stage that no W or B of another one interrupts. Where the last forwards
    and the first backwards meet, one gather could be saved; like the breadth-first paper, we count both.
    """
    gathers = [0] * schedule.stages
    reductions = [0] * schedule.stages
    for order in schedule.orders:
        reading = (task for task in order if task.kind in (Kind.F, Kind.I, Kind.B))
        for (stage, _), _run in itertools.groupby(reading, key=lambda task: (task.stage, task.kind is Kind.F)):
            gathers[stage] += 1
        adding = (task for task in order if task.kind in (Kind.W, Kind.B))
        for stage, _run in itertools.groupby(adding, key=lambda task: task.stage):
            reductions[stage] += 1
    return gathers, reductions
