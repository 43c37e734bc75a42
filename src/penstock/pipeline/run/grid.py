"""Which process runs which device of which pipeline, and the ways between them."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from penstock.core.errors import PenstockError, UsageError
from penstock.parallel.world import World


class Grid:
    """The processes of a run as pipelines of ``devices`` neighbouring ranks each, all of which run the same schedule.

    Every process makes the same grids and asks them for the same groups in the same order.

    Args:
        world: this process's place.
        devices: p, of a pipeline.
        timeout: seconds after which a process that does not answer counts as lost.

    Attributes:
        pipeline, device: of this process.
        pipelines: how many there are: the copies of the model that share a batch, besides a schedule's own replicas.

    Raises:
        UsageError: the processes do not make whole pipelines.
    """

    def __init__(self, world: World, devices: int, timeout: float = 300.0) -> None:
        if world.size % devices:
            other = (
                f"set parallel.pipeline to a divisor of {world.size}" if world.size > 1 else "leave the pipeline out"
            )
            raise UsageError(
                f"{world.size} processes do not make whole pipelines of {devices}"
                if world.size > 1
                else f"this is one process, and a pipeline of {devices} stages needs {devices}",
                hint=f"Start {devices} processes or a multiple of it, under torchrun, or {other}.",
            )
        self.world, self.devices, self.timeout = world, devices, timeout
        if world.watch is not None:
            world.watch.patience = timeout
        self.pipelines = world.size // devices
        self.pipeline, self.device = divmod(world.rank, devices)
        self._groups: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}

    def rank(self, device: int, pipeline: int | None = None) -> int:
        """The rank that runs ``device`` of this pipeline, or of another one."""
        return (self.pipeline if pipeline is None else pipeline) * self.devices + device

    def group(self, purpose: str, ranks: Sequence[int]) -> dist.ProcessGroup:
        """A communicator of ``ranks`` for one ``purpose``, made once.

        A pair in another order is another one: messages from a to b and from b to a, and sums of both, do not wait for
        each other, in whatever order the two sides ask for them (NCCL serialises what one communicator carries).
        """
        key = purpose, tuple(ranks)
        if key not in self._groups:
            # NCCL's own watch ends the process without a word about whom it waited for: we, who say it, must be first.
            patience = self.timeout * (2 if torch.cuda.is_available() else 1)
            with self.world.explained("a new group of processes"):
                self._groups[key] = dist.new_group(sorted(ranks), timeout=datetime.timedelta(seconds=patience))
        return self._groups[key]

    def connect(self, links: Sequence[tuple[int, int]], device: torch.device) -> None:
        """Opens a communicator for each link (from, to) between devices, in every pipeline.

        Each carries a message now: NCCL sets up a communicator at its first use and blocks, which in the middle of a
        schedule could be a deadlock.
        """
        for pipeline in range(self.pipelines):
            for source, target in sorted(links):
                a, b = self.rank(source, pipeline), self.rank(target, pipeline)
                fresh = ("link", (a, b)) not in self._groups
                group = self.group("link", (a, b))
                if fresh and self.world.rank in (a, b):
                    token = torch.zeros(1, device=device)
                    with self.explained(b if self.world.rank == a else a, "its connection"):
                        if self.world.rank == a:
                            dist.send(token, b, group)
                        else:
                            dist.recv(token, a, group)

    def unite(self, members: Iterable[tuple[int, ...]], device: torch.device) -> None:
        """Opens a communicator for the sums of each of ``members``, tuples of ranks; it carries one now, as in
        :meth:`connect`."""
        for ranks in sorted(members):
            fresh = ("sum", ranks) not in self._groups
            group = self.group("sum", ranks)
            if fresh and self.world.rank in ranks:
                with self.explained(next(rank for rank in ranks if rank != self.world.rank), "its connection"):
                    dist.all_reduce(torch.zeros(1, device=device), group=group)

    @contextlib.contextmanager
    def explained(self, peer: int, what: str) -> Iterator[None]:
        """Turns a failed exchange with ``peer``, about ``what`` of it, into an error that names the lost rank."""
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:  # gloo and NCCL raise nothing narrower
            late = time.monotonic() - began > 0.9 * self.timeout
            raise self.lost(peer, what, patience=0.2 * self.timeout if late else 1.0) from error

    def lost(self, peer: int, what: str, *, patience: float) -> PenstockError:
        """The error for ``what`` not coming from ``peer``: it names the process that was lost first, which may be one
        that ``peer`` itself waited for. ``patience`` seconds are left for the others to give up too."""
        assert self.world.watch is not None
        return self.world.watch.waited(peer, what, min(patience, 30.0))
