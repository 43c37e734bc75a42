"""Schedules from one repeated building block ("Pipeline Parallelism with Controllable Memory").

A building block places the F and I of one microbatch on a time axis for every device; the schedule repeats it at an
interval T of one microbatch's work on a device. A device then holds, in each chunk, about lifespan / T activations,
lifespan being the time from F to W: the block decides the memory.

V-shaped blocks have two chunks on each device, stage d and stage 2p-1-d. A long life in the first chunk (device 0) is
on the same device as a short one in the second, so that all devices hold about the same.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Sequence

from penstock.pipeline.ir.schedule import Kind, Schedule, Task, zigzag

#: T at unit times: F, I and W of two chunks.
INTERVAL = 6


@dataclasses.dataclass(frozen=True)
class Block:
    """When the four passes of microbatch 0 run on each device: F and I of stage d, F and I of stage 2p-1-d.

    The passes follow each other: ``times[0]`` F down the devices 0 ... p-1, ``times[1]`` F back up, ``times[2]`` I down
    again, ``times[3]`` I back up, each a list over the devices in units of one pass.
    """

    times: tuple[tuple[int, ...], ...]

    def at(self, device: int) -> tuple[tuple[int, Kind, int], ...]:
        """(time, kind, stage) of the passes on ``device``."""
        near, far = device, 2 * len(self.times[0]) - 1 - device
        passes = ((Kind.F, near), (Kind.F, far), (Kind.I, far), (Kind.I, near))
        return tuple((times[device], kind, stage) for times, (kind, stage) in zip(self.times, passes, strict=True))

    @property
    def devices(self) -> int:
        """p."""
        return len(self.times[0])

    @property
    def collision_free(self) -> bool:
        """Whether the repeated block never has two passes on a device at once."""
        return all(len({times[d] % INTERVAL for times in self.times}) == len(self.times) for d in range(self.devices))

    @functools.cached_property
    def peak(self) -> int:
        """Most activations, each of one stage, that a device holds when the block is repeated without end and each W
        takes the first free unit after its I."""
        return max(_steady_peak([(time, kind) for time, kind, _ in self.at(device)]) for device in range(self.devices))


@functools.cache
def v_shaped_block(devices: int, pace: tuple[int, int, int, int]) -> Block:
    """The shortest block whose four passes go from device to device at the given ``pace``, free of collisions.

    ``pace`` are the paper's offsets between neighbouring devices, of F down, F up, I down and I up. Where one pass
    ends, the next begins on the same device, after a wait: of the waits with which no two passes of any device fall on
    the same unit modulo the interval, the shortest in all, and among these those with the lowest peak. That search is
    our way to state the offsets; it finds those of the authors' implementation of V-Min and V-Half.
    """
    waits = itertools.product(range(1, INTERVAL + 1), repeat=3)
    blocks = [(sum(wait), _turning(devices, pace, wait)) for wait in waits]
    possible = [(length, block) for length, block in blocks if block.collision_free]
    shortest = min(length for length, _ in possible)
    return min((block for length, block in possible if length == shortest), key=lambda block: block.peak)


def _turning(devices: int, pace: Sequence[int], waits: Sequence[int]) -> Block:
    """The block with ``waits`` between the end of one pass and the beginning of the next."""
    hops = range(devices)
    down = [pace[0] * hop for hop in hops]
    up = [down[-1] + waits[0] + pace[1] * hop for hop in hops][::-1]
    back_down = [up[0] + waits[1] + pace[2] * hop for hop in hops]
    back_up = [back_down[-1] + waits[2] + pace[3] * hop for hop in hops][::-1]
    return Block((tuple(down), tuple(up), tuple(back_down), tuple(back_up)))


def repeat(block: Block, microbatches: int) -> Schedule:
    """The schedule that repeats ``block``, reordered where it begins and ends, and squeezed, as the paper does it.

    The block is repeated on a grid of units of time, each W in the first free unit after its I. In the warm-up, until
    device 0 is done with the first microbatch, and in the cool-down, once a device then has the last one, each pass
    moves to the earliest free unit that its inputs and the peak of memory allow. All run as early as that order
    permits. Then the passes of the cool-down move once more, without their W, which take what is free in the end.
    """
    rows = [_Row(block.at(device), microbatches) for device in range(block.devices)]
    for row in rows:
        row.weights = row.free_units()
    _reorder(rows, _WARMUP | _COOLDOWN)
    _squeeze(rows)
    for row in rows:
        row.weights = []
    _reorder(rows, _COOLDOWN)
    return Schedule(zigzag(block.devices, 2), tuple(row.order() for row in rows), microbatches)


def _steady_peak(passes: Sequence[tuple[int, Kind]]) -> int:
    """:attr:`Block.peak` of one device's (time, kind)."""
    repeats = 2 + max(time for time, _ in passes) // INTERVAL
    timed = {time + INTERVAL * k: kind for time, kind in passes for k in range(repeats)}
    held = peak = pending = 0
    for unit in range(max(timed) + 1):
        kind = timed.get(unit)
        if kind is Kind.F:
            held += 1
            peak = max(peak, held)
        elif kind is Kind.I:
            pending += 1
        elif pending:
            pending -= 1
            held -= 1
    return peak


