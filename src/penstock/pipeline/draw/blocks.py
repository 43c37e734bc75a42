"""What there is to draw of a timeline: the blocks of each device, its memory, and the messages between devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, zip_longest
from typing import NamedTuple

from penstock.pipeline.ir.schedule import Task
from penstock.pipeline.simulate.simulator import Simulation


class Block(NamedTuple):
    """A task and its time.

    ``lane`` is -1 where the device does nothing else at that time. Of an overlapped pair, both blocks have the pair's
    whole time: the forward in lane 0, the backward in lane 1.
    """

    task: Task
    start: float
    end: float
    lane: int = -1


class Message(NamedTuple):
    """What passes from a task to one of another device, ``sent`` and ``arrives``; ``maker`` and ``reader`` are the
    places of both in their devices' lists."""

    source: int
    maker: int
    target: int
    reader: int
    sent: float
    arrives: float


def blocks(simulation: Simulation, device: int) -> list[Block]:
    """Those of ``device``, in the order of its list. A pair that a measured run did one after the other is no pair."""
    order, starts, ends = simulation.schedule.orders[device], simulation.starts[device], simulation.ends[device]
    drawn = [Block(*own) for own in zip(order, starts, ends, strict=True)]
    for number, (first, second) in enumerate(pairwise(drawn)):
        if first.task in simulation.schedule.overlapped and second.start <= first.end:
            drawn[number] = Block(first.task, first.start, second.end, 0)
            drawn[number + 1] = Block(second.task, first.start, second.end, 1)
    return drawn


def joined(own: Sequence[Block]) -> list[bool]:
    """Whether each block's end is the next one's start.

    Where blocks are narrower than a pixel, one that reaches a little under the next, which is drawn over it, keeps the
    background from shining through between the two.
    """
    return [
        following is not None and math.isclose(this.end, following.start)
        for this, following in zip_longest(own, own[1:])
    ]


def curve(simulation: Simulation, device: int) -> list[tuple[float, float]]:
    """Steps (time, bytes of activations held from then on) of ``device``, one for each time at which that changes.

    What is freed and what is allocated at one time are one step: there is no moment between them. Times that differ by
    the rounding of their sums, the device's own and those of a message that it waits for, are one.
    """
    tiny = 1e-9 * max(simulation.costs.activation, default=0.0)
    soon = 1e-9 * simulation.makespan
    steps: list[tuple[float, float]] = []
    for time, held in simulation.memory(device):
        if steps and time - steps[-1][0] <= soon:
            time, _ = steps.pop()
        if not steps or abs(held - steps[-1][1]) > tiny:
            steps.append((time, 0.0 if abs(held) <= tiny else held))
    return steps


def messages(simulation: Simulation) -> list[Message]:
    """All between different devices. Of what all shards of the vocabulary make together, a reader waits for the last
    one's part, which alone is given."""
    schedule, costs = simulation.schedule, simulation.costs
    drawn = [blocks(simulation, device) for device in range(schedule.devices)]
    makers: dict[int, tuple[float, int, int]] = {}  # of an output: when it was made, last of all, and by whom
    for device, own in enumerate(drawn):
        for number, block in enumerate(own):
            output = schedule.made_by(block.task)
            if output >= 0:
                makers[output] = max(makers.get(output, (-1.0, 0, 0)), (block.end, device, number))
    found = []
    for target, own in enumerate(drawn):
        for number, block in enumerate(own):
            made = makers.get(schedule.read_by(block.task))
            if made is not None and made[1] != target:
                sent, source, maker = made
                alone = schedule.makers[schedule.read_by(block.task)] == 1
                sources: Sequence[int] = [source] if alone else range(schedule.devices)
                delay = max(costs.between(each, target) for each in sources)
                # A run that was measured may have begun earlier than its mean transfer says.
                found.append(Message(source, maker, target, number, sent, min(sent + delay, block.start)))
    return found
