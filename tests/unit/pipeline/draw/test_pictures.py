"""Timelines in the terminal, as a page, as a picture and as a trace show what was simulated."""

from __future__ import annotations

import io
import json
import re

import matplotlib.image
import pytest

from penstock.pipeline.draw.figure import png
from penstock.pipeline.draw.page import page
from penstock.pipeline.draw.palette import colours
from penstock.pipeline.draw.terminal import legend, timeline
from penstock.pipeline.draw.trace import trace_events
from penstock.pipeline.ir.schedule import Kind
from penstock.pipeline.simulate.simulator import Costs, Link, Simulation, simulate
from penstock.policy import create


def run(name: str, p: int, m: int, **costs: float) -> Simulation:
    schedule = create("pipeline.schedule", name).build(p, m)
    return simulate(schedule, Costs.even(schedule, **costs))


def test_a_timeline_in_text():
    """1F1B on two devices: its 12 units of time, at three columns each, are the most that fit into 40."""
    assert timeline(run("1f1b", 2, 3), width=40).plain.splitlines() == [
        "0  F0 F1 ······B0    F2 B1    ···B2    ",
        "1  ···F0 B0    F1 B1    F2 B2    ······",
    ]


@pytest.mark.parametrize("width", [1, 10, 37, 200])
@pytest.mark.parametrize("name", ["gpipe", "interleaved_1f1b", "v_half", "bitpipe"])
def test_timelines_fit_the_width_and_show_shares_of_time(name, width):
    simulation = run(name, 4, 8)
    lines = timeline(simulation, width).plain.splitlines()
    assert len(lines) == 4
    columns = {len(line) for line in lines}
    assert len(columns) == 1
    assert max(columns) <= max(width, 4)
    if width == 200:
        columns = len(lines[0]) - 3
        for device, line in enumerate(lines):
            idle = line[3:].count("·") / columns
            assert idle == pytest.approx(1 - simulation.busy[device] / simulation.makespan, abs=1e-9)
            assert re.findall(r"([FIWB])(\d+)", line[3:]) == [
                (task.kind.name, str(task.microbatch)) for task in simulation.schedule.orders[device]
            ]


def test_a_column_shows_what_runs_at_its_middle():
    simulation = run("v_min", 3, 7, forward=1.1, input_grad=1.3, weight_grad=0.7)
    width = 43
    for device, line in enumerate(timeline(simulation, width).plain.splitlines()):
        columns = line[3:]
        spans = list(zip(simulation.starts[device], simulation.ends[device], strict=True))
        for column, shown in enumerate(columns):
            middle = (column + 0.5) * simulation.makespan / len(columns)
            assert (shown == "·") == (not any(start <= middle < end for start, end in spans)), (device, column)


def test_the_legend_names_the_kinds_that_are_there():
    assert legend(run("zb_h1", 2, 2)).plain == " F  forward   I  input gradient   W  weight gradient  · idle"
    assert "backward" in legend(run("gpipe", 2, 2)).plain


def test_no_work_is_drawn_too():
    nothing = run("1f1b", 2, 2, forward=0, input_grad=0, weight_grad=0)
    assert len(timeline(nothing, 80).plain.splitlines()) == 2
    assert png(nothing, "nothing").startswith(b"\x89PNG")
    assert "nothing" in page(nothing, "nothing")


def test_chunks_differ_in_colour():
    schedule = create("pipeline.schedule", "bitpipe").build(4, 4)
    shades = colours(schedule)
    for device in range(4):
        own = [
            shades[kind, stage, replica]
            for stage, devices in enumerate(schedule.placement)
            for replica, home in enumerate(devices)
            if home == device
            for kind in (Kind.F, Kind.B)
        ]
        assert len(set(own)) == 8
    assert all(re.fullmatch("#[0-9a-f]{6}", shade) for shade in shades.values())


def test_the_page_holds_the_timeline_and_needs_nothing_else():
    simulation = run("v_half", 3, 5, link=Link(latency=0.5))
    text = page(simulation, "</title><script>alert(1)</script>")
    assert "<script>alert" not in text
    assert not re.search(r"https?:|<link|<img|src=|@import", text)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["makespan"] == simulation.makespan
    for device, shown in enumerate(data["devices"]):
        assert [task[0] for task in shown["tasks"]] == [str(task) for task in simulation.schedule.orders[device]]
        assert [task[2] for task in shown["tasks"]] == simulation.starts[device]
        assert [task[3] for task in shown["tasks"]] == simulation.ends[device]
        assert all(0 <= task[4] < len(data["colours"]) for task in shown["tasks"])
        assert max(held for _, held in shown["memory"]) == simulation.peak_bytes[device]


def test_the_picture_shows_the_colours_of_the_tasks():
    """On the row of device 0, about as many pixels have the forward's colour as its share of the time says."""
    simulation = run("gpipe", 2, 4)
    pixels = matplotlib.image.imread(io.BytesIO(png(simulation, "gpipe")))[..., :3]
    wanted = [int(colours(simulation.schedule)[Kind.F, 0, 0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    forward = (abs(pixels - wanted) < 0.01).all(-1)
    row = forward.sum(1)[: len(pixels) // 3].max()
    assert row / pixels.shape[1] == pytest.approx(4 / 15, abs=0.05)


def test_the_trace_holds_every_task_in_microseconds():
    simulation = run("zb_h2", 2, 3)
    events = json.loads(json.dumps(trace_events(simulation, "zb_h2")))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    for device, order in enumerate(simulation.schedule.orders):
        own = [event for event in spans if event["tid"] == device]
        assert [event["name"] for event in own] == [str(task) for task in order]
        assert [event["ts"] for event in own] == [1e6 * start for start in simulation.starts[device]]
        assert all(event["dur"] == 1e6 for event in own)
        held = [e["args"]["held"] for e in events if e["name"] == f"activations of device {device}"]
        assert max(held) == simulation.peak_bytes[device]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["zb_h2", "device 0", "device 1"]
