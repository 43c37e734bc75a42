"""The contract of work in a pipeline's bubbles."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from penstock.core.errors import UsageError
from penstock.pipeline.simulate.simulator import Simulation
from penstock.policy import Policy, contract, unwritten


@dataclasses.dataclass(frozen=True)
class Filler:
    """Work in a bubble: a ``share`` of a device's samples of the next batch through frozen ``layer``.

    ``part`` numbers the shares of a device in the order in which they were cut off the batch; ``start`` and ``end`` are
    seconds of the simulation.
    """

    layer: int
    part: int
    share: float
    start: float
    end: float


class Example(NamedTuple):
    """A policy, with what it puts in the gaps of one device.

    Attributes:
        filler: the policy.
        gaps: pairs (start, end) of which the last has no end.
        frozen: seconds of each frozen layer.
        packed: the fillers.
    """

    filler: BubbleFiller
    gaps: list[tuple[float, float]]
    frozen: list[float]
    packed: list[Filler]


@contract(
    "pipeline.filler",
    law="every sample passes every frozen layer once and in order; no two tasks of a device overlap and none of the "
    "pipeline's moves; idle time within the step falls by exactly the work that was put there; on one device what the "
    "policy gives, worked out by hand",
    simulated=True,
)
class BubbleFiller(Policy):
    """Puts the frozen part of a model, such as a text encoder, to work where a pipeline's devices idle.

    Nothing waits for it in the same step: it prepares the inputs of the next one. Each device encodes its own equal
    part of the next batch, as in data parallelism.

    A policy gives :meth:`pack`, and :meth:`example` for its law.
    """

    def fill(self, simulation: Simulation, frozen: Sequence[float]) -> list[list[Filler]]:
        """For each device its fillers in order of time; what finds no bubble follows the device's last task.

        Args:
            simulation: a step of the trained part.
            frozen: seconds of each frozen layer for a device's whole part of the batch.

        Raises:
            UsageError: a layer takes less than no time.
        """
        for layer, seconds in enumerate(frozen):
            if not 0 <= seconds < float("inf"):
                raise UsageError(f"a frozen layer takes 0 seconds or more, and layer {layer} takes {seconds}")
        ends = (ends[-1] if ends else 0.0 for ends in simulation.ends)
        return [
            self.pack([*gaps, (end, float("inf"))], frozen) for gaps, end in zip(simulation.gaps, ends, strict=True)
        ]

    def pack(self, gaps: Sequence[tuple[float, float]], frozen: Sequence[float]) -> list[Filler]:
        """What a policy gives: all work of one device, in its ``gaps``, pairs (start, end); the last has no end."""
        raise NotImplementedError

    @classmethod
    def example(cls) -> Example:
        """A policy of this kind, and what it puts in the gaps of one device.

        Work it out by hand, or take it from the paper: the law holds the code against it.
        """
        raise unwritten(cls, "example()", "return Example(filler, gaps, frozen, packed) for one device")
