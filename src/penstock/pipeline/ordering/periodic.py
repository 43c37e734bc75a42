"""Schedules that repeat the tightest block of F and whole backwards, for any placement and any number of replicas.

A block places the passes of one microbatch for each replica on a grid of units of time, F in one and B in two of them.
The schedule repeats it as often as a device can do that work, so that in the steady state nobody idles. Papers with a
V-shaped block (1F1B-V) have it so; for those that draw one unit of p microbatches (Chimera, BitPipe, Hanayo) it is
ours.
"""

from __future__ import annotations

import itertools
from collections import deque

from penstock.pipeline.ir.schedule import Kind, Placement, Schedule, Task

UNITS = {Kind.F: 1, Kind.B: 2}


def periodic(placement: Placement, microbatches: int) -> Schedule:
    """Repeats the block of ``placement``; microbatches take its replicas in turn.

    Each device follows the block's order, and holds no more than the block does when it is repeated without end. Where
    it would idle, the next F that can run goes ahead of its turn before the first B, as far as memory and what it
    overtakes permit, and the next B after the last F.
    """
    block = _Block(placement)
    queues = [deque(block.repeated(device, microbatches)) for device in range(len(block.passes))]
    orders = _run(placement, queues, block.peak)
    return Schedule(placement, tuple(map(tuple, orders)), microbatches)


class _Block:
    """When each pass runs: ``passes`` has, for each device, tasks of the microbatches 0, 1, ... of replica 0, 1, ...,
    with their times."""

    def __init__(self, placement: Placement) -> None:
        self.replicas = len(placement[0])
        devices = 1 + max(map(max, placement))
        each = self.replicas * len(placement) // devices
        self.interval = each * sum(UNITS.values())
        self.passes: list[list[tuple[int, Task]]] = [[] for _ in range(devices)]
        self._taken: list[set[int]] = [set() for _ in range(devices)]
        self._backwards = [each] * devices  # that are not placed yet
        self._place(placement)

    def _place(self, placement: Placement) -> None:
        """Each pass in turn, from the earliest, as early as the block can still be repeated."""
        stages = range(len(placement))
        chains = [
            deque([Task(Kind.F, s, r, r) for s in stages] + [Task(Kind.B, s, r, r) for s in reversed(stages)])
            for r in range(self.replicas)
        ]
        times = [0] * self.replicas
        while any(chains):
            _, replica = min((times[r], r) for r in range(self.replicas) if chains[r])
            task = chains[replica].popleft()
            device = placement[task.stage][replica]
            start = next(time for time in itertools.count(times[replica]) if self._fits(device, task.kind, time))
            self._taken[device] |= self._units(task.kind, start)
            self._backwards[device] -= task.kind is Kind.B
            self.passes[device].append((start, task))
            times[replica] = start + UNITS[task.kind]

    def _units(self, kind: Kind, start: int) -> set[int]:
        return {unit % self.interval for unit in range(start, start + UNITS[kind])}

    def _fits(self, device: int, kind: Kind, start: int) -> bool:
        """Whether the device is free then in every repetition, and has room for all B that are to come."""
        units, taken = self._units(kind, start), self._taken[device]
        if taken & units:
            return False
        used = taken | units
        ring = [(min(used) + unit) % self.interval in used for unit in range(self.interval)]
        room = sum(len(list(run)) // UNITS[Kind.B] for busy, run in itertools.groupby(ring) if not busy)
        return room >= self._backwards[device] - (kind is Kind.B)

    @property
    def peak(self) -> int:
        """The most activations that a device holds when the block is repeated without end."""
        return max(map(self._peak, self.passes))

    def _peak(self, own: list[tuple[int, Task]]) -> int:
        repeats = range(2 + max(time for time, _ in own) // self.interval)
        changes = [
            (time + self.interval * k, 1) if kind is Kind.F else (time + self.interval * k + UNITS[kind], -1)
            for time, (kind, *_) in own
            for k in repeats
        ]
        return max(itertools.accumulate(change for _, change in sorted(changes)))

    def repeated(self, device: int, microbatches: int) -> list[Task]:
        """A device's tasks in the order of the repeated block."""
        timed = [
            (time + self.interval * k, task._replace(microbatch=task.replica + self.replicas * k))
            for time, task in self.passes[device]
            for k in range(len(range(task.replica, microbatches, self.replicas)))
        ]
        return [task for _, task in sorted(timed)]


def _run(placement: Placement, queues: list[deque[Task]], memory: int) -> list[list[Task]]:
    """The orders in which the devices run their queues at unit times, with tasks ahead of their turn."""
    last = len(placement) - 1
    ends: dict[tuple[Kind, int, int], int] = {}
    orders: list[list[Task]] = [[] for _ in queues]
    free, held = [0] * len(queues), [0] * len(queues)

    def ready(task: Task, time: int) -> bool:
        if task.kind is Kind.F:
            return task.stage == 0 or ends.get((Kind.F, task.stage - 1, task.microbatch), time + 1) <= time
        source = (Kind.F, last) if task.stage == last else (Kind.B, task.stage + 1)
        return ends.get((*source, task.microbatch), time + 1) <= time

    def choose(device: int, time: int) -> Task | None:
        """The next task of ``device`` that can run, and leaves memory for those before it."""
        queue = queues[device]
        warming_up, cooling_down = len(orders[device]) == held[device], len(queue) == held[device]
        ahead = queue if warming_up or cooling_down else itertools.islice(queue, 1)
        most = count = held[device]  # what the device will hold while it works through the queue
        for place, task in enumerate(ahead):
            in_turn = place == 0 or (task.kind is Kind.F) is warming_up
            if in_turn and (task.kind is Kind.B or most < memory) and ready(task, time):
                return task
            count += 1 if task.kind is Kind.F else -1
            most = max(most, count)
        return None

    for time in itertools.count():
        for device in (device for device, until in enumerate(free) if until <= time):
            task = choose(device, time)
            if task is not None:
                queues[device].remove(task)
                orders[device].append(task)
                held[device] += 1 if task.kind is Kind.F else -1
                free[device] = ends[task[:3]] = time + UNITS[task.kind]
        if not any(queues):
            break
    return orders
