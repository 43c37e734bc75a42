"""A timeline as an SVG picture for documents: small, sharp, and the same text on every machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from penstock.pipeline.draw.palette import HUES, NAMES, colours, key
from penstock.pipeline.ir.schedule import Kind
from penstock.pipeline.simulate.simulator import Simulation

#: Pixels: of the picture's width, of a row, and of the margin with a device's number.
WIDTH, ROW, MARGIN = 960, 24, 28


def svg(*simulations: Simulation, titles: Sequence[str] = ()) -> str:
    """The picture: a row for each device, a block for each task with its microbatch, and a legend.

    Several simulations stand below each other on one scale of time. ``titles``, one for each, are rows above them.
    """
    scale = (WIDTH - MARGIN) / (max(simulation.makespan for simulation in simulations) or 1.0)
    lines: list[str] = []
    top = 0
    for simulation, title in zip(simulations, titles or [""] * len(simulations), strict=True):
        if title:
            lines.append(f'<text x="{MARGIN}" y="{top + 16}" text-anchor="start">{escape(title)}</text>')
            top += ROW
        lines += _devices(simulation, top, scale)
        top += ROW * simulation.schedule.devices
    kinds = sorted({task.kind for simulation in simulations for _, task in simulation.tasks()})
    width = min(150.0, (WIDTH - MARGIN) / max(1, len(kinds)))
    for column, kind in enumerate(kinds):
        lines += _legend(kind, round(MARGIN + width * column), top)
    height = top + ROW
    opening = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="11" text-anchor="middle">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    return "\n".join([*opening, *lines, "</svg>"]) + "\n"


def _devices(simulation: Simulation, top: int, scale: float) -> Iterator[str]:
    """The rows of a simulation, from ``top`` on."""
    schedule = simulation.schedule
    shades = colours(schedule)
    for device, order in enumerate(schedule.orders):
        y = top + device * ROW
        yield f'<text x="{MARGIN / 2:g}" y="{y + 16}">{device}</text>'
        for task, start, end in zip(order, simulation.starts[device], simulation.ends[device], strict=True):
            x, width = MARGIN + start * scale, (end - start) * scale
            yield (
                f'<rect x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="{ROW - 4}" fill="{shades[key(task)]}" '
                f'stroke="#fff" stroke-width="0.5"><title>{task}</title></rect>'
            )
            if width >= 7 * len(str(task.microbatch)):
                yield f'<text x="{x + width / 2:.1f}" y="{y + 16}">{task.microbatch}</text>'


def _legend(kind: Kind, left: int, top: int) -> list[str]:
    red, green, blue = HUES[kind]
    return [
        f'<rect x="{left}" y="{top + 5}" width="14" height="14" fill="rgb({red},{green},{blue})"/>',
        f'<text x="{left + 20}" y="{top + 16}" text-anchor="start">{kind.name}, {NAMES[kind]}</text>',
    ]
