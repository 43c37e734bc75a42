"""The simulator against timelines made by hand, longest paths, and the closed forms of the papers."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effort import lines
from penstock.core.errors import UsageError
from penstock.pipeline.ir.schedule import Kind, Schedule, ScheduleError, Task, looped
from penstock.pipeline.ir.validate import validate
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.pipeline.simulate.simulator import Costs, Link, Simulation, collectives, simulate
from penstock.pipeline.simulate.times import Times
from penstock.policy import create, index

PAIRS = [(1, 1), (2, 2), (2, 8), (3, 6), (4, 4), (4, 12), (5, 10), (8, 32)]


def build(name: str, devices: int, microbatches: int, **options: int) -> Schedule:
    policy = create("pipeline.schedule", name, **options)
    assert isinstance(policy, PipelineSchedule)
    return policy.build(devices, microbatches)


def run(name: str, devices: int, microbatches: int, *, f=1.0, i=1.0, w=1.0, **options: int) -> Simulation:
    schedule = build(name, devices, microbatches, **options)
    return simulate(schedule, Costs.even(schedule, forward=f, input_grad=i, weight_grad=w))


def test_a_timeline_by_hand():
    """Two devices, two microbatches, F = 1, I = 2, W = 3, and half a second for each transfer."""
    schedule = build("1f1b", 2, 2)
    costs = Costs.even(schedule, forward=1, input_grad=2, weight_grad=3, message=8, link=Link(0.25, 32))
    simulation = simulate(schedule, costs)
    # device 1: F0 as of 1.5, B0 2.5 to 7.5, F1 7.5 to 8.5, B1 8.5 to 13.5; device 0 hears of B0 at 8, of B1 at 14.
    assert simulation.starts == ([0, 1, 8, 14], [1.5, 2.5, 7.5, 8.5])
    assert simulation.ends == ([1, 2, 13, 19], [2.5, 7.5, 8.5, 13.5])
    assert simulation.makespan == 19
    assert simulation.busy == [12, 12]
    assert simulation.bubble_share == 1 - 24 / 38
    assert simulation.bubble_time == 7
    assert simulation.memory(0) == [(0, 0), (0, 1), (1, 2), (13, 1), (19, 0)]
    assert simulation.memory(1) == [(0, 0), (1.5, 1), (7.5, 0), (7.5, 1), (13.5, 0)]
    assert simulation.peak_activations == [2, 1]
    assert simulation.transfers == 4
    assert simulation.traffic == 32


def test_i_lets_go_of_what_w_does_not_need():
    schedule = Schedule(looped(1), (tuple(Task(kind, 0, 0) for kind in (Kind.F, Kind.I, Kind.W)),), 1)
    costs = Costs((1.0,), (1.0,), (1.0,), activation=(5.0,), deferred=(2.0,), weights=(1.0,))
    assert simulate(schedule, costs).memory(0) == [(0, 0), (0, 5), (2, 2), (3, 0)]


def test_links_differ():
    schedule = build("gpipe", 3, 1)
    costs = Costs.even(schedule, message=10)
    slow = Costs(**{**vars(costs), "links": {(0, 1): Link(latency=3), (2, 1): Link(bandwidth=2)}})
    assert simulate(schedule, slow).starts == ([0, 15], [4, 13], [5, 6])


def test_neighbouring_stages_on_one_device_need_no_transfer():
    """Hanayo's V turns on the last device, and again on the first."""
    schedule = build("hanayo", 2, 1, waves=2)
    costs = Costs.even(schedule, link=Link(latency=100))
    assert simulate(schedule, costs).transfers == 8
    assert build("hanayo", 1, 1, waves=2).stages == 4
    assert run("hanayo", 1, 3).transfers == 0


def test_replicas_exchange_their_gradients():
    """A ring all-reduce over r copies moves 2 (r - 1) times the gradients in all."""
    simulation = run("chimera", 4, 4)
    assert simulation.transfers == 4 * 3 * 2
    assert simulation.traffic == 24 + 4 * 2