#: The number of W among a device's passes of a microbatch: F and F, I and I, and the W of both stages.
_WEIGHT = 4
_WARMUP, _STEADY, _COOLDOWN = 1, 2, 4


class _Row:
    """One device's units of time.

    Attributes:
        passes: (kind, stage) of the four passes of a microbatch, in the order in which they follow each other.
        units: for each of the four passes the units of all microbatches, and those of W, of whichever stage; none where
            W are still to take what is free.
    """

    def __init__(self, block: tuple[tuple[int, Kind, int], ...], microbatches: int) -> None:
        self.passes = [(kind, stage) for _, kind, stage in block]
        self.units = [[first + INTERVAL * k for k in range(microbatches)] for first, *_ in block] + [[]]

    @property
    def weights(self) -> list[int]:
        """The units of W."""
        return self.units[_WEIGHT]

    @weights.setter
    def weights(self, units: list[int]) -> None:
        self.units[_WEIGHT] = units

    def free_units(self) -> list[int]:
        """The first free unit after each I, for its W."""
        taken = set(itertools.chain(*self.units[:_WEIGHT]))
        found: list[int] = []
        for unit in sorted(self.units[2] + self.units[3]):
            while unit in taken:
                unit += 1
            taken.add(unit)
            found.append(unit)
        return sorted(found)

    @property
    def peak(self) -> int:
        """The most activations that are held at once."""
        changes = [(unit, 1) for unit in self.units[0] + self.units[1]]
        changes += [(unit, -1) for unit in self.weights or self.free_units()]
        return max(itertools.accumulate(change for _, change in sorted(changes)))

    def peak_with(self, unit: int, kind: int, number: int) -> int:
        """The peak, were that pass in an earlier ``unit``."""
        if kind > 1 and self.weights:
            return 0  # where W have their units, only F adds to what is held
        before, self.units[kind][number] = self.units[kind][number], unit
        peak = self.peak
        self.units[kind][number] = before
        return peak

    def order(self) -> tuple[Task, ...]:
        """The tasks in their order. Of the W that wait for a free unit, the later stage's oldest comes first."""
        timed: list[tuple[int, Task | None]] = [(unit, None) for unit in self.free_units()]
        for (kind, stage), units in zip(self.passes, self.units, strict=False):
            timed += [(unit, Task(kind, stage, number)) for number, unit in enumerate(units)]
        order: list[Task] = []
        pending: tuple[collections.deque[Task], ...] = (collections.deque(), collections.deque())
        for _, task in sorted(timed, key=lambda pair: pair[0]):
            if task is None:
                task = (pending[0] or pending[1]).popleft()
            elif task.kind is Kind.I:
                pending[(task.kind, task.stage) == self.passes[3]].append(task._replace(kind=Kind.W))
            order.append(task)
        return tuple(order)


def _in_order(rows: Sequence[_Row]) -> list[tuple[int, int, int, int]]:
    """(unit, device, pass, number) of all, in time."""
    return sorted(
        (unit, device, kind, number)
        for device, row in enumerate(rows)
        for kind, units in enumerate(row.units)
        for number, unit in enumerate(units)
    )


def _earliest(rows: Sequence[_Row], device: int, kind: int, number: int) -> int:
    """The unit in which the inputs of a pass are there, and the one before of its kind is done."""
    own = rows[device].units
    after = [own[kind][number - 1]] if number else []
    if kind == _WEIGHT:
        after.append(sorted(own[2] + own[3])[number])
    else:
        source = device - 1 if kind in (0, 2) else device + 1
        if 0 <= source < len(rows):
            after.append(rows[source].units[kind][number])
        if kind:
            after.append(own[kind - 1][number])
    return max(after, default=-1) + 1


def _reorder(rows: Sequence[_Row], phases: int) -> None:
    """Moves each pass of the given ``phases`` to the earliest unit that is free and leaves the peak as it is."""
    peak = max(row.peak for row in rows)
    taken = [set(itertools.chain(*row.units)) for row in rows]
    microbatches, phase = len(rows[0].units[0]), _WARMUP
    for unit, device, kind, number in _in_order(rows):
        if phase == _WARMUP and (device, kind) == (0, 3):
            phase = _STEADY
        if phase & phases:
            row = rows[device]
            row.units[kind][number] = next(
                (
                    earlier
                    for earlier in range(_earliest(rows, device, kind, number), unit)
                    if earlier not in taken[device] and row.peak_with(earlier, kind, number) <= peak
                ),
                unit,
            )
            taken[device].remove(unit)
            taken[device].add(row.units[kind][number])
        if phase == _STEADY and (kind, number) == (0, microbatches - 1):
            phase = _COOLDOWN


def _squeeze(rows: Sequence[_Row]) -> None:
    """Lets all run as early as their order and inputs permit."""
    free = [0] * len(rows)
    for _, device, kind, number in _in_order(rows):
        unit = max(free[device], 0 if kind == _WEIGHT else _earliest(rows, device, kind, number))
        rows[device].units[kind][number] = unit
        free[device] = unit + 1
