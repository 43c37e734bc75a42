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

from penstock.pipeline.ir.schedule import Kind, Placement, Schedule, Task, zigzag

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
    """The schedule that repeats ``block``, squeezed, with W where there is nothing else to do.

    Each device follows the block's order of F and I. When the next of them has not got its input yet at unit times, or
    is an F for which there is no memory, the device runs the W that has waited longest, or else an F ahead of its turn.
    Memory is what the repeated block needs with each W in the first free unit after its I, and an F goes ahead only if
    it leaves room for all that it overtakes; so there is no deadlock. This is our way to do what the paper calls
    squeezing, and reordering of warm-up and cool-down.
    """
    placement = zigzag(block.devices, 2)
    passes = [_passes(block.at(device), microbatches) for device in range(block.devices)]
    return Schedule(placement, _fill(passes, placement, block.peak), microbatches)


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


def _passes(block: tuple[tuple[int, Kind, int], ...], microbatches: int) -> list[Task]:
    """F and I of all microbatches in the order of the repeated block."""
    timed = sorted(
        (time + INTERVAL * microbatch, kind, stage, microbatch)
        for time, kind, stage in block
        for microbatch in range(microbatches)
    )
    return [Task(kind, stage, microbatch) for _, kind, stage, microbatch in timed]


def _fill(passes: Sequence[Sequence[Task]], placement: Placement, memory: int) -> tuple[tuple[Task, ...], ...]:
    """Runs ``passes`` at unit times, and adds W to each device's list; see :func:`repeat`."""
    last = len(placement) - 1
    made: dict[tuple[bool, int, int], int] = {}  # (forward, stage, microbatch) -> when its output is there
    queues = [collections.deque(own) for own in passes]
    pending: list[collections.deque[Task]] = [collections.deque() for _ in passes]
    held = [0] * len(passes)
    orders: list[list[Task]] = [[] for _ in passes]

    def ready(task: Task, time: int) -> bool:
        forward = task.kind is Kind.F
        if task.stage == (0 if forward else last):
            return True
        return made.get((forward, task.stage - 1 if forward else task.stage + 1, task.microbatch), time + 1) <= time

    def choose(device: int, time: int) -> Task | None:
        """Takes the next task of ``device`` from its queues; None where it must idle."""
        queue = queues[device]
        if queue and ready(queue[0], time) and (queue[0].kind is Kind.I or held[device] < memory):
            return queue.popleft()
        if pending[device]:
            return pending[device].popleft()
        most = count = held[device]  # what the device will hold while it works through the queue
        for position, task in enumerate(queue):
            if most == memory:
                break
            if task.kind is Kind.F and ready(task, time):
                del queue[position]
                return task
            count += 1 if task.kind is Kind.F else -1
            most = max(most, count)
        return None

    for time in itertools.count():
        if not any(queues) and not any(pending):
            break
        for device in range(len(passes)):
            task = choose(device, time)
            if task is None:
                continue
            orders[device].append(task)
            if task.kind is Kind.W:
                held[device] -= 1
                continue
            made[task.kind is Kind.F, task.stage, task.microbatch] = time + 1
            if task.kind is Kind.F:
                held[device] += 1
            else:
                pending[device].append(task._replace(kind=Kind.W))
    return tuple(map(tuple, orders))
