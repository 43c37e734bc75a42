"""Vocabulary parallelism: every device has a shard of the input embedding and of the output layer."""

from __future__ import annotations

import dataclasses

from pydantic import Field

from penstock.core.errors import UsageError
from penstock.pipeline.ir.schedule import Kind, Schedule, Task
from penstock.pipeline.ir.validate import walk
from penstock.pipeline.simulate.simulator import Simulation, simulate
from penstock.pipeline.simulate.times import Times
from penstock.pipeline.transforms.contract import PipelineTransform
from penstock.policy import policy

#: The shifts that are tried, in microbatches' times for each barrier.
SHIFTS = (1.0, 0.75, 0.5, 0.25, 0.0)

#: Of tasks that are due at the same time, the order that dependencies want.
_RANKS = {Kind.E: 0, Kind.F: 1, Kind.S: 2, Kind.N: 3, Kind.T: 4, Kind.I: 5, Kind.B: 5, Kind.W: 5, Kind.G: 6}


@policy("pipeline.transform", "vocabulary", papers=[117])
class VocabularyParallelism(PipelineTransform):
    """Shards the vocabulary over all devices, and inserts its passes where all devices have time for them.

    After the last stage's F, all devices compute the scores of their shard (S), and their gradients (T); what the
    softmax needs of all shards is a barrier. ``barriers`` says how many there are before the last stage's backward:

    - 3: the maxima of the scores; then the sums of exponentials (N); then the gradient of the hidden states.
    - 2: the softmax of each shard's own scores is rescaled once all maxima and sums are there (Algorithm 1).
    - 1: so is the gradient of the hidden states, which S computes already; T has the weights' only (Algorithm 2).

    As in the paper, each barrier gives the backward one microbatch's time more, so that nobody waits for anybody, for
    one more activation on each device. The paper changes the building blocks of schedules; we shift the tasks of any
    schedule in the simulated time of ``times``, by that of a microbatch or by less where that is faster, and take them
    in that order. Where sharding gains no time at all, the schedule stays as it was.
    """

    barriers: int = Field(1, ge=1, le=3)
    times: Times = Times(output=1.0)

    def transform(self, schedule: Schedule) -> Schedule:
        if schedule.barriers:
            raise UsageError("the vocabulary of this schedule is sharded already", hint="Transform it once.")
        if not self.times.product:
            return schedule
        alone = dataclasses.replace(schedule, overlapped=frozenset())  # other passes come between those of a pair
        candidates = [schedule, *(shard(alone, self.barriers, self.times, part) for part in SHIFTS)]
        runs = [simulate(found, self.times.costs(found)) for found in candidates]
        return min(runs, key=lambda run: (run.makespan, max(run.peak_bytes))).schedule


def shard(schedule: Schedule, barriers: int, times: Times, part: float) -> Schedule:
    """The schedule with all passes of a sharded vocabulary.

    A task is due when it begins at ``times`` without the output layer; a backward, for each barrier, ``part`` of a
    microbatch's time later. No task is due before what it needs, so the order of dues cannot deadlock.
    """
    sharded = dataclasses.replace(schedule, barriers=barriers)
    run = simulate(schedule, times.without_output().costs(schedule))
    shift = part * max(run.busy) / schedule.microbatches
    number = {task: position for position, (_, task) in enumerate(walk(schedule))}
    of_stages, of_shards = _dues(run, shift, barriers)
    orders = []
    for device, order in enumerate(schedule.orders):
        due = [(of_stages[task], _RANKS[task.kind], number[task], task) for task in order]
        due += [
            (of_shards[task.kind, microbatch], _RANKS[task.kind], microbatch, task)
            for microbatch in range(schedule.microbatches)
            for task in sharded.shard_tasks(device, microbatch)
        ]
        orders.append(tuple(task for *_, task in sorted(due)))
    return dataclasses.replace(sharded, orders=tuple(orders))


def _dues(run: Simulation, shift: float, barriers: int) -> tuple[dict[Task, float], dict[tuple[Kind, int], float]]:
    """When each task of a stage is due, and each pass of a microbatch on all shards."""
    of_stages: dict[Task, float] = {}
    of_shards: dict[tuple[Kind, int], float] = {}
    for order, starts, ends in zip(run.schedule.orders, run.starts, run.ends, strict=True):
        for task, start, end in zip(order, starts, ends, strict=True):
            kind, stage, microbatch, _ = task
            path = run.schedule.path(microbatch)
            of_stages[task] = start if kind is Kind.F else start + barriers * shift
            if kind is Kind.F and stage == path[0]:
                of_shards[Kind.E, microbatch] = start - shift
            if kind is Kind.F and stage == path[-1]:
                of_shards[Kind.S, microbatch] = end
                of_shards[Kind.N, microbatch] = end + shift
                of_shards[Kind.T, microbatch] = end + max(1, barriers - 1) * shift
            if kind in (Kind.I, Kind.B) and stage == path[0]:
                of_shards[Kind.G, microbatch] = end + barriers * shift
    return of_stages, of_shards
