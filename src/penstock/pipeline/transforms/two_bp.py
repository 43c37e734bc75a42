"""2BP: the backward in two stages, the second in idle time."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator

from penstock.pipeline.ir.schedule import Kind, Schedule, Task
from penstock.pipeline.simulate.simulator import simulate
from penstock.pipeline.simulate.times import Times
from penstock.pipeline.transforms.contract import PipelineTransform
from penstock.policy import policy


@policy("pipeline.transform", "2bp", papers=[67])
class TwoBP(PipelineTransform):
    """Splits every B into I, in its place, and W, put off to where the device idles at the given ``times``.

    F and I run as if there were no W; a W takes the first gap after its I that is long enough, and what finds none
    comes at the end. Activations are held longer. Where uneven stages make that slower than W at once after I, it is W
    at once; where forwards overlap with whole backwards, and that saves more, the schedule stays as it was. The split
    and the use of idle time are the paper's, as is the concatenation of W that follow each other, which is the
    runtime's; that W only goes where it fits is our reading.
    """

    times: Times = Times()

    def transform(self, schedule: Schedule) -> Schedule:
        costs = self.times.costs(schedule)
        at_once = _with_orders(schedule, (_split(order) for order in schedule.orders))
        bare = _with_orders(at_once, ((task for task in order if task.kind is not Kind.W) for order in at_once.orders))
        run = simulate(bare, costs)
        timed = zip(bare.orders, run.starts, run.ends, strict=True)
        filled = _with_orders(schedule, (_fill(*order, costs.weight_grad, schedule.overlapped) for order in timed))
        candidates = [filled, at_once] + [schedule] * bool(schedule.overlapped)
        return min(candidates, key=lambda candidate: simulate(candidate, costs).makespan)


def _with_orders(schedule: Schedule, orders: Iterable[Iterable[Task]]) -> Schedule:
    return dataclasses.replace(schedule, orders=tuple(map(tuple, orders)))


def _split(order: Iterable[Task]) -> Iterator[Task]:
    """The tasks of a device with I and W for B."""
    for task in order:
        kinds = (Kind.I, Kind.W) if task.kind is Kind.B else (task.kind,)
        yield from (task._replace(kind=kind) for kind in kinds)


def _fill(
    order: tuple[Task, ...],
    starts: list[float],
    ends: list[float],
    weights: tuple[float, ...],
    overlapped: Collection[Task],
) -> list[Task]:
    """F and I of one device with each W, of ``weights`` seconds for each stage, in a gap or at the end; none comes
    between an ``overlapped`` forward and its backward."""
    pending: deque[Task] = deque()
    filled: list[Task] = []
    for task, end, following in zip(order, ends, [*starts[1:], math.inf], strict=False):
        filled.append(task)
        if task.kind is Kind.I:
            pending.append(task._replace(kind=Kind.W))
        while pending and task not in overlapped and end + weights[pending[0].stage] <= following:
            end += weights[pending[0].stage]
            filled.append(pending.popleft())
    return filled
