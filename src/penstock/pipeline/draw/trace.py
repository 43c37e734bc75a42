"""A timeline in the trace-event format that Perfetto and ``chrome://tracing`` open."""

from __future__ import annotations

from typing import Any

from penstock.pipeline.draw.palette import NAMES
from penstock.pipeline.simulate.simulator import Simulation


def trace_events(simulation: Simulation, title: str) -> dict[str, Any]:
    """A thread for each device, a complete event for each task, and a counter of activations for each device.

    Times are in microseconds, as the format wants them, for costs in seconds.
    """
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": title}}]
    for device, order in enumerate(simulation.schedule.orders):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": device, "args": {"name": f"device {device}"}})
        for task, start, end in zip(order, simulation.starts[device], simulation.ends[device], strict=True):
            arguments = {"stage": task.stage, "microbatch": task.microbatch, "replica": task.replica}
            span = {"ts": 1e6 * start, "dur": 1e6 * (end - start)}
            events.append(
                {"ph": "X", "name": str(task), "cat": NAMES[task.kind], "pid": 0, "tid": device, **span}
                | {"args": arguments}
            )
        events += [
            {"ph": "C", "name": f"activations of device {device}", "pid": 0, "ts": 1e6 * time, "args": {"held": size}}
            for time, size in simulation.memory(device)
        ]
    return {"displayTimeUnit": "ms", "traceEvents": events}
