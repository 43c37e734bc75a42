"""What is read off the timeline of a real step."""

from __future__ import annotations

import dataclasses

import pytest

from penstock.pipeline.run.profile import measured, transfer_seconds
from penstock.pipeline.simulate.simulator import Costs, Link, simulate
from penstock.policy import create


@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "interleaved_1f1b", "v_half", "chimera"])
def test_the_time_of_a_transfer_is_found_though_clocks_differ(name):
    """A step simulated with transfers of 0.3, on devices whose clocks are up to 50 apart."""
    schedule = create("pipeline.schedule", name).build(4, 8)
    run = simulate(schedule, Costs.even(schedule, link=Link(latency=0.3)))
    off = [0.0, 50.0, -7.0, 3.0]
    starts = [[start + off[d] for start in own] for d, own in enumerate(run.starts)]
    ends = [[end + off[d] for end in own] for d, own in enumerate(run.ends)]
    found = transfer_seconds(schedule, starts, ends)
    assert found
    assert list(found.values()) == pytest.approx([0.3] * len(found))


def test_a_simulated_step_gives_its_costs_back():
    schedule = create("pipeline.schedule", "zb_h1").build(3, 6)
    costs = Costs.even(schedule, forward=2.0, input_grad=3.0, weight_grad=1.5, link=Link(latency=0.25))
    run = simulate(schedule, costs)
    spans = [list(zip(*times, strict=True)) for times in zip(run.starts, run.ends, strict=True)]
    found = measured(schedule, spans, activation=costs.activation, weights=costs.weights, message=costs.message)
    for field in ("forward", "input_grad", "weight_grad"):
        assert getattr(found.costs, field) == pytest.approx(getattr(costs, field))
    assert found.costs.link.latency == pytest.approx(0.25)
    assert simulate(schedule, found.costs).makespan == pytest.approx(run.makespan)


def test_one_device_sends_nothing():
    schedule = create("pipeline.schedule", "gpipe").build(1, 3)
    run = simulate(schedule, Costs.even(schedule))
    assert transfer_seconds(schedule, run.starts, run.ends) == {}


def test_each_link_has_its_own_time():
    schedule = create("pipeline.schedule", "1f1b").build(4, 8)
    latencies = {(0, 1): 0.1, (1, 2): 0.7, (2, 3): 0.2}
    both = {way: Link(latency=value) for (a, b), value in latencies.items() for way in ((a, b), (b, a))}
    run = simulate(schedule, dataclasses.replace(Costs.even(schedule), links=both))
    spans = [list(zip(*times, strict=True)) for times in zip(run.starts, run.ends, strict=True)]
    found = measured(schedule, spans, activation=[1.0] * 4, weights=[1.0] * 4, message=1.0).costs
    assert {way: link.latency for way, link in found.links.items()} == pytest.approx(
        {way: link.latency for way, link in both.items()}
    )
    assert found.link.latency == pytest.approx(0.2)


def test_a_whole_backward_has_the_halves_that_were_measured():
    """B takes I and W of the simulated step; apart, they were measured twice as long."""
    schedule = create("pipeline.schedule", "1f1b").build(3, 6)
    run = simulate(schedule, Costs.even(schedule, forward=2.0, input_grad=3.0, weight_grad=1.0))
    spans = [list(zip(*times, strict=True)) for times in zip(run.starts, run.ends, strict=True)]
    given = {"activation": [1.0] * 3, "weights": [1.0] * 3, "message": 1.0}
    found = measured(schedule, spans, halves=[(6.0, 2.0), (6.0, 2.0), (0.0, 0.0)], **given).costs
    assert found.input_grad == pytest.approx((3.0, 3.0, 2.0))
    assert found.weight_grad == pytest.approx((1.0, 1.0, 2.0))
