"""Schedules from units of p microbatches, ordered by list scheduling and concatenated, or from a repeated block.

Papers that draw a schedule rather than define it are read so here: the placement and the unit of p microbatches are
theirs, and the order is what a list scheduler makes of it that prefers backwards, at their F = 1 and B = 2. A unit has
bubbles, which each further one repeats; so for more microbatches there is :mod:`penstock.pipeline.ordering.periodic`.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence

from penstock.pipeline.ir.schedule import Kind, Placement, Schedule, Task
from penstock.pipeline.ordering import local_search
from penstock.pipeline.ordering.periodic import periodic
from penstock.pipeline.ordering.words import Problem, to_schedule, to_words
from penstock.pipeline.simulate.simulator import Costs, Simulation, simulate

#: Tasks that the local search may time.
WORK = 400_000


def fastest(placement: Placement, devices: int, replicas: Sequence[int], microbatches: int) -> Schedule:
    """Of units of ``replicas`` (see :func:`list_schedule`) and a repeated block, what takes less time at F = 1 and
    B = 2; of equals, what holds less."""
    unit = list_schedule(placement, devices, replicas)
    return _fastest(in_units(unit, microbatches), periodic(placement, microbatches))


@functools.lru_cache(maxsize=64)
def improved(placement: Placement, devices: int, replicas: tuple[int, ...], microbatches: int) -> Schedule:
    """Like :func:`fastest`, with a local search for the unit, and then for all microbatches from what is fastest,
    within its memory."""
    unit = list_schedule(placement, devices, replicas)
    if microbatches > len(replicas):
        unit = improved(placement, devices, replicas, len(replicas))
    start = _fastest(in_units(unit, microbatches), periodic(placement, microbatches))
    problem = Problem.whole(placement, max(_run(start).peak_activations), microbatches)
    return to_schedule(problem, local_search.search(problem, [to_words(problem, start)], WORK))


def _fastest(*candidates: Schedule) -> Schedule:
    return min(map(_run, candidates), key=lambda run: (round(run.makespan, 9), max(run.peak_activations))).schedule


def _run(schedule: Schedule) -> Simulation:
    """At F = 1 and B = 2 of a stage."""
    return simulate(schedule, Costs.even(schedule, forward=1, input_grad=1, weight_grad=1))


def in_units(unit: Schedule, microbatches: int) -> Schedule:
    """Repeats the schedule ``unit`` until all ``microbatches`` are done.

    A unit begins as many units of time after the one before as a device works on one unit, so that it fills the bubbles
    of its neighbours. Each device runs the tasks of all units in the order of the times thus given. A last unit with
    fewer microbatches leaves the rest of its tasks out.
    """
    run = _run(unit)
    size, interval = unit.microbatches, max(run.busy)
    orders = []
    for order, starts in zip(unit.orders, run.starts, strict=True):
        timed = [
            (start + repeat * interval, task._replace(microbatch=task.microbatch + repeat * size))
            for repeat in range(-(-microbatches // size))
            for task, start in zip(order, starts, strict=True)
            if task.microbatch + repeat * size < microbatches
        ]
        orders.append(tuple(task for _, task in sorted(timed, key=lambda pair: pair[0])))
    return Schedule(unit.placement, tuple(orders), microbatches)


def list_schedule(
    placement: Placement, devices: int, replicas: Sequence[int], paths: tuple[tuple[int, ...], ...] = ()
) -> Schedule:
    """Schedules one microbatch on replica ``replicas[k]`` of every stage, for each k; of every stage of ``paths[k]``,
    if there are paths.

    A device that is free takes, of the tasks whose input is there, a backward before a forward, then the earliest
    microbatch, then the latest stage.
    """
    m = len(replicas)
    before, after = Schedule(placement, (), m, paths=paths).neighbours
    ready: list[list[tuple[bool, int, int, Task]]] = [[] for _ in range(devices)]
    orders: list[list[Task]] = [[] for _ in range(devices)]
    running: list[tuple[int, int, Task]] = []  # (when it ends, device, task)
    busy: set[int] = set()

    def offer(task: Task) -> None:
        urgency = (task.kind is Kind.F, task.microbatch, -task.stage, task)
        heapq.heappush(ready[placement[task.stage][task.replica]], urgency)

    for microbatch, replica in enumerate(replicas):
        offer(Task(Kind.F, paths[microbatch][0] if paths else 0, microbatch, replica))
    time = 0
    while running or any(ready):
        for device in range(devices):
            if ready[device] and device not in busy:
                task = heapq.heappop(ready[device])[-1]
                orders[device].append(task)
                busy.add(device)
                heapq.heappush(running, (time + (1 if task.kind is Kind.F else 2), device, task))
        time = running[0][0]
        while running and running[0][0] == time:
            _, device, task = heapq.heappop(running)
            busy.remove(device)
            forward, key = task.kind is Kind.F, task.stage * m + task.microbatch
            target = after[key] if forward else before[key]
            if target >= 0:
                offer(task._replace(stage=target // m))
            elif forward:
                offer(task._replace(kind=Kind.B))
    return Schedule(placement, tuple(map(tuple, orders)), m, paths=paths)
