"""What steps take, beside loops that are played with a host and a device of known speed."""

from __future__ import annotations

import pytest

from penstock.serve.engine.step_clock import StepClock


def overlapped(host: float, device: float, drains: int, steps: int = 24) -> list[float | None]:
    """Seconds of each step as told, where the next one is launched before the tokens of one are read, but before each
    ``drains``-th one all are."""
    clock, now, done, under_way = StepClock(), 0.0, 0.0, list[float]()
    told = []

    def publish() -> None:
        nonlocal now
        now = max(now, under_way.pop(0))
        told.append(clock.end(now))

    for number in range(steps):
        if number % drains == 0:
            while under_way:
                publish()
        clock.begin(now)
        now += host
        done = max(done, now) + device
        under_way.append(done)
        if len(under_way) > 1:
            publish()
    return told


@pytest.mark.parametrize(("host", "device"), [(2.0, 8.0), (2.0, 0.5), (8.0, 0.0)])
def test_steps_that_overlap_take_what_one_more_costs(host: float, device: float) -> None:
    told = overlapped(host, device, drains=8)
    # Of eight in a row, the first and the last one cannot be told.
    assert [each for each in told if each is not None] == pytest.approx([max(host, device)] * 18)


@pytest.mark.parametrize(("host", "device"), [(2.0, 8.0), (8.0, 0.0)])
def test_steps_one_after_the_other_take_what_they_take(host: float, device: float) -> None:
    assert overlapped(host, device, drains=1) == pytest.approx([host + device] * 23)


def test_where_all_is_read_after_each_second_step_nothing_is_told() -> None:
    assert set(overlapped(2.0, 8.0, drains=2)) == {None}


def test_a_step_alone_takes_from_the_end_of_the_last_one_where_there_was_work_to_do_since_then() -> None:
    clock = StepClock()
    clock.begin(1.0, busy=lambda: True)  # nothing has ended yet
    assert clock.end(3.0) == 2.0
    clock.begin(4.0, busy=lambda: True)
    assert clock.end(6.0) == 3.0
    clock.begin(60.0)  # somebody came after a while
    assert clock.end(61.0) == 1.0
    clock.begin(61.5, busy=lambda: True)
    clock.begin(62.0, busy=lambda: True)
    clock.begin(64.0, busy=lambda: True)
    # The first of those that overlap and the last one cannot be told.
    assert [clock.end(65.0), clock.end(66.0), clock.end(67.0)] == [None, 2.0, None]
    clock.begin(68.0, busy=lambda: True)
    assert clock.end(69.0) == 2.0
