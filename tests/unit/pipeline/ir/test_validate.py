"""The validator, on faults made by hand and at random."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.pipeline.ir.schedule import Kind, Schedule, ScheduleError, Task, looped, mirrored, zigzag
from penstock.pipeline.ir.validate import validate, walk
from penstock.pipeline.schedules.chimera import Chimera
from penstock.pipeline.schedules.one_f_one_b import OneForwardOneBackward
from penstock.pipeline.schedules.zb_h1 import ZeroBubbleH1
from penstock.testing.pipeline_schedule import check_complete, run_by_rounds

F, I, W, B = Kind.F, Kind.I, Kind.W, Kind.B


def schedule(*orders: str, microbatches: int = 1, placement=None) -> Schedule:
    """A schedule of tasks such as ``0F1``, a string for each device."""
    made = tuple(
        tuple(Task(Kind[word[1]], int(word[0]), int(word[2]), int(word[4:] or 0)) for word in order.split())
        for order in orders
    )
    return Schedule(placement or looped(len(orders)), made, microbatches)


def test_placements():
    assert looped(3, 2) == ((0,), (1,), (2,), (0,), (1,), (2,))
    assert zigzag(3, 3) == ((0,), (1,), (2,), (2,), (1,), (0,), (0,), (1,), (2,))
    assert mirrored(zigzag(2, 2), 2) == ((0, 1), (1, 0), (1, 0), (0, 1))


def test_tasks_are_written_as_in_pytorch():
    assert [str(Task(F, 2, 0)), str(Task(W, 0, 11)), str(Task(B, 1, 3, 1))] == ["2F0", "0W11", "1B3'1"]


def test_good_schedules_pass():
    validate(schedule("0F0 0B0", "1F0 1I0 1W0"))
    validate(schedule("0F0 0F1 0B1 0B0", "1F0 1F1 1B1 1B0", microbatches=2))
    both = schedule("0F0 1F1'1 1B1'1 0B0", "0F1'1 1F0 1B0 0B1'1", microbatches=2, placement=mirrored(looped(2), 2))
    validate(both)


@pytest.mark.parametrize(
    ("orders", "complaint"),
    [
        (("0F0", "1F0 1B0"), "device 0: 0B0 is missing"),
        (("0F0 0B0", "1F0 1I0"), "device 1: 1W0 is missing"),
        (("0F0 0B0", ""), "device 1: 1F0 is missing"),
        (("0F0 0F0 0B0", "1F0 1B0"), "device 0: 0F0 comes after"),
        (("0F0 0B0 0B0", "1F0 1B0"), "device 0: 0B0 comes after"),
        (("0F0 0B0", "1F0 1I0 1B0"), "device 1: 1B0 comes after"),
        (("0F0 0B0", "1F0 1B0 1W0"), "device 1: 1W0 comes after"),
        (("0B0 0F0", "1F0 1B0"), "device 0: 0B0 comes without 0F0"),
        (("0F0 0W0 0I0", "1F0 1B0"), "device 0: 0W0 comes without 0I0"),
        (("0F0 0B0 2F0", "1F0 1B0"), "device 0: 2F0 is of no stage"),
        (("0F0 0B0 0F1", "1F0 1B0"), "device 0: 0F1 is of no stage"),
        (("0F0 0B0 1F0", "1B0"), "device 0: 1F0 is not its own: stage 1 is placed on"),
        (("0F0 0B0", "1F0'1 1B0"), "device 1: 1F0'1 is not its own"),
    ],
)
def test_faults_are_named_with_device_and_task(orders, complaint):
    with pytest.raises(ScheduleError) as caught:
        validate(schedule(*orders))
    assert str(caught.value).startswith(complaint)


def test_a_microbatch_stays_on_one_replica():
    both = mirrored(looped(2), 2)
    with pytest.raises(ScheduleError, match="0B0'1"):
        validate(schedule("0F0 1F0'1 1B0'1", "0B0'1", placement=both))


@pytest.mark.parametrize(
    ("placement", "microbatches"), [((), 1), (((0,), (2,)), 1), (((0,), ()), 1), (((0,), (-1,)), 1), (((0,), (1,)), 0)]
)
def test_placements_must_make_sense(placement, microbatches):
    with pytest.raises(ScheduleError):
        validate(Schedule(placement, ((), ()), microbatches))


def test_a_deadlock_names_its_cycle():
    """Device 0 wants the backward of microbatch 1 first, device 1 the forward of microbatch 2, on which it waits."""
    stuck = schedule("0F0 0F1 0B1 0F2 0B0 0B2", "1F0 1B0 1F2 1F1 1B1 1B2", microbatches=3)
    with pytest.raises(ScheduleError) as caught:
        validate(stuck)
    assert caught.value.what == (
        "device 0: deadlock: 0B1 on device 0 waits for 1B1 of device 1, which comes after 1F2; "
        "1F2 on device 1 waits for 0F2 of device 0, which comes after 0B1"
    )


def test_devices_outside_the_cycle_are_not_named():
    """Device 0 only waits for one of the two that wait for each other."""
    stuck = schedule("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1", "2F0 2F1 2B0 2B1", microbatches=2)
    with pytest.raises(ScheduleError) as caught:
        validate(stuck)
    assert caught.value.what == (
        "device 1: deadlock: 1B0 on device 1 waits for 2B0 of device 2, which comes after 2F1; "
        "2F1 on device 2 waits for 1F1 of device 1, which comes after 1B0"
    )


@pytest.mark.parametrize(
    ("barriers", "orders", "complaint"),
    [
        (2, ("0E0 0F0 1S0 1T0 0B0 0G0", "0E0'1 1F0 1S0'1 1T0'1 1B0 0G0'1"), ""),
        (1, ("0E0 0F0 1S0 0B0 0G0 1T0", "0E0'1 1F0 1S0'1 1B0 1T0'1 0G0'1"), ""),
        (3, ("0E0 0F0 1S0 1N0 1T0 0B0 0G0", "0E0'1 1F0 1S0'1 1N0'1 1T0'1 1B0 0G0'1"), ""),
        (0, ("0E0 0F0 0B0", "1F0 1B0"), "device 0: 0E0 is no pass of its shard"),
        (2, ("0E0 0F0 1S0 1T0 0B0 0G0", "0E0'1 1F0 1S0'1 1B0 0G0'1"), "device 1: 1T0'1 is missing"),
        (2, ("0E0 0F0 1S0 1S0 1T0 0B0 0G0", "0E0'1 1F0 1S0'1 1T0'1 1B0 0G0'1"), "device 0: 1S0 comes 2 times"),
        (2, ("0E0 0F0 1S0'1 1T0 0B0 0G0", "0E0'1 1F0 1S0'1 1T0'1 1B0 0G0'1"), "device 0: 1S0'1 is no pass"),
        (2, ("0E0 0F0 1S0 1T0 0B0 0G0", "0E0'1 1F0 1S0'1 1B0 1T0'1 0G0'1"), "device 1: deadlock: 1B0 on device 1"),
        (2, ("0E0 0F0 1S0 1T0 0B0 0G0", "1F0 0E0'1 1S0'1 1T0'1 1B0 0G0'1"), "device 0: deadlock: 0F0 on device 0"),
        (3, ("0E0 0F0 1S0 1T0 1N0 0B0 0G0", "0E0'1 1F0 1S0'1 1N0'1 1T0'1 1B0 0G0'1"), "device 0: deadlock: 1T0"),
    ],
)
def test_shards_of_the_vocabulary(barriers, orders, complaint):
    """The last stage's backward waits for the T of all shards, or, with one barrier, for their S."""
    sharded = dataclasses.replace(schedule(*orders), barriers=barriers)
    if not complaint:
        validate(sharded)
        return
    with pytest.raises(ScheduleError) as caught:
        validate(sharded)
    assert str(caught.value).startswith(complaint)


