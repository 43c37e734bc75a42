"""Timelines in the terminal, as a page, as a picture and as a trace show what was simulated."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import matplotlib.image
import pytest

from penstock.pipeline.draw.blocks import blocks, curve, messages
from penstock.pipeline.draw.figure import png
from penstock.pipeline.draw.page import page
from penstock.pipeline.draw.palette import colours, key
from penstock.pipeline.draw.svg import MARGIN, WIDTH, svg
from penstock.pipeline.draw.terminal import legend, timeline
from penstock.pipeline.draw.trace import trace_events
from penstock.pipeline.ir.schedule import Kind
from penstock.pipeline.simulate.simulator import Costs, Link, Simulation, simulate
from penstock.policy import create


def run(name: str, p: int, m: int, *, overlap: float = 1.0, **costs: Any) -> Simulation:
    schedule = create("pipeline.schedule", name).build(p, m)
    return simulate(schedule, dataclasses.replace(Costs.even(schedule, **costs), overlap=overlap))


def test_a_timeline_in_text():
    """1F1B on two devices: its 12 units of time, at three columns each, are the most that fit into 40."""
    assert timeline(run("1f1b", 2, 3), width=40).plain.splitlines() == [
        "0  F0 F1 ······B0    F2 B1    ···B2    ",
        "1  ···F0 B0    F1 B1    F2 B2    ······",
    ]


@pytest.mark.parametrize("width", [1, 10, 37, 200])
@pytest.mark.parametrize("name", ["gpipe", "interleaved_1f1b", "v_half", "bitpipe"])
def test_timelines_fit_the_width_and_name_every_task_where_there_is_room(name, width):
    simulation = run(name, 4, 8)
    lines = timeline(simulation, width).plain.splitlines()
    assert len(lines) == 4
    columns = {len(line) for line in lines}
    assert len(columns) == 1
    assert max(columns) <= max(width, 4)
    if width == 200:
        for device, line in enumerate(lines):
            assert re.findall(r"([FIWB])(\d+)", line[3:]) == [
                (task.kind.name, str(task.microbatch)) for task in simulation.schedule.orders[device]
            ]


#: What the halves of a column show. All other characters are of blocks.
HALVES = {"·": (0, 0), "▌": (1, 0), "▐": (0, 1)}

SHOWN = [
    ("1f1b", 8, 64, {}),
    ("1f1b", 16, 128, {}),
    ("gpipe", 4, 40, {"forward": 0.37, "input_grad": 0.61}),
    ("v_min", 3, 7, {"forward": 1.1, "input_grad": 1.3, "weight_grad": 0.7}),
    ("zb_h1", 6, 30, {"link": Link(latency=0.3)}),
    ("dualpipev", 4, 16, {"overlap": 0.8, "link": Link(latency=0.3)}),
]


def busy_until(simulation: Simulation, device: int, time: float) -> float:
    """The time until then in which a device has a task, counted from the simulation alone."""
    spans = zip(simulation.starts[device], simulation.ends[device], strict=True)
    return sum(max(0.0, min(end, time) - start) for start, end in spans)


@pytest.mark.parametrize("width", [12, 43, 101])
@pytest.mark.parametrize(("name", "p", "m", "costs"), SHOWN)
def test_a_timeline_draws_devices_busy_for_as_long_as_they_are(name, p, m, costs, width):
    """Until every half column, to half of one; and nothing where there is nothing, no gap where there is none."""
    simulation = run(name, p, m, **costs)
    for device, line in enumerate(timeline(simulation, width).plain.splitlines()):
        halves = [half for sign in line[len(str(p - 1)) + 2 :] for half in HALVES.get(sign, (1, 1))]
        size = simulation.makespan / len(halves)
        for number, shown in enumerate(halves):
            before, after = (busy_until(simulation, device, size * edge) / size for edge in (number, number + 1))
            assert abs(sum(halves[: number + 1]) - after) <= 0.5 + 1e-4
            if after - before < 1e-9:
                assert not shown, (device, number)
            if after - before > 1 - 1e-9:
                assert shown, (device, number)


@pytest.mark.parametrize("width", [43, 101])
@pytest.mark.parametrize(("name", "p", "m", "costs"), SHOWN)
def test_a_column_has_the_colour_of_what_runs_in_it(name, p, m, costs, width):
    """And over the line each colour has the columns that its tasks' time makes, to a few."""
    simulation = run(name, p, m, **costs)
    shades = colours(simulation.schedule)
    text = timeline(simulation, width)
    begin, margin = 0, len(str(p - 1)) + 2
    for device, line in enumerate(text.plain.splitlines()):
        columns = len(line) - margin
        size = simulation.makespan / columns
        drawn = [set() for _ in range(columns)]
        for span in text.spans:
            for place in range(max(span.start - begin - margin, 0), min(span.end - begin - margin, columns)):
                drawn[place] |= set(re.findall("#[0-9a-f]{6}", str(span.style)))
        begin += len(line) + 1
        own = [(shades[key(block.task)], block.start, block.end, block.lane) for block in blocks(simulation, device)]
        for place, seen in enumerate(drawn):
            running = {c for c, start, end, _ in own if start < (place + 1) * size and end > place * size}
            assert seen <= running, (device, place)
        if not simulation.schedule.overlapped:
            for colour in {c for c, *_ in own}:
                wanted = sum(end - start for c, start, end, _ in own if c == colour) / size
                count = sum(colour in seen for seen in drawn)
                assert count == pytest.approx(wanted, abs=2.5 + 0.03 * columns), (device, colour)


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
        assert [task[2] for task in shown["tasks"]] == [t.microbatch for t in simulation.schedule.orders[device]]
        assert [task[3] for task in shown["tasks"]] == simulation.starts[device]
        assert [task[4] for task in shown["tasks"]] == simulation.ends[device]
        assert all(0 <= task[5] < len(data["colours"]) for task in shown["tasks"])
        assert max(held for _, held in shown["memory"]) == simulation.peak_bytes[device]
    assert len(data["messages"]) == simulation.transfers
    assert [[letter, *rest] for letter, rest in data["kinds"].items()] == [
        ["F", "forward", "#4285cc"],
        ["I", "input gradient", "#269677"],
        ["W", "weight gradient", "#e2aa3c"],
    ]


