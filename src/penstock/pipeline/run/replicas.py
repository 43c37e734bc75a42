"""Sums the gradients of parameters that several devices hold, as early as the schedule allows.

Several devices hold a parameter where a stage has replicas, where an embedding is tied to the head of another device,
and where several pipelines share a batch. All are one case: the gradient of a parameter is summed over its holders.
"""

from __future__ import annotations

import datetime
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from penstock.pipeline.ir.schedule import Kind, Schedule
from penstock.pipeline.ir.validate import walk
from penstock.pipeline.run.grid import Grid


class Bucket(NamedTuple):
    """Parameters with the same holders, whose gradients are complete at the same time."""

    ranks: tuple[int, ...]
    stages: frozenset[int]
    names: tuple[str, ...]


def holders(schedule: Schedule, names: Sequence[Iterable[str]], grid: Grid) -> dict[str, tuple[int, ...]]:
    """The ranks that hold each parameter, given the ``names`` of each stage's."""
    devices: dict[str, set[int]] = defaultdict(set)
    for stage, held in enumerate(names):
        for name in held:
            devices[name].update(schedule.placement[stage])
    return {
        name: tuple(sorted(grid.rank(device, pipeline) for device in found for pipeline in range(grid.pipelines)))
        for name, found in devices.items()
    }


class Replicas:
    """The exchanges of gradients of one process. All processes make it, with the same arguments but ``parameters``.

    Args:
        schedule, names, grid: see :func:`holders`.
        parameters: those that are here, by name; their ``.grad`` are summed.
        device: where they are.
    """

    def __init__(
        self,
        schedule: Schedule,
        names: Sequence[Sequence[str]],
        grid: Grid,
        parameters: Mapping[str, nn.Parameter],
        device: torch.device,
    ) -> None:
        self._grid, self._parameters = grid, parameters
        grouped: dict[tuple[tuple[int, ...], frozenset[int]], list[str]] = defaultdict(list)
        for name, ranks in holders(schedule, names, grid).items():
            if len(ranks) > 1:
                stages = frozenset(stage for stage, held in enumerate(names) if name in held)
                grouped[ranks, stages].append(name)
        # All agree on one order of exchanges, that in which the last of a bucket's stages is done.
        finished: dict[int, int] = {}
        for number, (_, task) in enumerate(walk(schedule)):
            if task.kind in (Kind.W, Kind.B):
                finished[task.stage] = number
        buckets = [Bucket(ranks, stages, tuple(held)) for (ranks, stages), held in grouped.items()]
        buckets.sort(key=lambda bucket: (max(finished.get(stage, 0) for stage in bucket.stages), sorted(bucket.stages)))
        grid.unite({bucket.ranks for bucket in buckets}, device)
        self._buckets = [bucket for bucket in buckets if grid.world.rank in bucket.ranks]
        self._tasks = Counter(task.stage for task in schedule.orders[grid.device] if task.kind in (Kind.W, Kind.B))

    def begin(self) -> None:
        """Starts a step."""
        self._left = Counter(self._tasks)
        self._waiting = deque(self._buckets)
        self._running: list[tuple[Bucket, Tensor, dist.Work]] = []

    def done(self, stage: int) -> None:
        """Notes a B or W of ``stage``, and starts to sum whatever is complete with it."""
        self._left[stage] -= 1
        while self._waiting and not any(self._left[stage] for stage in self._waiting[0].stages):
            bucket = self._waiting.popleft()
            parameters = [self._parameters[name] for name in bucket.names]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
            with self._grid.explained(self._other(bucket), self._what(bucket)):
                work = dist.all_reduce(flat, group=self._grid.group("sum", bucket.ranks), async_op=True)
            assert work is not None
            self._running.append((bucket, flat, work))

    def finish(self) -> None:
        """Waits for all sums, and puts them in the place of the gradients."""
        for bucket, flat, work in self._running:
            with self._grid.explained(self._other(bucket), self._what(bucket)):
                if flat.device.type == "cuda":
                    work.wait()
                else:
                    work.wait(datetime.timedelta(seconds=self._grid.timeout))
            parameters = [self._parameters[name] for name in bucket.names]
            for parameter, part in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view(parameter.shape)
        self._running = []

    def _other(self, bucket: Bucket) -> int:
        return next(rank for rank in bucket.ranks if rank != self._grid.world.rank)

    def _what(self, bucket: Bucket) -> str:
        stages = " and ".join(map(str, sorted(bucket.stages)))
        return f"its part of the gradients of stage {stages}"
