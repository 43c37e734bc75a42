"""Activations and their gradients on their way from one device to another.

Each direction between two devices is a queue of its own: messages go in the order in which the sender's list makes
them, which both sides read off the schedule. So a send never waits for another one, and the receiver asks for whatever
comes before the message that it needs; no order of tasks can make the two wait for each other.
"""

from __future__ import annotations

import datetime
import itertools
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from penstock.pipeline.grid import Grid
from penstock.pipeline.ir import Kind, Schedule, Task

#: How many of the messages that are needed next a device has asked for before it needs them.
AHEAD = 2


class Need(NamedTuple):
    """What a task reads: the activations (``forward``) or their gradient that enter ``stage`` for ``microbatch``."""

    forward: bool
    stage: int
    microbatch: int


def need_of(schedule: Schedule, task: Task) -> Need | None:
    """What ``task`` reads from another stage, if anything: of the one before it on the microbatch's path, or, for a
    gradient, the one after it."""
    forward = task.kind is Kind.F
    if task.kind is Kind.W or _beside(schedule, task, after=not forward) is None:
        return None
    return Need(forward, task.stage, task.microbatch)


def met_by(schedule: Schedule, task: Task) -> Need | None:
    """The need of another stage that ``task`` meets, if any."""
    forward = task.kind is Kind.F
    stage = None if task.kind is Kind.W else _beside(schedule, task, after=forward)
    return None if stage is None else Need(forward, stage, task.microbatch)


def _beside(schedule: Schedule, task: Task, *, after: bool) -> int | None:
    """The stage before or after the task's on the path of its microbatch."""
    m = schedule.microbatches
    index = schedule.neighbours[after][task.stage * m + task.microbatch]
    return None if index < 0 else index // m


class Routes:
    """Where every message of a schedule comes from and goes to.

    Attributes:
        targets: the device that has a need.
        sources: the device and the task that meets it.
        queues: for each (from, to) between different devices, its messages in order.
    """

    def __init__(self, schedule: Schedule) -> None:
        tasks = [(device, task) for device, order in enumerate(schedule.orders) for task in order]
        self.targets = {need: device for device, task in tasks if (need := need_of(schedule, task))}
        self.sources = {need: (device, task) for device, task in tasks if (need := met_by(schedule, task))}
        self.queues: dict[tuple[int, int], list[Need]] = defaultdict(list)
        for need, (source, _) in self.sources.items():  # in the order of each source's list
            if source != self.targets[need]:
                self.queues[source, self.targets[need]].append(need)


class Transfers:
    """The messages of one device in one step.

    Args:
        routes: of the schedule, whose links the grid has connected.
        grid: the processes.
        schedule: the schedule.
        shapes: of the messages of each microbatch.
        dtype, device: of all messages.
    """

    def __init__(
        self,
        routes: Routes,
        grid: Grid,
        schedule: Schedule,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._routes, self._grid, self._shapes = routes, grid, shapes
        self._dtype, self._device = dtype, device
        here = grid.device
        self._queues: Mapping[int, deque[Need]] = {
            source: deque(queue) for (source, target), queue in routes.queues.items() if target == here
        }
        needs = (need_of(schedule, task) for task in schedule.orders[here])
        self._wanted = deque(need for need in needs if need and routes.sources[need][0] != here)
        self._coming: dict[Need, tuple[Tensor, dist.Work]] = {}
        self._kept: dict[Need, Tensor] = {}
        self._sent: deque[tuple[Need, dist.Work]] = deque()

    def give(self, need: Need, tensor: Tensor) -> None:
        """Passes on what meets ``need``: hands it over if that is on this device, else sends it, without waiting."""
        target = self._routes.targets[need]
        if target == self._grid.device:
            self._kept[need] = tensor
            return
        ranks = self._grid.rank(self._grid.device), self._grid.rank(target)
        with self._grid.explained(ranks[1], self._name(need)):
            work = dist.isend(tensor.contiguous(), ranks[1], self._grid.group("link", ranks))
        assert work is not None
        self._sent.append((need, work))
        while self._sent and self._sent[0][1].is_completed():
            self._sent.popleft()

    def take(self, need: Need) -> Tensor:
        """What meets ``need``, once it is there; asks for the next messages first.

        Raises:
            PenstockError: the process that it comes from is lost.
        """
        if self._routes.sources[need][0] == self._grid.device:
            return self._kept.pop(need)
        self._wanted.popleft()
        self._ask(need)
        for following in itertools.islice(self._wanted, AHEAD):
            self._ask(following)
        tensor, work = self._coming.pop(need)
        self._wait(need, work, self._grid.rank(self._routes.sources[need][0]))
        return tensor

    def finish(self) -> None:
        """Waits until everything has been sent."""
        while self._sent:
            need, work = self._sent.popleft()
            self._wait(need, work, self._grid.rank(self._routes.targets[need]))

    def _ask(self, need: Need) -> None:
        """Starts to receive everything that comes on the way of ``need`` up to it."""
        source, here = self._routes.sources[need][0], self._grid.device
        ranks = self._grid.rank(source), self._grid.rank(here)
        queue = self._queues[source]
        while need not in self._coming:
            first = queue.popleft()
            buffer = torch.empty(tuple(self._shapes[first.microbatch]), dtype=self._dtype, device=self._device)
            with self._grid.explained(ranks[0], self._name(first)):
                work = dist.irecv(buffer, ranks[0], self._grid.group("link", ranks))
            assert work is not None
            self._coming[first] = buffer, work

    def _wait(self, need: Need, work: dist.Work, peer: int) -> None:
        with self._grid.explained(peer, self._name(need)):
            if self._device.type == "cuda":
                work.wait()  # the stream waits, not this process
            else:
                work.wait(datetime.timedelta(seconds=self._grid.timeout))

    def _name(self, need: Need) -> str:
        device, task = self._routes.sources[need]
        return f"its {task}" if device != self._grid.device else f"its receipt of {task}"
