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


class Task(NamedTuple):
    """One unit of work of a device; written ``2F0`` (stage, kind, microbatch), ``2F0'1`` on replica 1 of the stage."""

    kind: Kind
    stage: int
    microbatch: int
    replica: int = 0

    def __str__(self) -> str:
        replica = f"'{self.replica}" if self.replica else ""
        return f"{self.stage}{self.kind.name}{self.microbatch}{replica}"


class WeightRule(enum.StrEnum):
    """Which version of the weights a task sees; :mod:`penstock.pipeline.versions` counts them."""

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
    """

    placement: Placement
    orders: tuple[tuple[Task, ...], ...]
    microbatches: int
    weights: WeightRule = WeightRule.FLUSH
    paths: tuple[tuple[int, ...], ...] = ()
    offloaded: frozenset[tuple[int, int]] = frozenset()

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
