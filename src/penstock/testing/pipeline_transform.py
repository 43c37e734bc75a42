"""The law of ``pipeline.transform``."""

from __future__ import annotations

import itertools
from collections import Counter

from penstock.pipeline.ir.schedule import Kind, Schedule
from penstock.pipeline.ir.validate import validate
from penstock.pipeline.simulate.simulator import Simulation, simulate
from penstock.pipeline.simulate.times import Times
from penstock.pipeline.transforms.contract import PipelineTransform
from penstock.testing.enrolled import rebuilt
from penstock.testing.pipeline_schedule import check_complete, check_simulation, check_versions, run_by_rounds


def check_transform(policy: PipelineTransform, schedule: Schedule, times: Times) -> None:
    """Asserts the law for one schedule; ``times`` are what the policy was made for, if it has that option."""
    done = policy.apply(schedule)
    assert rebuilt(policy).apply(schedule) == done, "the schedule depends on more than the options"
    assert _work(done) == _work(schedule)
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
    assert after.makespan <= before.makespan * (1 + 1e-9)
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
                    assert gone >= end + copy - 1e-9
                    assert back >= gone - 1e-9
                    leaving.append((gone - copy, gone))
                    returning.append((back, back + copy))
                    held[key] = [(start, gone), (back, 0.0)]
            elif task.kind in (Kind.I, Kind.B) and key in schedule.offloaded:
                assert start >= simulation.away[key][1] + copy - 1e-9
            if task.kind in (Kind.B, Kind.W):
                held[key][-1] = held[key][-1][0], end
        for copies in (leaving, returning):
            copies.sort()
            assert all(end <= begin + 1e-9 for (_, end), (begin, _) in itertools.pairwise(copies))
        for time, size in dict(simulation.memory(device)).items():  # of several steps at one time, the last
            counted = sum(
                costs.activation[stage]
                for (stage, _), spans in held.items()
                if any(begin <= time < end for begin, end in spans)
            )
            assert abs(size - counted) < 1e-9, f"at {time}, {size} are held, not {counted}"
