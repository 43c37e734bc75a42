"""A timeline as an SVG picture for documents: small, sharp, and the same text on every machine."""

from __future__ import annotations

from penstock.pipeline.ir import Kind
from penstock.pipeline.palette import HUES, NAMES, colours, key
from penstock.pipeline.simulator import Simulation

#: Pixels: of the picture's width, of a device's row, and of the margin with its number.
WIDTH, ROW, MARGIN = 960, 24, 28


def svg(simulation: Simulation) -> str:
    """The picture: a row for each device, a block for each task with its microbatch, and a legend."""
    schedule = simulation.schedule
    scale = (WIDTH - MARGIN) / (simulation.makespan or 1.0)
    shades = colours(schedule)
    height = ROW * (schedule.devices + 1)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="11" text-anchor="middle">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for device, order in enumerate(schedule.orders):
        top = device * ROW
        lines.append(f'<text x="{MARGIN / 2:g}" y="{top + 16}">{device}</text>')
        for task, start, end in zip(order, simulation.starts[device], simulation.ends[device], strict=True):
            x, width = MARGIN + start * scale, (end - start) * scale
            lines.append(
                f'<rect x="{x:.1f}" y="{top + 2}" width="{width:.1f}" height="{ROW - 4}" fill="{shades[key(task)]}" '
                f'stroke="#fff" stroke-width="0.5"><title>{task}</title></rect>'
            )
            if width >= 7 * len(str(task.microbatch)):
                lines.append(f'<text x="{x + width / 2:.1f}" y="{top + 16}">{task.microbatch}</text>')
    kinds = sorted({task.kind for order in schedule.orders for task in order})
    width = min(150.0, (WIDTH - MARGIN) / max(1, len(kinds)))
    for column, kind in enumerate(kinds):
        lines += _legend(kind, round(MARGIN + width * column), ROW * schedule.devices)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _legend(kind: Kind, left: int, top: int) -> list[str]:
    red, green, blue = HUES[kind]
    return [
        f'<rect x="{left}" y="{top + 5}" width="14" height="14" fill="rgb({red},{green},{blue})"/>',
        f'<text x="{left + 20}" y="{top + 16}" text-anchor="start">{kind.name}, {NAMES[kind]}</text>',
    ]
