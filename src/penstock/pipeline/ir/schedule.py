"""The intermediate representation: a schedule is, for each device, an ordered list of tasks.

There are no times in it. A device runs its list in order and waits where the input of a task is not there yet, so the
same schedule is validated, simulated, drawn, exported and run. Kinds have the names of PyTorch's pipelining package.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from penstock.core.errors import PenstockError


class Kind(enum.IntEnum):
    """What a task computes for one microbatch on one stage."""

    F = 0  #: forward
    I = 1  #: backward to the input: the gradient that the stage before waits for  # noqa: E741
    W = 2  #: backward to the weights, at any time after I
    B = 3  #: the whole backward, I and W in one
    E = 4  #: a shard of the input embedding: its rows of the microbatch's tokens
    S = 5  #: a shard of the output layer: the scores of its part of the vocabulary
    N = 6  #: the shard's part of the softmax's normalizers, where these are a pass of their own
    T = 7  #: the shard's gradients
    G = 8  #: the gradient of the shard of the input embedding


#: The passes of vocabulary parallelism; the other kinds are those of stages.
VOCABULARY = (Kind.E, Kind.S, Kind.N, Kind.T, Kind.G)


class Task(NamedTuple):
    """One unit of work of a device; written ``2F0`` (stage, kind, microbatch), ``2F0'1`` on replica 1 of the stage.

    A pass of a shard of the vocabulary is at the first or the last stage, and its replica is the device.
    """

    kind: Kind
    stage: int
    microbatch: int
    replica: int = 0

    def __str__(self) -> str:
        replica = f"'{self.replica}" if self.replica else ""
        return f"{self.stage}{self.kind.name}{self.microbatch}{replica}"


class WeightRule(enum.StrEnum):
    """Which version of the weights a task sees; :mod:`penstock.pipeline.ir.versions` counts them."""

    FLUSH = "flush"  #: one version a step: the optimizer runs once every task is done
    STASH = "stash"  #: a stage updates after each microbatch, whose backward sees the version that its forward saw


#: ``placement[stage]`` lists the device of each of the stage's replicas.
Placement = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What each device does in one step, in order.

    Stage s of S feeds stage s + 1, unless a microbatch has a path of its own. A microbatch passes each stage of its
    path once forward and once backward, both on the same replica of it. Stages of the same device hand over without a
    transfer.

    Attributes:
        placement: the devices of each stage; several where the stage has replicas.
        orders: for each device its tasks, in the order in which it runs them.
        microbatches: m, numbered from 0.
        weights: the weight-version rule.
        paths: for each microbatch the stages that it passes, in order; empty where all pass all of them from 0 on.
        offloaded: (stage, microbatch) of the activations that wait in host memory between F and the backward.
        barriers: 0 where the first stage has the input embedding and the last one the output layer. Else every device
            has a shard of both, and after that many passes of all shards the last stage has its gradient.
        overlapped: forwards that run together with the backward that follows them in their device's list (B or I of
            another stage or microbatch), as in DualPipe: both begin when the inputs of both are there.
    """

    placement: Placement
    orders: tuple[tuple[Task, ...], ...]
    microbatches: int
    weights: WeightRule = WeightRule.FLUSH
    paths: tuple[tuple[int, ...], ...] = ()
    offloaded: frozenset[tuple[int, int]] = frozenset()
    barriers: int = 0
    overlapped: frozenset[Task] = frozenset()

    @property
    def stages(self) -> int:
        """S, the parts that the model is cut into."""
        return len(self.placement)

    @property
    def devices(self) -> int:
        """p, the number of devices."""
        return len(self.orders)

    @property
    def replicas(self) -> int:
        """The largest number of copies that a stage has."""
        return max(map(len, self.placement))

    def path(self, microbatch: int) -> Sequence[int]:
        """The stages that ``microbatch`` passes, in order."""
        return self.paths[microbatch] if self.paths else range(self.stages)

    @functools.cached_property
    def entrances(self) -> frozenset[int]:
        """The stages at which the path of a microbatch begins."""
        return frozenset(path[0] for path in self.paths) if self.paths else frozenset({0})

    @functools.cached_property
    def exits(self) -> frozenset[int]:
        """The stages at which the path of a microbatch ends."""
        return frozenset(path[-1] for path in self.paths) if self.paths else frozenset({self.stages - 1})

    def pairs(self, device: int) -> list[tuple[Task, Task]]:
        """The forwards and backwards that a device runs together, in order."""
        return [pair for pair in itertools.pairwise(self.orders[device]) if pair[0] in self.overlapped]

    @functools.cached_property
    def neighbours(self) -> tuple[list[int], list[int]]:
        """For each stage and microbatch, at stage * m + microbatch, that index of the stages before and after it on the
        microbatch's path; -1 where there is none."""
        m = self.microbatches
        before, after = [-1] * (self.stages * m), [-1] * (self.stages * m)
        for microbatch in range(m):
            for source, target in itertools.pairwise(self.path(microbatch)):
                after[source * m + microbatch] = target * m + microbatch
                before[target * m + microbatch] = source * m + microbatch
        return before, after

    def shard_tasks(self, device: int, microbatch: int) -> list[Task]:
        """The passes of a device's shard of the vocabulary, in an order in which they can run."""
        if not self.barriers:
            return []
        kinds = VOCABULARY if self.barriers == 3 else (Kind.E, Kind.S, Kind.T, Kind.G)
        last = self.stages - 1
        return [Task(kind, 0 if kind in (Kind.E, Kind.G) else last, microbatch, device) for kind in kinds]

    # What tasks read and make, by number: the forwards of all stages and microbatches, then their backwards, and then
    # what all shards of the vocabulary make together.

    @functools.cached_property
    def makers(self) -> list[int]:
        """For each output the number of tasks that make it."""
        each = self.stages * self.microbatches
        return [1] * (2 * each) + [self.devices] * (4 * self.microbatches)

    def made_by(self, task: Task) -> int:
        """The output that ``task`` makes, or has a part in; -1 if nothing waits for it."""
        kind, stage, microbatch, _ = task
        if kind is Kind.F:
            return stage * self.microbatches + microbatch
        if kind is Kind.I or kind is Kind.B:
            return (self.stages + stage) * self.microbatches + microbatch
        return -1 if kind is Kind.W or kind is Kind.G else self._of_shards(kind, microbatch)

    def read_by(self, task: Task) -> int:
        """The output that ``task`` waits for; -1 if it needs none, or one of its own device's just before."""
        kind, stage, microbatch, _ = task
        m = self.microbatches
        if kind is Kind.F:
            source = self.neighbours[0][stage * m + microbatch]
            return source if source >= 0 or not self.barriers else self._of_shards(Kind.E, microbatch)
        if kind is Kind.I or kind is Kind.B:
            source = self.neighbours[1][stage * m + microbatch]
            if source >= 0:
                return self.stages * m + source
            return self._of_shards(Kind.S if self.barriers == 1 else Kind.T, microbatch) if self.barriers else -1
        if kind is Kind.S:
            return self.path(microbatch)[-1] * m + microbatch
        if kind is Kind.G:
            return (self.stages + self.path(microbatch)[0]) * m + microbatch
        if kind is Kind.N or kind is Kind.T:
            return self._of_shards(Kind.N if kind is Kind.T and self.barriers == 3 else Kind.S, microbatch)
        return -1

    def _of_shards(self, kind: Kind, microbatch: int) -> int:
        return (2 * self.stages + kind - Kind.E) * self.microbatches + microbatch


class ScheduleError(PenstockError):
    """A schedule that cannot run: incomplete, inconsistent or deadlocked.

    ``device`` is the device at whose list the fault shows, None where it is not one device's.
    """

    def __init__(self, what: str, *, device: int | None = None, hint: str = "") -> None:
        super().__init__(what if device is None else f"device {device}: {what}", hint=hint)
        self.fault = what
        self.device = device


def looped(devices: int, chunks: int = 1) -> Placement:
    """Stage s on device s mod p: each device holds ``chunks`` stages, p apart."""
    return tuple((stage % devices,) for stage in range(devices * chunks))


def zigzag(devices: int, legs: int) -> Placement:
    """Stages run over the devices 0 ... p-1, back p-1 ... 0, and so on, ``legs`` times; two legs make a V."""
    return tuple((device,) for leg in range(legs) for device in (range(devices) if leg % 2 == 0 else _down(devices)))


def mirrored(placement: Sequence[Sequence[int]], devices: int) -> Placement:
    """Each stage of ``placement`` on its device d and, as its second replica, on p-1-d."""
    return tuple((device, devices - 1 - device) for (device,) in placement)


def _down(devices: int) -> range:
    return range(devices - 1, -1, -1)