@pytest.mark.parametrize("overlap", [1.0, 0.6])
def test_the_vector_picture_has_every_task_at_its_time(overlap):
    """Read back: place and width of every block, the two of a pair above each other, and the messages."""
    simulation = run("dualpipev", 3, 6, overlap=overlap, link=Link(latency=0.5))
    tree = ElementTree.fromstring(svg(simulation))
    space = "{http://www.w3.org/2000/svg}"
    scale = (WIDTH - MARGIN) / simulation.makespan
    rects = {rect.find(f"{space}title").text: rect for rect in tree.iter(f"{space}rect") if len(rect)}
    assert len(rects) == sum(map(len, simulation.schedule.orders))
    for device in range(3):
        for block in blocks(simulation, device):
            rect = rects[str(block.task)]
            assert float(rect.get("x")) == pytest.approx(MARGIN + block.start * scale, abs=0.06)
            assert float(rect.get("width")) == pytest.approx((block.end - block.start) * scale, abs=0.06)
            top = 24 * device + 2 + (10 if block.lane == 1 else 0)
            assert (float(rect.get("y")), float(rect.get("height"))) == (top, 20 if block.lane < 0 else 10)
    lines = [tuple(float(line.get(end)) for end in ("x1", "x2")) for line in tree.iter(f"{space}line")]
    assert len(lines) == simulation.transfers
    assert all(after - before == pytest.approx(0.5 * scale, abs=0.11) for before, after in lines)


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
        held = [(e["ts"] / 1e6, e["args"]["held"]) for e in events if e["name"] == f"activations of device {device}"]
        assert held == curve(simulation, device)
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["zb_h2", "device 0", "device 1"]


def test_the_trace_has_an_arrow_for_each_message():
    """From within the task that sends to within the one that reads, also where these overlap with others; and arrows
    of two traces in one file are not mixed up."""
    simulation = run("dualpipev", 4, 8, overlap=0.8, link=Link(latency=0.25))
    events = [event for process in (0, 1) for event in trace_events(simulation, "x", process)["traceEvents"]]
    slices = [event for event in events if event["ph"] == "X"]
    tails, heads = ({e["id"]: e for e in events if e["ph"] == phase} for phase in "sf")
    assert len(tails) == len(heads) == 2 * simulation.transfers
    assert tails.keys() == heads.keys()

    def ties(event: dict[str, Any]) -> str:
        (tied,) = [
            each["name"]
            for each in slices
            if (each["pid"], each["tid"]) == (event["pid"], event["tid"])
            and each["ts"] < event["ts"] < each["ts"] + each["dur"]
        ]
        return tied

    drawn = [blocks(simulation, device) for device in range(4)]
    wanted = {
        (str(drawn[message.source][message.maker].task), str(drawn[message.target][message.reader].task))
        for message in messages(simulation)
    }
    assert {(ties(tails[name]), ties(heads[name])) for name in tails if tails[name]["pid"] == 0} == wanted
    assert all(tails[name]["pid"] == heads[name]["pid"] for name in tails)


def test_the_slices_of_a_thread_do_not_overlap():
    """Which viewers cannot show: the backward of a pair and the copies to the host have threads of their own."""
    schedule = create("pipeline.transform", "pipeoffload").apply(create("pipeline.schedule", "1f1b").build(3, 9))
    offloaded = simulate(schedule, Costs.even(schedule))
    assert offloaded.away
    for simulation in (run("dualpipe", 4, 8, overlap=0.8), offloaded):
        threads: dict[int, list[tuple[float, float]]] = {}
        events = trace_events(simulation, "x")["traceEvents"]
        for event in events:
            if event["ph"] == "X":
                threads.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
        for spans in threads.values():
            assert all(end <= start + 1e-3 for (_, end), (start, _) in pairwise(sorted(spans)))
        named = {event["tid"] for event in events if event["name"] == "thread_name"}
        assert named == threads.keys()
        assert len(threads) > simulation.schedule.devices
