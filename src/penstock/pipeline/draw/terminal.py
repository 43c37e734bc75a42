"""A timeline in the terminal."""

from __future__ import annotations

from rich.text import Text

from penstock.pipeline.draw.palette import HUES, NAMES, colours, key
from penstock.pipeline.ir.schedule import Kind
from penstock.pipeline.simulate.simulator import Simulation


def timeline(simulation: Simulation, width: int) -> Text:
    """A line for each device, no wider than ``width``: blocks of colour with kind and microbatch, dots where it idles.

    Where there is room, the shortest task takes a whole number of columns; else each column shows what runs at its
    middle.
    """
    schedule = simulation.schedule
    margin = len(str(schedule.devices - 1)) + 2
    columns = _columns(simulation, max(1, width - margin))
    scale = (simulation.makespan or 1.0) / columns
    shades = colours(schedule)
    text = Text(no_wrap=True, overflow="crop")
    for device, order in enumerate(schedule.orders):
        text.append(f"{device:>{margin - 2}}  ")
        position = 0
        for task, start, end in zip(order, simulation.starts[device], simulation.ends[device], strict=True):
            # The columns whose middles lie within the task.
            first, after = (min(columns, max(position, round(time / scale))) for time in (start, end))
            text.append("·" * (first - position), style="bright_black")
            label = f"{task.kind.name}{task.microbatch}"
            room = after - first
            text.append(
                (label if len(label) <= room else label[:1])[:room].ljust(room), f"black on {shades[key(task)]}"
            )
            position = after
        text.append("·" * (columns - position) + "\n", style="bright_black")
    return text


def legend(simulation: Simulation) -> Text:
    """What the colours mean."""
    kinds = sorted({task.kind for order in simulation.schedule.orders for task in order})
    text = Text()
    for kind in kinds:
        text.append(f" {kind.name} ", f"black on rgb({','.join(map(str, HUES[kind]))})")
        text.append(f" {NAMES[kind]}  ")
    return text.append("· idle", "bright_black")


def _columns(simulation: Simulation, room: int) -> int:
    durations = [value for kind in Kind for value in simulation.costs.durations(kind) if value > 0]
    if not durations:
        return 1
    units = simulation.makespan / min(durations)
    return max(1, min(room, round(units * max(1, room // units))))
