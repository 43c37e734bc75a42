"""Activations and their gradients on their way from one device to another.

Each direction between two devices is a queue of its own: messages go in the order in which the sender's list makes
them, which both sides read off the schedule. So a send never waits for another one, and the receiver asks for whatever
comes before the message that it needs; no order of tasks can make the two wait for each other.
"""

from __future__ import annotations

import datetime
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from penstock.pipeline.ir.schedule import Schedule, Task
from penstock.pipeline.run.grid import Grid

#: How many of the messages that are needed next a device has asked for before it needs them.
#:
#: None on CUDA. There a receive is a kernel of NCCL that spins until the message comes, and holds multiprocessors that
#: the work before it could use. Whatever makes the device wait for all of its work (the first launch of a kernel, which
#: loads it, or memory that is given back) would wait for a message that may itself wait for work that is not queued
#: yet. And little would be gained: NCCL sends into buffers between the two GPUs, whether or not we have asked.
AHEAD = {"cpu": 2, "cuda": 0}


class Need(NamedTuple):
    """What one task makes and another one reads."""

    maker: Task
    reader: Task


class Routes:
    """Where every message of a schedule comes from and goes to.

    Attributes:
        sources, targets: the devices of a need's maker and of its reader.
        read: for each task its needs, in the order of their makers' devices; for each of a microbatch's shards of the
            vocabulary, if it waits for all.
        made: for each task the needs that it meets.
        queues: for each (from, to) between different devices, its messages in order.
    """

    def __init__(self, schedule: Schedule) -> None:
        tasks = [(device, task) for device, order in enumerate(schedule.orders) for task in order]
        readers: dict[int, list[tuple[int, Task]]] = defaultdict(list)
        for device, task in tasks:
            readers[schedule.read_by(task)].append((device, task))
        readers[-1] = []  # which is no output
        self.sources: dict[Need, int] = {}
        self.targets: dict[Need, int] = {}
        self.read: dict[Task, list[Need]] = defaultdict(list)
        self.made: dict[Task, list[Need]] = defaultdict(list)
        self.queues: dict[tuple[int, int], list[Need]] = defaultdict(list)
        for source, maker in tasks:  # in the order of each source's list
            for target, reader in readers.get(schedule.made_by(maker), ()):
                need = Need(maker, reader)
                self.sources[need], self.targets[need] = source, target
                self.read[reader].append(need)
                self.made[maker].append(need)
                if source != target:
                    self.queues[source, target].append(need)


#: ``form(need)``: the shape and dtype of a message.
Form = Callable[[Need], tuple[Sequence[int], torch.dtype]]


class Transfers:
    """The messages of one device in one step. :meth:`expect` comes before all others.

    Args:
        routes: of the schedule, whose links the grid has connected.
        grid: the processes.
        form: of the messages.
        device: where they are.
    """

    def __init__(self, routes: Routes, grid: Grid, form: Form, device: torch.device) -> None:
        self._routes, self._grid, self._form, self._device = routes, grid, form, device
        here = grid.device
        self._queues: Mapping[int, deque[Need]] = {
            source: deque(queue) for (source, target), queue in routes.queues.items() if target == here
        }
        self._wanted: deque[Need] = deque()
        self._coming: dict[Need, tuple[Tensor, dist.Work]] = {}
        self._kept: dict[Need, Tensor] = {}
        self._sent: deque[tuple[Need, dist.Work]] = deque()

    def expect(self, order: Sequence[Task]) -> None:
        """Tells of the next tasks of this device, whose messages are asked for ahead of them; before they are done."""
        needs = (need for task in order for need in self._routes.read.get(task, ()))
        self._wanted.extend(need for need in needs if self._routes.sources[need] != self._grid.device)

    def drop(self, makers: Container[Task]) -> None:
        """Receives all that ``makers``, the first tasks of other devices, have sent, and forgets it; waits until all
        that was sent from here has been received.

        Raises:
            PenstockError: a process is lost.
        """
        for queue in self._queues.values():
            while queue and queue[0].maker in makers:
                self._ask(queue[0])
        for need, (_, work) in self._coming.items():
            self._wait(need, work, self._grid.rank(self._routes.sources[need]))
        self.finish()

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
        if self._routes.sources[need] == self._grid.device:
            return self._kept.pop(need)
        self._wanted.popleft()
        self._ask(need)
        for following in itertools.islice(self._wanted, AHEAD[self._device.type]):
            self._ask(following)
        tensor, work = self._coming.pop(need)
        self._wait(need, work, self._grid.rank(self._routes.sources[need]))
        return tensor

    def finish(self) -> None:
        """Waits until everything has been sent."""
        while self._sent:
            need, work = self._sent.popleft()
            self._wait(need, work, self._grid.rank(self._routes.targets[need]))

    def _ask(self, need: Need) -> None:
        """Starts to receive everything that comes on the way of ``need`` up to it."""
        source, here = self._routes.sources[need], self._grid.device
        ranks = self._grid.rank(source), self._grid.rank(here)
        queue = self._queues[source]
        while need not in self._coming:
            first = queue.popleft()
            shape, dtype = self._form(first)
            buffer = torch.empty(tuple(shape), dtype=dtype, device=self._device)
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
        here = self._routes.sources[need] == self._grid.device
        return f"its receipt of {need.maker}" if here else f"its {need.maker}"