@given(
    name=st.sampled_from(index().names("pipeline.schedule")),
    devices=st.sampled_from([2, 4]),
    rounds=st.integers(1, 3),
    seconds=st.lists(st.floats(0, 100), min_size=48, max_size=48),
    comm=st.floats(0, 10),
)
def test_makespan_is_the_longest_path(name, devices, rounds, seconds, comm):
    """For any times: relaxing all constraints until nothing changes gives the simulated times, exactly."""
    schedule = build(name, devices, 2 * rounds * devices if name.startswith("dualpipe") else rounds * devices)
    schedule = dataclasses.replace(schedule, overlapped=frozenset())
    count = schedule.stages
    even = Costs.even(schedule, link=Link(latency=comm))
    given_times = {
        what: tuple(seconds[offset : offset + count])
        for what, offset in (("forward", 0), ("input_grad", 16), ("weight_grad", 32))
    }
    simulation = simulate(schedule, Costs(**{**vars(even), **given_times}))
    flat = [(device, task) for device, order in enumerate(schedule.orders) for task in order]
    number = {(task.kind is Kind.F, task.stage, task.microbatch): i for i, (_, task) in enumerate(flat)
              if task.kind is not Kind.W}  # fmt: skip
    edges = [(i, i + 1, 0.0) for i in range(len(flat) - 1) if flat[i][0] == flat[i + 1][0]]
    for i, (device, task) in enumerate(flat):
        forward = task.kind is Kind.F
        before = number.get((forward, task.stage - 1 if forward else task.stage + 1, task.microbatch))
        if before is not None and task.kind is not Kind.W:
            edges.append((before, i, comm if flat[before][0] != device else 0.0))
    lengths = [simulation.costs.durations(task.kind)[task.stage] for _, task in flat]
    starts = [0.0] * len(flat)
    changed = True
    while changed:
        changed = False
        for source, target, delay in edges:
            earliest = starts[source] + lengths[source] + delay
            if earliest > starts[target]:
                starts[target] = earliest
                changed = True
    assert [start for of_device in simulation.starts for start in of_device] == starts
    assert simulation.makespan == max(start + length for start, length in zip(starts, lengths, strict=True))


@pytest.mark.parametrize(("p", "m"), PAIRS)
@pytest.mark.parametrize("times", [{}, {"f": 2.0, "i": 3.0, "w": 1.0}])
def test_gpipe_idles_for_its_share(p, m, times):
    assert run("gpipe", p, m, **times).bubble_share == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@pytest.mark.parametrize(("p", "m"), PAIRS)
@pytest.mark.parametrize(("f", "i", "w"), [(1, 1, 1), (2, 3, 1), (3, 3, 2), (1, 1, 0.5), (3, 4, 3)])
def test_bubbles_of_1f1b_and_of_the_zero_bubble_paper(p, m, f, i, w):
    """(p-1)(F+I+W), (p-1)(F+I-W) and (p-1)(F+I-2W) within each device's span; at unit costs 3(p-1), p-1 and 0."""
    times = {"f": f, "i": i, "w": w}
    work = m * (f + i + w)
    assert run("1f1b", p, m, **times).bubble_time == (p - 1) * (f + i + w)
    assert run("1f1b", p, m, **times).makespan == work + (p - 1) * (f + i + w)
    m = max(m, 2 * p - 1)
    work = m * (f + i + w)
    assert run("zb_h1", p, m, **times).bubble_time == (p - 1) * (f + i - w)
    assert run("zb_h2", p, m, **times).bubble_time == (p - 1) * (f + i - 2 * w)
    if f == i == w:
        assert run("zb_h1", p, m).makespan == run("zb_h2", p, m).makespan == work + p - 1


@pytest.mark.parametrize(("p", "m"), [pair for pair in PAIRS if pair[1] % pair[0] == 0])
@pytest.mark.parametrize("v", [2, 4])
@pytest.mark.parametrize("name", ["interleaved_1f1b", "breadth_first"])
def test_interleaving_divides_the_bubble(name, p, m, v):
    simulation = run(name, p, m, chunks=v, f=1, i=1.5, w=0.5)
    assert simulation.bubble_time == (p - 1) * 3 / v
    assert simulation.makespan == 3 * m + (p - 1) * 3 / v


@pytest.mark.parametrize(("p", "m"), PAIRS)
def test_peaks_of_activations(p, m):
    assert run("gpipe", p, m).peak_activations == [m] * p
    assert run("1f1b", p, m).peak_activations == [min(m, p - rank) for rank in range(p)]
    assert run("zb_h1", p, m).peak_activations == [min(m, p)] * p
    assert run("zb_h2", p, m).peak_activations == [min(m, 2 * p - 1)] * p
    assert run("breadth_first", p, m, chunks=3).peak_activations == [3 * m] * p


