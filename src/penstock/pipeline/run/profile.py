"""What a real step took: a timeline and costs, in the form of simulated ones."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from penstock.pipeline.ir.schedule import VOCABULARY, Kind, Schedule
from penstock.pipeline.run.grid import Grid
from penstock.pipeline.simulate.simulator import Costs, Link, Simulation


class Activations:
    """Bytes that autograd keeps of the forward passes in its ``with`` block, each storage once; parameters not counted.

    The outputs that a deferred product keeps are among them.
    """

    def __init__(self, parameters: Iterator[Tensor]) -> None:
        self._ignored = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._sizes: dict[int, int] = {}
        self._hooks = saved_tensors_hooks(self._count, lambda kept: kept)

    def __enter__(self) -> Activations:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    @property
    def bytes(self) -> int:
        """The sum."""
        return sum(self._sizes.values())

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._ignored:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def gathered(grid: Grid, schedule: Schedule, spans: Sequence[tuple[float, float]]) -> list[list[list[float]]]:
    """The (start, end) of the tasks of all devices of the first pipeline, from each device's own.

    All processes call it.
    """
    times = [torch.zeros(len(order), 2, dtype=torch.float64) for order in schedule.orders]
    if grid.pipeline == 0:
        times[grid.device] = torch.tensor(spans, dtype=torch.float64).reshape(-1, 2)
    grid.world.sum_(times)
    return [device.tolist() for device in times]


def measured(
    schedule: Schedule,
    spans: Sequence[Sequence[Sequence[float]]],
    *,
    activation: Sequence[float],
    weights: Sequence[float],
    message: float,
    host: Link = Link(),
    halves: Sequence[tuple[float, float]] | None = None,
) -> Simulation:
    """A real step as a timeline that can be drawn beside a simulated one; its ``costs`` are what was measured.

    A stage's F, I and W cost the median over its tasks; of a B, each has the share that ``halves`` say. The latency of
    a link is :func:`transfer_seconds`. What I leaves for W is not measured: ``deferred`` is all of the activation.

    Args:
        schedule: what was run.
        spans: for each device (start, end) of its tasks in seconds; see :class:`~penstock.pipeline.run.runtime.Step`.
        activation, weights: bytes of each stage's activations of a microbatch, and of its gradients.
        message: bytes between stages.
        host: the way of offloaded activations.
        halves: for each stage, what its I and W take, measured by themselves; equal ones if not given.
    """
    found: dict[tuple[Kind, int], list[float]] = defaultdict(list)
    for order, times in zip(schedule.orders, spans, strict=True):
        for task, (start, end) in zip(order, times, strict=True):
            found[task.kind, task.stage].append(end - start)
    seconds = {key: statistics.median(times) for key, times in found.items()}
    stages = range(schedule.stages)
    starts = tuple([start for start, _ in times] for times in spans)
    ends = tuple([end for _, end in times] for times in spans)
    shares = [i / (i + w) if i + w else 0.5 for i, w in halves or [(1.0, 1.0)] * schedule.stages]
    whole = [seconds.get((Kind.B, stage), 0.0) for stage in stages]
    each = transfer_seconds(schedule, starts, ends)
    costs = Costs(
        forward=tuple(seconds.get((Kind.F, stage), 0.0) for stage in stages),
        input_grad=tuple(seconds.get((Kind.I, stage), whole[stage] * shares[stage]) for stage in stages),
        weight_grad=tuple(seconds.get((Kind.W, stage), whole[stage] * (1 - shares[stage])) for stage in stages),
        activation=tuple(activation),
        deferred=tuple(activation),
        weights=tuple(weights),
        message=message,
        shards={kind: seconds[kind, stage] for kind, stage in seconds if kind in VOCABULARY},
        link=Link(latency=statistics.median(each.values()) if each else 0.0),
        links={way: Link(latency=latency) for way, latency in each.items()},
        host=host,
    )
    return Simulation(schedule, costs, starts, ends)


def transfer_seconds(
    schedule: Schedule, starts: Sequence[Sequence[float]], ends: Sequence[Sequence[float]]
) -> dict[tuple[int, int], float]:
    """Seconds of a message between each two devices that exchange messages both ways, the same for both ways.

    A task starts no earlier than its message has come, so of all messages from one device to another the shortest time
    from the end of one task to the start of the next is closest to that of the way. The clocks of two devices do not
    agree to the last microsecond: the mean of both directions is free of the difference.
    """
    made: dict[int, tuple[int, float]] = {}
    for device, order in enumerate(schedule.orders):
        made.update({schedule.made_by(task): (device, end) for task, end in zip(order, ends[device], strict=True)})
    shortest: dict[tuple[int, int], float] = {}
    for device, order in enumerate(schedule.orders):
        for task, start in zip(order, starts[device], strict=True):
            needed = schedule.read_by(task)
            if needed >= 0 and made[needed][0] != device:
                source, end = made[needed]
                shortest[source, device] = min(shortest.get((source, device), math.inf), start - end)
    return {(a, b): max(0.0, (shortest[a, b] + shortest[b, a]) / 2) for a, b in sorted(shortest) if (b, a) in shortest}
