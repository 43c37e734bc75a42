"""A timeline as an SVG picture for documents: small, sharp, and the same text on every machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from penstock.pipeline.draw.blocks import Block, blocks, joined, messages
from penstock.pipeline.draw.palette import HUES, NAMES, chunked, colours, key
from penstock.pipeline.ir.schedule import Kind
from penstock.pipeline.simulate.simulator import Simulation

#: Pixels: of the picture's width, of a row and its block, and of the margin with a device's number.
WIDTH, ROW, BLOCK, MARGIN = 960, 24, 20, 28

#: Pixels of a block's width below which it has no edge, which would cover it.
EDGED = 3

#: In a browser, the picture is light or dark as the reader's other windows are.
STYLE = """<style>
.paper{fill:#fff} .idle{fill:#eef0f3} .name{fill:#23272f} .number{fill:#14171c} .edge{stroke:#fff;stroke-width:.7}
.message{stroke:#23272f;stroke-width:.7;opacity:.6}
@media (prefers-color-scheme:dark){
.paper{fill:#14171c} .idle{fill:#262b33} .name{fill:#e8ebf0} .edge{stroke:#14171c} .message{stroke:#e8ebf0}}
</style>"""


def svg(*simulations: Simulation, titles: Sequence[str] = ()) -> str:
    """The picture: a row for each device, a block for each task with its microbatch, and a legend.

    Of an overlapped pair, the forward is above the backward. Messages that take time are lines from the end of a task
    to their arrival. Several simulations stand below each other on one scale of time. ``titles``, one for each, are
    rows above them.
    """
    scale = (WIDTH - MARGIN) / (max(simulation.makespan for simulation in simulations) or 1.0)
    lines: list[str] = []
    top = 0
    for simulation, title in zip(simulations, titles or [""] * len(simulations), strict=True):
        if title:
            lines.append(f'<text class="name" x="{MARGIN}" y="{top + 16}" text-anchor="start">{escape(title)}</text>')
            top += ROW
        lines += _devices(simulation, top, scale)
        lines += _messages(simulation, top, scale)
        top += ROW * simulation.schedule.devices
    lines += _legend(simulations, top)
    height = top + ROW
    opening = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="11" text-anchor="middle">',
        STYLE,
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
    ]
    return "\n".join([*opening, *lines, "</svg>"]) + "\n"


def _devices(simulation: Simulation, top: int, scale: float) -> Iterator[str]:
    """The rows of a simulation, from ``top`` on."""
    shades = colours(simulation.schedule)
    for device in range(simulation.schedule.devices):
        y = top + device * ROW
        yield f'<text class="name" x="{MARGIN / 2:g}" y="{y + 16}">{device}</text>'
        yield (
            f'<rect class="idle" x="{MARGIN}" y="{y + 2}" width="{simulation.makespan * scale:.1f}" height="{BLOCK}"/>'
        )
        own = blocks(simulation, device)
        for block, join in zip(own, joined(own), strict=True):
            yield from _block(block, y + 2, scale, shades[key(block.task)], join)


def _block(block: Block, y: float, scale: float, shade: str, join: bool) -> Iterator[str]:
    x, width, height = MARGIN + block.start * scale, (block.end - block.start) * scale, BLOCK
    if block.lane >= 0:
        height //= 2
        y += height * block.lane
    edge = 'class="edge" ' if width >= EDGED else ""
    reach = 0.5 if join and not edge else 0.0
    yield (
        f'<rect {edge}x="{x:.1f}" y="{y:g}" width="{width + reach:.1f}" height="{height}" fill="{shade}">'
        f"<title>{block.task}</title></rect>"
    )
    if width >= 7 * len(str(block.task.microbatch)):
        size = ' font-size="9"' if block.lane >= 0 else ""
        middle = y + height / 2 + (4 if block.lane < 0 else 3)
        yield f'<text class="number"{size} x="{x + width / 2:.1f}" y="{middle:g}">{block.task.microbatch}</text>'


def _messages(simulation: Simulation, top: int, scale: float) -> Iterator[str]:
    for source, _, target, _, sent, arrives in messages(simulation):
        if arrives > sent:
            ends = [top + 2 + ROW * source, top + 2 + ROW * target]
            ends[source > target] += BLOCK  # from the lower edge of the upper device to the upper edge of the lower one
            yield (
                f'<line class="message" x1="{MARGIN + sent * scale:.1f}" y1="{ends[0]}" '
                f'x2="{MARGIN + arrives * scale:.1f}" y2="{ends[1]}"/>'
            )


def _legend(simulations: Sequence[Simulation], top: int) -> Iterator[str]:
    kinds = sorted({task.kind for simulation in simulations for _, task in simulation.tasks()})
    entries = [(f'fill="rgb{HUES[Kind(kind)]}"', f"{Kind(kind).name}, {NAMES[kind]}") for kind in kinds]
    entries.append(('class="idle"', "idle"))
    if any(chunked(simulation.schedule.placement) for simulation in simulations):
        entries.append(('fill="none"', "lighter: later chunks"))
    if any(found.arrives > found.sent for simulation in simulations for found in messages(simulation)):
        entries.append(('fill="none"', "lines: messages"))
    width = min(150.0, (WIDTH - MARGIN) / len(entries))
    for column, (fill, text) in enumerate(entries):
        left = round(MARGIN + width * column)
        yield f'<rect {fill} x="{left}" y="{top + 5}" width="14" height="14"/>'
        yield f'<text class="name" x="{left + 20}" y="{top + 16}" text-anchor="start">{text}</text>'
