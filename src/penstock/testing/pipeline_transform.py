"""The law of ``pipeline.transform``.

Bugs that its clauses are there to catch:

- work: a task that is lost, doubled or moved to another device; passes of a sharded vocabulary that are missing.
- deadlock: W before I, a pass of the vocabulary before what it needs.
- time: a "better" schedule that takes longer at the times that it was made for.
- memory: activations that return before they have left, or too late; two copies at a time on one way; bytes that do
  not add up.
- several processes: gradients that differ from those of one.
- training: updates that differ from those of one device.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np

from penstock.core.errors import UsageError
from penstock.core.randomness import numpy_generator
from penstock.parallel.world import World
from penstock.pipeline.ir.schedule import Kind, Schedule, WeightRule
from penstock.pipeline.ir.validate import validate
from penstock.pipeline.run.grid import Grid
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.pipeline.simulate.simulator import Simulation, simulate
from penstock.pipeline.simulate.times import Times
from penstock.pipeline.transforms.contract import PipelineTransform
from penstock.testing.enrolled import enrolled, rebuilt
from penstock.testing.pipeline_runtime import check_schedule_runs
from penstock.testing.pipeline_schedule import (
    built,
    check_complete,
    check_simulation,
    check_versions,
    run_by_rounds,
    variants,
)
from penstock.testing.pipeline_training import check_trains
from penstock.testing.ranks import agreed
from penstock.testing.refusals import refused


def check(policy: PipelineTransform) -> None:
    """Asserts the law of ``pipeline.transform``."""
    check_schedules(policy)
    check_trains({policy.policy_name: policy}, 2)


def check_schedules(policy: PipelineTransform, draws: int = 40, processes: int = 3) -> None:
    """Asserts the law but for training: on all schedules with a flush, for so many draws of random times, and on so
    many processes."""
    schedules = _schedules()
    flushing = [made for made in schedules.values() if built(made, 2, 2).weights is WeightRule.FLUSH]
    candidates = list(variants(policy))
    for schedule in flushing:
        for devices, microbatches in ((2, 2), (4, 8)):
            made = built(schedule, devices, microbatches)
            for variant in candidates:
                check_transform(variant, made, getattr(variant, "times", Times()))
                if made.overlapped:
                    overlapping = Times(transfer=0.1, host=0.5, output=1.0, overlap=0.7)
                    check_transform(_made_for(variant, overlapping), made, overlapping)
    draw = numpy_generator(0, "testing/pipeline.transform")
    for _ in range(draws):
        drawn = built(flushing[draw.integers(len(flushing))], 4, 4 * int(draw.integers(1, 4)))
        check_any_times(candidates[draw.integers(len(candidates))], drawn, draw)
    with refused(UsageError, "stashes several"):
        policy.apply(schedules["pipedream"].build(2, 4))
    check_on_processes(policy, processes)


def _schedules() -> dict[str, PipelineSchedule]:
    made = enrolled("pipeline.schedule").items()
    return {name: policy for name, policy in made if isinstance(policy, PipelineSchedule)}


def check_any_times(policy: PipelineTransform, schedule: Schedule, draw: np.random.Generator) -> None:
    """The law for random times, uneven between the stages."""

    def seconds(count: int) -> tuple[float, ...]:
        return tuple((draw.integers(0, 7, count) / 2).tolist())

    each = {field: seconds(schedule.stages) for field in ("forward", "input_grad", "weight_grad")}
    transfer, host, output = seconds(3)
    overlap = int(draw.integers(1, 5)) / 4
    times = Times(**each, transfer=transfer, host=5 * host, output=output, overlap=overlap)  # some copies do not hide
    check_transform(_made_for(policy, times), schedule, times)


def _made_for(policy: PipelineTransform, times: Times) -> PipelineTransform:
    return policy.model_copy(update={"times": times}) if "times" in type(policy).model_fields else policy


def check_on_processes(policy: PipelineTransform, size: int) -> None:
    """Schedules that were transformed compute the same: one with several stages on a device, and one with I and W."""
    schedules = _schedules()

    def work(world: World) -> None:
        for name in ("interleaved_1f1b", "zb_h1"):
            for variant in variants(policy):
                check_schedule_runs(variant.apply(schedules[name].build(world.size, 6)), Grid(world, world.size))

    agreed(size, work)


def check_transform(policy: PipelineTransform, schedule: Schedule, times: Times) -> None:
    """Asserts the law for one schedule; ``times`` are what the policy was made for, if it has that option."""
    done = policy.apply(schedule)
    assert rebuilt(policy).apply(schedule) == done, "the schedule depends on more than the options"
    assert _work(done) == _work(schedule), "the work is another"
    assert (done.placement, done.microbatches, done.weights) == (
        schedule.placement,
        schedule.microbatches,
        schedule.weights,
    )
    check_complete(done)
    assert run_by_rounds(done) == [], "deadlock"
    validate(done)
    check_versions(done)
    if not done.offloaded:
        check_simulation(done)
    before, after = (simulate(either, times.costs(either)) for either in (schedule, done))
    assert after.makespan <= before.makespan * (1 + 1e-9), f"{before.makespan} become {after.makespan}"
    check_memory(after)


def _work(schedule: Schedule) -> list[Counter[tuple[Kind, int, int, int]]]:
    """What each device does on its stages, with B counted as I and W."""
    parts = {Kind.F: (Kind.F,), Kind.I: (Kind.I,), Kind.W: (Kind.W,), Kind.B: (Kind.I, Kind.W)}
    return [
        Counter((kind, *task[1:]) for task in order for kind in parts.get(task.kind, ())) for order in schedule.orders
    ]


def check_memory(simulation: Simulation) -> None:
    """Offloaded activations leave after their F and are back for their backward, one at a time each way; the curve of
    memory is what these times add up to."""
    schedule, costs = simulation.schedule, simulation.costs
    assert simulation.away.keys() == schedule.offloaded
    for device, order in enumerate(schedule.orders):
        held: dict[tuple[int, int], list[tuple[float, float]]] = {}
        leaving, returning = [], []
        for task, start, end in zip(order, simulation.starts[device], simulation.ends[device], strict=True):
            key = task.stage, task.microbatch
            copy = costs.host.seconds(costs.activation[task.stage])
            if task.kind is Kind.F:
                held[key] = [(start, 0.0)]
                if key in schedule.offloaded:
                    gone, back = simulation.away[key]
                    assert gone >= end + copy - 1e-9, f"{key} has left before it was there"
                    assert back >= gone - 1e-9, f"{key} returns before it has left"
                    leaving.append((gone - copy, gone))
                    returning.append((back, back + copy))
                    held[key] = [(start, gone), (back, 0.0)]
            elif task.kind in (Kind.I, Kind.B) and key in schedule.offloaded:
                assert start >= simulation.away[key][1] + copy - 1e-9, f"{task} begins before {key} is back"
            if task.kind in (Kind.B, Kind.W):
                held[key][-1] = held[key][-1][0], end
        for copies in (leaving, returning):
            copies.sort()
            assert all(end <= begin + 1e-9 for (_, end), (begin, _) in itertools.pairwise(copies)), "two copies at once"
        for time, size in dict(simulation.memory(device)).items():  # of several steps at one time, the last
            counted = sum(
                costs.activation[stage]
                for (stage, _), spans in held.items()
                if any(begin <= time < end for begin, end in spans)
            )
            assert abs(size - counted) < 1e-9, f"at {time}, {size} are held, not {counted}"
