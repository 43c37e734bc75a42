"""A timeline in the trace-event format that Perfetto and ``chrome://tracing`` open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from penstock.pipeline.draw.blocks import blocks, curve, messages
from penstock.pipeline.draw.palette import NAMES
from penstock.pipeline.simulate.simulator import Simulation

#: Of a task's time, how far from its end (or beginning) the arrow of a message is tied to it: viewers tie an arrow to
#: the slice that is there at its time, and at its very end there is none.
INSIDE = 1e-3


def trace_events(simulation: Simulation, title: str, process: int = 0) -> dict[str, Any]:
    """A thread for each device, a complete event for each task, an arrow for each message between devices, and a
    counter of activations for each device.

    The backwards of overlapped pairs have a thread of their own beside the device's, as have copies of activations to
    the host and back. Times are in microseconds, as the format wants them, for costs in seconds. Traces with different
    numbers of ``process`` can stand in one file.
    """
    events: list[dict[str, Any]] = [_named("process_name", title)]
    for device in range(simulation.schedule.devices):
        events += _device(simulation, device)
    events += _arrows(simulation, process)
    return {"displayTimeUnit": "ms", "traceEvents": [{"pid": process, **event} for event in events]}


def _named(what: str, name: str, **thread: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, **thread, "args": {"name": name}}


def _thread(simulation: Simulation, device: int, lane: int) -> int:
    """Its number: of the device's own (lanes -1 and 0), of the backwards beside it (1), of its host's copies (2, 3)."""
    return device + simulation.schedule.devices * max(0, lane)


def _slice(name: str, kind: str, thread: int, start: float, end: float, **arguments: Any) -> dict[str, Any]:
    span = {"ts": 1e6 * start, "dur": 1e6 * (end - start)}
    return {"ph": "X", "name": name, "cat": kind, "tid": thread, **span, "args": arguments}


def _device(simulation: Simulation, device: int) -> Iterator[dict[str, Any]]:
    """The threads of a device, with its tasks, and its memory."""
    own = blocks(simulation, device)
    yield _named("thread_name", f"device {device}", tid=device)
    if any(block.lane == 1 for block in own):
        yield _named("thread_name", f"device {device}, beside", tid=_thread(simulation, device, 1))
    for task, start, end, lane in own:
        arguments = {"stage": task.stage, "microbatch": task.microbatch, "replica": task.replica}
        yield _slice(str(task), NAMES[task.kind], _thread(simulation, device, lane), start, end, **arguments)
    yield from _host(simulation, device)
    for time, size in curve(simulation, device):
        yield {"ph": "C", "name": f"activations of device {device}", "ts": 1e6 * time, "args": {"held": size}}


def _host(simulation: Simulation, device: int) -> Iterator[dict[str, Any]]:
    """The copies of a device's activations to the host and back."""
    for lane, way in ((2, "to"), (3, "from")):
        thread = _thread(simulation, device, lane)
        copies = []
        for (stage, microbatch), (gone, back) in sorted(simulation.away.items()):
            if device in simulation.schedule.placement[stage]:
                seconds = simulation.costs.host.seconds(simulation.costs.activation[stage])
                start = gone - seconds if way == "to" else back
                arguments = {"stage": stage, "microbatch": microbatch}
                name = f"activations {stage}, {microbatch}"
                copies.append(_slice(name, f"{way} the host", thread, start, start + seconds, **arguments))
        if copies:
            yield _named("thread_name", f"device {device}, {way} the host", tid=thread)
            yield from copies


def _arrows(simulation: Simulation, process: int) -> Iterator[dict[str, Any]]:
    drawn = [blocks(simulation, device) for device in range(simulation.schedule.devices)]
    for number, (source, maker, target, reader, sent, _) in enumerate(messages(simulation)):
        made, read = drawn[source][maker], drawn[target][reader]
        arrow = {"name": "message", "cat": "message", "id": f"{process}-{number}"}
        time = sent - INSIDE * (made.end - made.start)
        yield {"ph": "s", **arrow, "tid": _thread(simulation, source, made.lane), "ts": 1e6 * time}
        time = read.start + INSIDE * (read.end - read.start)
        yield {"ph": "f", "bp": "e", **arrow, "tid": _thread(simulation, target, read.lane), "ts": 1e6 * time}
