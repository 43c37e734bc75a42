"""A timeline in the terminal."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

from rich.text import Text

from penstock.pipeline.draw.blocks import Block, blocks
from penstock.pipeline.draw.palette import HUES, NAMES, colours, key
from penstock.pipeline.ir.schedule import Kind
from penstock.pipeline.simulate.simulator import Simulation

#: Parts of a column that are busy or idle each.
HALVES = 2

IDLE, FULL, LEFT, RIGHT, BOTH = "·", "█", "▌", "▐", "▀"


def timeline(simulation: Simulation, width: int) -> Text:
    """A line for each device, no wider than ``width``: blocks of colour with kind and microbatch, dots where it idles.

    Where there is room, the shortest task takes a whole number of columns. At any width, up to every half column a
    device is drawn busy for as long as it was, to within half of a half column; a half that was busy throughout is
    drawn so, as is one that was idle throughout; and a column has the colour of a task that ran in it. An overlapped
    pair has the forward above and the backward below. Labels are for tasks that fill columns.
    """
    schedule = simulation.schedule
    margin = len(str(schedule.devices - 1)) + 2
    columns = _columns(simulation, max(1, width - margin))
    scale = (simulation.makespan or 1.0) / columns
    text = Text(no_wrap=True, overflow="crop")
    for device in range(schedule.devices):
        text.append(f"{device:>{margin - 2}}  ")
        for characters, style in _line(simulation, device, columns, scale):
            text.append(characters, style)
        text.append("\n")
    return text


def legend(simulation: Simulation) -> Text:
    """What the colours and signs mean."""
    kinds = sorted({task.kind for order in simulation.schedule.orders for task in order})
    text = Text()
    for kind in kinds:
        text.append(f" {kind.name} ", f"black on rgb({','.join(map(str, HUES[kind]))})")
        text.append(f" {NAMES[kind]}  ")
    if simulation.schedule.overlapped:
        text.append(BOTH, f"rgb({','.join(map(str, HUES[Kind.F]))}) on rgb({','.join(map(str, HUES[Kind.B]))})")
        text.append(" both at once  ")
    return text.append(f"{IDLE} idle", "bright_black")


def _line(simulation: Simulation, device: int, columns: int, scale: float) -> Iterator[tuple[str, str]]:
    """The characters of a device's line, each with its style, or several of one style."""
    shades = colours(simulation.schedule)
    owners = _owners(simulation, device, columns, scale)
    halves = _busy(blocks(simulation, device), columns, scale)
    number = 0
    for owner, run in itertools.groupby(owners):
        room = len(list(run))
        signs = [_sign(halves[HALVES * column : HALVES * (column + 1)]) for column in range(number, number + room)]
        number += room
        if owner is None:
            yield "".join(signs), "bright_black"
            continue
        first, *rest = ("on " + shades[key(block.task)] for block in owner)
        if rest:
            yield from _pair(owner, signs, first, rest[0])
            continue
        block = owner[0]
        if block.end - block.start < (1 - 1e-9) * scale:  # too small to be seen as a block
            yield "".join(signs), first[3:]
            continue
        full = [place for place, sign in enumerate(signs) if sign == FULL]
        name = f"{block.task.kind.name}{block.task.microbatch}"
        name = name if len(name) <= len(full) else name[:1]
        letters = dict(zip(full, name.ljust(len(full)), strict=False))
        for place, sign in enumerate(signs):
            yield (
                (letters[place], f"black {first}")
                if place in letters
                else (sign, first[3:] if sign != IDLE else "bright_black")
            )


def _pair(owner: tuple[Block, ...], signs: Sequence[str], first: str, second: str) -> Iterator[tuple[str, str]]:
    """An overlapped pair: the forward above the backward, and their names where there is room for both."""
    names = [f"{block.task.kind.name}{block.task.microbatch}" for block in owner]
    full = [sign == FULL for sign in signs]
    labelled = all(full) and len("".join(names)) < len(full)
    middle = signs[len(names[0]) : len(signs) - len(names[1])] if labelled else signs
    if labelled:
        yield names[0], f"black {first}"
    for sign in middle:
        yield (BOTH, f"{first[3:]} {second}") if sign == FULL else (sign, first[3:] if sign != IDLE else "bright_black")
    if labelled:
        yield names[1], f"black {second}"


def _sign(halves: Sequence[bool]) -> str:
    left, right = halves
    return (FULL if right else LEFT) if left else (RIGHT if right else IDLE)


def _busy(own: Sequence[Block], columns: int, scale: float) -> list[bool]:
    """For each half column, whether it is drawn busy: where the time that the device was busy until its end, counted
    in halves and rounded, is one more than until its beginning."""
    done = [0.0] * (HALVES * columns + 1)  # busy time, in halves, within each half
    for block in own:
        if block.lane != 1:
            for half, share in _shares(block, HALVES * columns, scale / HALVES):
                done[half + 1] += share
    counts = [int(total + 0.5 - 1e-6) for total in itertools.accumulate(done)]
    return [after > before for before, after in itertools.pairwise(counts)]


def _owners(simulation: Simulation, device: int, columns: int, scale: float) -> list[tuple[Block, ...] | None]:
    """For each column the block that it is drawn as, or the two of a pair; None where nothing ran.

    Of the colours of what ran in it, a column has the one that has been drawn the least, measured by its time so far.
    """
    parts: list[dict[tuple[Block, ...], float]] = [{} for _ in range(columns)]
    own = blocks(simulation, device)
    for block, following in itertools.zip_longest(own, own[1:]):
        if block.lane != 1:
            owner: tuple[Block, ...] = (block,) if block.lane < 0 else (block, following)
            for column, share in _shares(block, columns, scale):
                parts[column][owner] = share
    owed: defaultdict[tuple[object, ...], float] = defaultdict(float)
    drawn: list[tuple[Block, ...] | None] = []
    for inside in parts:
        largest: dict[tuple[object, ...], tuple[float, tuple[Block, ...]]] = {}
        for owner, share in inside.items():
            colour = tuple(key(block.task) for block in owner)
            owed[colour] += share
            largest[colour] = max(largest.get(colour, (0.0, owner)), (share, owner))
        if not largest:
            drawn.append(None)
            continue
        chosen = max(largest, key=lambda colour: owed[colour])
        owed[chosen] -= sum(inside.values())
        drawn.append(largest[chosen][1])
    return drawn


def _shares(block: Block, cells: int, scale: float) -> Iterator[tuple[int, float]]:
    """Of the cells of a line, each ``scale`` seconds, those that ``block`` has a part of, and the part."""
    start, end = block.start / scale, block.end / scale
    for cell in range(int(start), min(cells, int(end) + 1)):
        share = min(end, cell + 1) - max(start, cell)
        if share > 1e-6:
            yield cell, share


def _columns(simulation: Simulation, room: int) -> int:
    durations = [value for kind in Kind for value in simulation.costs.durations(kind) if value > 0]
    if not durations:
        return 1
    units = simulation.makespan / min(durations)
    return max(1, min(room, round(units * max(1, room // units))))