def test_breadth_first_gathers_once_whatever_the_microbatches():
    """The paper's count: one gather forward, one backward, one reduction for each stage; depth-first grows with m."""
    for m in (4, 8, 32):
        assert collectives(build("breadth_first", 4, m)) == ([2] * 8, [1] * 8)
        gathers, reductions = collectives(build("interleaved_1f1b", 4, m))
        assert min(gathers) >= m / 2
        assert min(reductions) >= m / 4
    assert collectives(build("1f1b", 4, 8))[0][3] == 16


def test_costs_must_fit():
    schedule = build("gpipe", 2, 2)
    with pytest.raises(UsageError, match="costs of 3 stages do not fit a schedule of 2"):
        simulate(schedule, Costs.even(build("gpipe", 3, 2)))
    with pytest.raises(UsageError, match="forward of stage 0 is -1"):
        Costs.even(schedule, forward=-1)
    with pytest.raises(UsageError, match="weight_grad of stage 0 is nan"):
        Costs.even(schedule, weight_grad=float("nan"))
    with pytest.raises(UsageError, match="different numbers of stages"):
        Costs((1.0,), (1.0, 1.0), (1.0,), (1.0,), (1.0,), (1.0,))
    for link in ({"latency": -1}, {"latency": float("inf")}, {"bandwidth": 0}, {"bandwidth": float("nan")}):
        with pytest.raises(UsageError, match="a link has"):
            Link(**link)


def test_a_deadlock_is_no_result():
    stuck = Schedule(looped(2), ((Task(Kind.B, 0, 0), Task(Kind.F, 0, 0)), (Task(Kind.F, 1, 0), Task(Kind.B, 1, 0))), 1)
    with pytest.raises(ScheduleError, match="deadlock"):
        simulate(stuck, Costs.even(stuck))


def test_no_work_takes_no_time():
    simulation = run("1f1b", 2, 2, f=0, i=0, w=0)
    assert (simulation.makespan, simulation.bubble_share, simulation.bubble_time) == (0, 0, 0)


def _work(microbatches: int, devices: int) -> int:
    schedule = build("interleaved_1f1b", devices, microbatches)
    costs = Costs.even(schedule)
    return lines(lambda: simulate(schedule, costs))


def test_work_grows_linearly():
    """Eight times the microbatches, or the devices, are at most nine times the work (quadratic would be 64)."""
    few = _work(16, 4)
    assert _work(128, 4) < 9 * few
    assert _work(128, 32) < 9 * _work(128, 4)


def test_an_overlapped_pair_by_hand():
    """F of microbatch 1 beside B of microbatch 0: both wait for both inputs, take 0.5 of F + B, and end together."""
    orders = (
        (
            Task(Kind.F, 0, 0),
            Task(Kind.F, 0, 1),
            Task(Kind.F, 0, 2),
            Task(Kind.B, 0, 0),
            Task(Kind.B, 0, 1),
            Task(Kind.B, 0, 2),
        ),
        (
            Task(Kind.F, 1, 0),
            Task(Kind.F, 1, 1),
            Task(Kind.B, 1, 0),
            Task(Kind.B, 1, 1),
            Task(Kind.F, 1, 2),
            Task(Kind.B, 1, 2),
        ),
    )
    schedule = Schedule(looped(2), orders, 3, overlapped=frozenset({Task(Kind.F, 1, 1), Task(Kind.F, 0, 2)}))
    validate(schedule)
    times = Times(forward=2.0, input_grad=1.0, weight_grad=1.0, overlap=0.5)
    simulation = simulate(schedule, times.costs(schedule))
    assert list(zip(simulation.starts[1], simulation.ends[1], strict=True))[:4] == [(2, 4), (4, 5), (5, 6), (6, 8)]
    # Its pair of F2 and B0 begins when B0 of the second device has ended with its own pair, and F2 is there at its end.
    assert list(zip(simulation.starts[0], simulation.ends[0], strict=True)) == [
        (0, 2),
        (2, 4),
        (6, 7),
        (7, 8),
        (8, 10),
        (12, 14),
    ]
    assert simulation.starts[1][4] == 8
    assert simulation.busy == [10, 10]
    assert simulation.longest_span == 14
