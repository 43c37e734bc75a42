"""Paths of microbatches: what SkipPipe and CheckFree+ promise, and what the validator says of wrong ones."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import ConfigError
from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.ir.schedule import Kind, Schedule, ScheduleError, Task, looped
from penstock.pipeline.ir.validate import validate
from penstock.pipeline.ordering.list_scheduling import list_schedule
from penstock.pipeline.simulate.simulator import simulate
from penstock.pipeline.simulate.times import Times
from penstock.policy import create


def paths(stages: int, microbatches: int, skip: float) -> tuple[tuple[int, ...], ...]:
    return create("pipeline.route", "skippipe", skip=skip).paths(stages, microbatches)


def starts(found: tuple[tuple[int, ...], ...]) -> list[int]:
    """When each microbatch begins, if it begins as soon as it can meet nobody, a stage a unit of time."""
    taken: set[tuple[int, int]] = set()
    begins = []
    for path in found:
        begin = begins[-1] + 1 if begins else 0
        while any((stage, begin + place) in taken for place, stage in enumerate(path)):
            begin += 1
        taken |= {(stage, begin + place) for place, stage in enumerate(path)}
        begins.append(begin)
    return begins


def fewest_units(stages: int, microbatches: int, length: int) -> int:
    """Of all choices of increasing paths, the least time until the last forward ends."""
    options = [(0, *between, stages - 1) for between in itertools.combinations(range(1, stages - 1), length - 2)]
    return min(starts(choice)[-1] + length for choice in itertools.product(options, repeat=microbatches))


@pytest.mark.parametrize(("stages", "microbatches", "skip"), [(4, 3, 0.25), (5, 3, 0.4), (5, 4, 0.2), (6, 3, 0.5)])
def test_skippipe_is_as_short_as_any_choice_of_paths(stages, microbatches, skip):
    found = paths(stages, microbatches, skip)
    length = len(found[0])
    assert starts(found)[-1] + length == fewest_units(stages, microbatches, length)


@given(
    stages=st.integers(1, 10), microbatches=st.integers(1, 30), skip=st.sampled_from([0.0, 0.2, 0.25, 0.33, 0.5, 0.9])
)
def test_skippipe_never_waits_and_never_goes_far_astray(stages, microbatches, skip):
    """A microbatch begins each unit of time; a path is in order, but for neighbours on it."""
    found = paths(stages, microbatches, skip)
    assert starts(found) == list(range(microbatches))
    for path in found:
        assert (path[0], path[-1]) == (0, stages - 1)
        assert all(abs(place - sorted(path).index(stage)) <= 1 for place, stage in enumerate(path))


def test_without_skips_it_is_the_plain_pipeline():
    schedule = create("pipeline.route", "skippipe", skip=0.0).build(4, 8)
    assert schedule.paths == ((0, 1, 2, 3),) * 8
    plain = list_schedule(looped(4), 4, [0] * 8)
    assert schedule.orders == plain.orders
    assert simulate(schedule, Times().costs(schedule)).makespan == simulate(plain, Times().costs(plain)).makespan


@pytest.mark.parametrize("p", [4, 8, 16])
def test_skipping_saves_time(p):
    """The ends are never skipped, so the steady state is as long; the way through it is shorter."""
    makespans, transfers = [], []
    for skip in (0.0, 0.25, 0.5):
        schedule = create("pipeline.route", "skippipe", skip=skip).build(p, p)
        simulation = simulate(schedule, Times(transfer=1.0).costs(schedule))
        makespans.append(simulation.makespan)
        transfers.append(simulation.transfers)
        assert simulation.transfers == 2 * p * (len(schedule.paths[0]) - 1)
    assert makespans == sorted(makespans, reverse=True)
    assert makespans[2] < 0.9 * makespans[0]


def test_checkfree_swaps_both_ends_of_half_of_the_microbatches():
    found = create("pipeline.route", "checkfree").build(6, 4).paths
    assert found == ((0, 1, 2, 3, 4, 5), (1, 0, 2, 3, 5, 4)) * 2
    with pytest.raises(RefusalError, match="needs four stages, not 3"):
        create("pipeline.route", "checkfree").build(3, 4)


def test_the_share_to_skip_is_one():
    with pytest.raises(ConfigError):
        create("pipeline.route", "skippipe", skip=1.0)


TWO = (tuple(Task(kind, 0, 0) for kind in (Kind.F, Kind.B)), tuple(Task(kind, 1, 1) for kind in (Kind.F, Kind.B)))


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (((0,), (0,)), "device 1: 1F1 is not on the path of its microbatch"),
        (((0, 1), (1,)), "device 1: 1F0 is missing"),
        (((0,),), "there are 1 paths for 2 microbatches"),
        (((0,), ()), "the path of microbatch 1 passes"),
        (((0, 0), (1,)), "the path of microbatch 0 passes"),
        (((0,), (2,)), "the path of microbatch 1 passes"),
    ],
)
def test_wrong_paths_are_named(wrong, complaint):
    right = Schedule(looped(2), TWO, 2, paths=((0,), (1,)))
    validate(right)
    with pytest.raises(ScheduleError) as caught:
        validate(dataclasses.replace(right, paths=wrong))
    assert str(caught.value).startswith(complaint)


def test_a_deadlock_along_paths_is_named():
    """Microbatch 0 goes from 0 to 1 and microbatch 1 from 1 to 0; each device wants the one that is not there first."""
    orders = tuple(
        tuple(Task(kind, stage, microbatch) for kind in (Kind.F, Kind.B) for microbatch in (1 - stage, stage))
        for stage in (0, 1)
    )
    with pytest.raises(ScheduleError, match="0F1 on device 0 waits for 1F1 of device 1, which comes after 1F0"):
        validate(Schedule(looped(2), orders, 2, paths=((0, 1), (1, 0))))
