"""What is drawn is what was simulated: pairs, memory at every moment, and every message."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from penstock.pipeline.draw.blocks import blocks, curve, joined, messages
from penstock.pipeline.ir.schedule import Kind, Schedule
from penstock.pipeline.simulate.simulator import Costs, Link, Simulation, simulate
from penstock.policy import create


def run(name: str, p: int, m: int, *, overlap: float = 1.0, transforms: tuple[str, ...] = (), **costs) -> Simulation:
    schedule = create("pipeline.schedule", name).build(p, m)
    for transform in transforms:
        schedule = create("pipeline.transform", transform).apply(schedule)
    return simulate(schedule, dataclasses.replace(Costs.even(schedule, **costs), overlap=overlap))


def held_at(simulation: Simulation, device: int, time: float) -> float:
    """Bytes that a device holds at a time, counted task by task."""
    costs, total = simulation.costs, 0.0
    own = zip(simulation.schedule.orders[device], simulation.starts[device], simulation.ends[device], strict=True)
    for task, start, end in own:
        whole, left = costs.activation[task.stage], costs.deferred[task.stage]
        if task.kind is Kind.F:
            total += whole * (start <= time)
            gone, back = simulation.away.get((task.stage, task.microbatch), (0.0, 0.0))
            total -= whole * (gone <= time < back)
        else:
            total -= {Kind.I: whole - left, Kind.W: left, Kind.B: whole}[task.kind] * (end <= time)
    return total


@pytest.mark.parametrize(
    ("name", "transforms", "overlap"),
    [
        ("1f1b", (), 1.0),
        ("zb_h1", (), 1.0),
        ("v_half", (), 1.0),
        ("dualpipe", (), 0.7),
        ("1f1b", ("pipeoffload",), 1.0),
    ],
)
def test_the_curve_is_the_memory_at_every_moment(name, transforms, overlap):
    """At the beginning of every task, between all of them, and never more than one value at a time."""
    simulation = run(name, 4, 12, overlap=overlap, transforms=transforms, forward=0.9, input_grad=1.1, activation=3.0)
    for device in range(4):
        steps = curve(simulation, device)
        times = [time for time, _ in steps]
        assert times == sorted(set(times))
        moments = sorted({0.0, *simulation.starts[device], *simulation.ends[device], *times})
        moments += [(a + b) / 2 for a, b in itertools.pairwise(moments) if b - a > 1e-9]
        for moment in moments:
            drawn = [size for time, size in steps if time <= moment][-1]
            assert drawn == pytest.approx(held_at(simulation, device, moment), abs=1e-9), moment
        assert max(size for _, size in steps) == pytest.approx(simulation.peak_bytes[device])
        assert steps[-1][1] == 0.0


def test_a_steady_device_has_no_spikes():
    """The last device of 1F1B holds one activation from its first task to its last, though each B frees it and the
    next F, at the same time, allocates another one."""
    assert curve(run("1f1b", 4, 16), 3) == [(0.0, 0.0), (3.0, 1.0), (51.0, 0.0)]


@pytest.mark.parametrize("name", ["zb_h1", "zb_auto", "v_half", "interleaved_1f1b"])
def test_rounded_times_make_no_spikes(name):
    """A message comes just when the device is free, but for the last bits of two sums of tenths."""
    simulation = run(name, 4, 8, link=Link(latency=0.1))
    close = 0
    for device in range(4):
        times = [time for time, _ in curve(simulation, device)]
        assert min(after - before for before, after in itertools.pairwise(times)) > 1e-6
        drawn = blocks(simulation, device)
        pauses = [after.start - before.end for before, after in itertools.pairwise(drawn)]
        assert joined(drawn)[:-1] == [pause < 1e-6 for pause in pauses]
        close += sum(0 < pause < 1e-6 for pause in pauses)
    assert close, "no two times differ by rounding"


def test_the_two_of_a_pair_have_one_time():
    simulation = run("dualpipev", 4, 8, overlap=0.75)
    found = 0
    for device, order in enumerate(simulation.schedule.orders):
        drawn = blocks(simulation, device)
        assert [block.task for block in drawn] == list(order)
        for first, second in itertools.pairwise(drawn):
            if first.task in simulation.schedule.overlapped:
                found += 1
                assert (first.lane, second.lane) == (0, 1)
                assert first[1:3] == second[1:3]
                alone = sum(simulation.costs.durations(block.task.kind)[block.task.stage] for block in (first, second))
                assert first.end - first.start == pytest.approx(0.75 * alone)
        assert sum(b.end - b.start for b in drawn if b.lane != 1) == pytest.approx(simulation.busy[device])
    assert found == len(simulation.schedule.overlapped) > 0


def test_a_pair_that_ran_one_after_the_other_is_drawn_so():
    """As in a measured run, whose tasks have a pause between them."""
    simulation = run("dualpipev", 2, 4)
    apart = tuple([start + 1e-4 * number for number, start in enumerate(own)] for own in simulation.starts)
    ends = tuple([end + 1e-4 * number for number, end in enumerate(own)] for own in simulation.ends)
    real = dataclasses.replace(simulation, starts=apart, ends=ends)
    assert {block.lane for device in range(2) for block in blocks(real, device)} == {-1}


def described(schedule: Schedule) -> set[tuple[str, str]]:
    """The (maker, reader) on different devices, from what stages are."""
    home = {(task.stage, task.microbatch): device for device, order in enumerate(schedule.orders) for task in order}
    tasks = {(task.kind, task.stage, task.microbatch): str(task) for order in schedule.orders for task in order}
    found = set()
    for microbatch in range(schedule.microbatches):
        for stage in range(schedule.stages - 1):
            if home[stage, microbatch] != home[stage + 1, microbatch]:
                found.add((tasks[Kind.F, stage, microbatch], tasks[Kind.F, stage + 1, microbatch]))
                backward = [
                    tasks.get((Kind.I, s, microbatch)) or tasks[Kind.B, s, microbatch] for s in (stage + 1, stage)
                ]
                found.add((backward[0], backward[1]))
    return found


@pytest.mark.parametrize(("name", "overlap"), [("1f1b", 1.0), ("zb_h1", 1.0), ("hanayo", 1.0), ("dualpipev", 0.8)])
def test_every_message_is_there_and_takes_its_time(name, overlap):
    simulation = run(name, 4, 8, overlap=overlap, link=Link(latency=0.25))
    drawn = [blocks(simulation, device) for device in range(4)]
    found = set()
    for source, maker, target, reader, sent, arrives in messages(simulation):
        assert source != target
        made, read = drawn[source][maker], drawn[target][reader]
        found.add((str(made.task), str(read.task)))
        assert sent == made.end
        assert arrives == pytest.approx(sent + 0.25)
        assert arrives <= read.start + 1e-9
    assert found == described(simulation.schedule)
    assert len(found) == simulation.transfers


def test_joined_blocks_have_no_pause_between_them():
    drawn = blocks(run("1f1b", 2, 3), 0)
    assert [str(block.task) for block, join in zip(drawn, joined(drawn), strict=True) if not join] == [
        "0F1",
        "0B1",
        "0B2",
    ]
