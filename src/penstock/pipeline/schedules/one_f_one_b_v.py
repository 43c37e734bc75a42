"""1F1B-V: 1F1B over a V, for two thirds of its memory."""

from __future__ import annotations

import itertools
from collections import deque

from penstock.pipeline.ir.schedule import Kind, Schedule, Task, zigzag
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy

#: Units of time in which a device works on one microbatch: two F of one, two B of two.
INTERVAL = 6
UNITS = {Kind.F: 1, Kind.B: 2}

#: The time, in the block, of a pass of a microbatch on a stage.
Pass = tuple[int, Kind, int]


@policy("pipeline.schedule", "1f1b_v", papers=[21])
class OneForwardOneBackwardV(PipelineSchedule):
    """Repeats a V-shaped building block with whole backwards, whose passes follow each other as closely as they can.

    The first stage of a device lives long where its second one lives short, so that all devices hold about two thirds
    of what 1F1B's first device does, for the time of 1F1B. Where a device would idle, the next F that can run goes ahead
    of its turn before the first B, as far as memory and what it overtakes permit, and the next B after the last F. The
    block is the paper's; our way to state it finds that of the authors. How turns change is our reading.
    """

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        block = _block(devices)
        orders = _run([_repeated(own, microbatches) for own in block], max(map(_peak, block)))
        return Schedule(zigzag(devices, 2), tuple(map(tuple, orders)), microbatches)


def _block(devices: int) -> list[list[Pass]]:
    """For each device its four passes of a microbatch, each as early as the block can be repeated."""
    placement = zigzag(devices, 2)
    chain = [(kind, stage) for kind, way in ((Kind.F, 1), (Kind.B, -1)) for stage in range(2 * devices)[::way]]
    block: list[list[Pass]] = [[] for _ in range(devices)]
    taken: list[set[int]] = [set() for _ in range(devices)]
    time = 0
    for kind, stage in chain:
        (device,) = placement[stage]
        time, units = next(
            (start, units)
            for start in range(time, time + INTERVAL + 1)
            if _leaves_pairs(taken[device], units := {unit % INTERVAL for unit in range(start, start + UNITS[kind])})
        )
        taken[device] |= units
        block[device].append((time, kind, stage))
        time += UNITS[kind]
    return block


def _leaves_pairs(taken: set[int], units: set[int]) -> bool:
    """Whether ``units`` are free, and after the second F all others lie in runs of whole B."""
    if taken & units:
        return False
    used = taken | units
    ring = [(min(used) + unit) % INTERVAL in used for unit in range(INTERVAL)]
    return not taken or all(len(list(run)) % 2 == 0 for busy, run in itertools.groupby(ring) if not busy)


def _peak(own: list[Pass]) -> int:
    """The most activations that a device holds when the block is repeated without end."""
    repeats = range(2 + max(time for time, *_ in own) // INTERVAL)
    changes = [
        (time + INTERVAL * k, 1) if kind is Kind.F else (time + INTERVAL * k + UNITS[kind], -1)
        for time, kind, _ in own
        for k in repeats
    ]
    return max(itertools.accumulate(change for _, change in sorted(changes)))


def _repeated(own: list[Pass], microbatches: int) -> deque[Task]:
    """A device's tasks in the order of the repeated block."""
    timed = sorted((time + INTERVAL * k, kind, stage, k) for time, kind, stage in own for k in range(microbatches))
    return deque(Task(kind, stage, k) for _, kind, stage, k in timed)


def _run(queues: list[deque[Task]], memory: int) -> list[list[Task]]:
    """The orders in which the devices run their queues at unit times, with tasks ahead of their turn."""
    last = 2 * len(queues) - 1
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
        warming_up = len(orders[device]) == held[device]
        ahead = Kind.F if warming_up else Kind.B if len(queue) == held[device] else None
        most = count = held[device]  # what the device will hold while it works through the queue
        for task in queue:
            if (task is queue[0] or task.kind is ahead) and (task.kind is Kind.B or most < memory) and ready(task, time):
                return task
            count += 1 if task.kind is Kind.F else -1
            most = max(most, count)
        return None

    for time in itertools.count():
        if not any(queues):
            return orders
        for device in (device for device, until in enumerate(free) if until <= time):
            task = choose(device, time)
            if task is not None:
                queues[device].remove(task)
                orders[device].append(task)
                held[device] += 1 if task.kind is Kind.F else -1
                free[device] = ends[task[:3]] = time + UNITS[task.kind]
    raise AssertionError  # the count above has no end
