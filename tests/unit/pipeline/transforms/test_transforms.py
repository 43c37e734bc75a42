"""What each transform promises beyond the law."""

from __future__ import annotations

import dataclasses
import random

import pytest

from penstock.pipeline.ir.schedule import Kind, Schedule, Task, looped
from penstock.pipeline.simulate.simulator import Costs, Link, Simulation, simulate
from penstock.pipeline.simulate.times import Times
from penstock.policy import create


def build(name: str, p: int, m: int, **options: int) -> Schedule:
    return create("pipeline.schedule", name, **options).build(p, m)


def transformed(transform: str, schedule: Schedule, times: Times, **options: float) -> Simulation:
    policy = create("pipeline.transform", transform, times=times.model_dump(), **options)
    return simulate(policy.apply(schedule), times.costs(schedule))


@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 4), (4, 12), (8, 16)])
@pytest.mark.parametrize(("f", "i", "w"), [(1, 1, 1), (2, 3, 1)])
def test_2bp_takes_w_out_of_the_way(p, m, f, i, w):
    """GPipe: W leaves both ramps, (p-1)(F+I) remain. 1F1B with whole B idles (p-1)(F+I+W); the makespan falls too."""
    times = Times(forward=f, input_grad=i, weight_grad=w)
    found = transformed("2bp", build("gpipe", p, m), times)
    assert found.makespan == m * (f + i + w) + (p - 1) * (f + i)
    plain = build("1f1b", p, m)
    assert transformed("2bp", plain, times).makespan < simulate(plain, times.costs(plain)).makespan
    kinds = {task.kind for order in found.schedule.orders for task in order}
    assert kinds == {Kind.F, Kind.I, Kind.W}


def test_2bp_is_never_slower_where_gaps_are_too_short():
    """Device 1 waits for 0.9 before each F: no W of 1 fits, so W at once is better than W at the end."""
    schedule = build("1f1b", 2, 8)
    times = Times(forward=(1.0, 1.0), input_grad=(1.9, 1.0), weight_grad=(0.1, 1.0))
    assert transformed("2bp", schedule, times).makespan <= simulate(schedule, times.costs(schedule)).makespan


def test_an_offload_by_hand():
    """F of three microbatches, then their B; copies take half a second and one second."""
    order = [Task(kind, 0, microbatch) for kind in (Kind.F, Kind.B) for microbatch in range(3)]
    schedule = Schedule(looped(1), (tuple(order),), 3, offloaded=frozenset({(0, 0), (0, 1)}))
    even = Costs.even(schedule, activation=4)
    simulation = simulate(schedule, dataclasses.replace(even, host=Link(bandwidth=8)))
    # F0 leaves in 1 to 1.5, F1 in 2 to 2.5. To be there for B0 at 3, F0 returns as of 2; B1 is at 5, so F1 as of 3.
    assert simulation.away == {(0, 0): (1.5, 2), (0, 1): (2.5, 3)}
    assert simulation.starts == ([0, 1, 2, 3, 5, 7],)
    slow = simulate(schedule, dataclasses.replace(even, host=Link(bandwidth=4)))
    # Now they leave in 1 to 2 and 2 to 3, and return in 2 to 3 and, at the start of B0, in 3 to 4: B1 does not wait.
    assert slow.away == {(0, 0): (2, 2), (0, 1): (3, 3)}
    assert slow.makespan == 9
    crawling = simulate(schedule, dataclasses.replace(even, host=Link(bandwidth=1)))
    # They leave in 1 to 5 and 5 to 9; B0 waits for 5 + 4, B1 for 9 + 4.
    assert crawling.starts == ([0, 1, 2, 9, 13, 15],)


@pytest.mark.parametrize("name", ["gpipe", "interleaved_1f1b", "v_half"])
def test_offload_is_free_where_copies_hide(name):
    """A copy each way takes less than the work on a microbatch: everything that lives long enough goes, for no time."""
    for p in (2, 4, 8):
        schedule = build(name, p, 3 * p)
        plain = simulate(schedule, Times().costs(schedule))
        found = transformed("pipeoffload", schedule, Times(host=1.0))
        assert found.makespan == plain.makespan
        assert len(found.schedule.offloaded) >= schedule.stages * schedule.microbatches * 3 / 4
        assert max(found.peak_bytes) <= max(plain.peak_bytes)
        if p > 2:  # on two devices, what V-Half holds at once it also works on
            assert max(found.peak_bytes) < max(plain.peak_bytes)


def test_offload_makes_memory_fall_with_the_number_of_stages():
    """Of interleaved 1F1B: what stays is a few stages' worth, and stages shrink; without, it is p of them and more."""
    peaks = []
    for p in (4, 8, 16):
        found = transformed("pipeoffload", build("interleaved_1f1b", p, 4 * p), Times(host=1.0))
        peaks.append(max(found.peak_bytes) / p)  # in activations of the whole model
    assert peaks[1] <= 0.6 * peaks[0]
    assert peaks[2] <= 0.6 * peaks[1]


def test_long_lives_first_beats_random():
    """At half of all activations, the choice by lifespan leaves a lower peak than random ones."""
    schedule = build("interleaved_1f1b", 4, 16)
    times = Times(host=0.5)
    found = transformed("pipeoffload", schedule, times, share=0.5)
    cells = [(stage, microbatch) for stage in range(schedule.stages) for microbatch in range(16)]
    rng = random.Random(0)
    for _ in range(10):
        some = frozenset(rng.sample(cells, len(found.schedule.offloaded)))
        other = simulate(dataclasses.replace(schedule, offloaded=some), times.costs(schedule))
        assert max(found.peak_bytes) < max(other.peak_bytes)


def test_a_slow_host_takes_few():
    schedule = build("1f1b", 4, 16)
    counts = [
        len(transformed("pipeoffload", schedule, Times(host=host)).schedule.offloaded) for host in (1.0, 2.5, 4.0, 50.0)
    ]
    assert counts[0] > counts[1] > counts[2] > counts[3] == 0
