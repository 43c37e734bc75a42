"""What is read off the timeline of a real step."""

from __future__ import annotations

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
    assert transfer_seconds(schedule, starts, ends) == pytest.approx(0.3)


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
    assert transfer_seconds(schedule, run.starts, run.ends) == 0.0