BASES = {
    "1f1b": OneForwardOneBackward().build(3, 4),
    "zb_h1": ZeroBubbleH1().build(3, 4),
    "chimera": Chimera().build(2, 4),
}


@pytest.mark.parametrize("name", BASES)
@given(data=st.data())
def test_the_verdict_is_that_of_brute_force(name, data):
    """After random swaps of tasks, the validator agrees with running the schedule round by round."""
    base = BASES[name]
    orders = [list(order) for order in base.orders]
    for _ in range(data.draw(st.integers(1, 4))):
        order = data.draw(st.sampled_from(orders))
        i, j = data.draw(st.integers(0, len(order) - 1)), data.draw(st.integers(0, len(order) - 1))
        order[i], order[j] = order[j], order[i]
    mutant = dataclasses.replace(base, orders=tuple(map(tuple, orders)))
    check_complete(mutant)
    if run_by_rounds(mutant):
        with pytest.raises(ScheduleError):
            validate(mutant)
    else:
        validate(mutant)
        assert sorted(walk(mutant)) == sorted((d, task) for d, order in enumerate(mutant.orders) for task in order)


@pytest.mark.parametrize("name", BASES)
@given(data=st.data())
def test_a_lost_or_doubled_task_is_found(name, data):
    base = BASES[name]
    orders = [list(order) for order in base.orders]
    order = data.draw(st.sampled_from(orders))
    position = data.draw(st.integers(0, len(order) - 1))
    if data.draw(st.booleans()):
        del order[position]
    else:
        order.insert(data.draw(st.integers(0, len(order))), order[position])
    with pytest.raises(ScheduleError):
        validate(dataclasses.replace(base, orders=tuple(map(tuple, orders))))
