"""How far a run is, and what each update looked like."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from penstock.train.guard import Guard


@dataclasses.dataclass
class Position:
    """How far a run has come. ``seconds`` are those spent in steps; ``samples`` are windows over all processes.
    ``best`` is the lowest validation so far, in bits per byte, and ``best_step`` the update that it came after.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None
    guard: Guard = dataclasses.field(default_factory=Guard)


@dataclasses.dataclass(frozen=True)
class Report:
    """What one update looked like.

    Attributes:
        step: updates done.
        progress: of the run, 0 to 1.
        loss: mean nats for a predicted token, over all processes.
        grad_norm, grad_l1: norms of the whole gradient before clipping, 2 and 1.
        lr_factor: the schedule's.
        length: of the sequences.
        tokens_per_s, flops_per_s: over all processes, forward and backward counted, recomputation not.
        mfu: share of the device's data-sheet bf16 rate, or None where none is known.
        skipped: whether the update was bad, and left the weights as they were.
    """

    step: int
    progress: float
    loss: float
    grad_norm: float
    grad_l1: float
    lr_factor: float
    length: int
    tokens_per_s: float
    flops_per_s: float
    mfu: float | None
    skipped: bool = False

    def record(self) -> dict[str, float]:
        """What is written down of it: JSON has no numbers that are not finite, and an update is seldom skipped."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        values.pop("step")
        return {name: value for name, value in values.items() if value is not False and math.isfinite(value)}


@dataclasses.dataclass(frozen=True)
class Reading:
    """An update that is made or under way; what was ``measured`` (loss and norms) is still on the device."""

    step: int
    lr_factor: float
    length: int
    measured: dict[str, Tensor]

    @property
    def skipped(self) -> bool:
        """Whether the update was bad, and left the weights as they were."""
        return "skipped" in self.measured

    def wait(self) -> tuple[float, float, float]:
        """The loss and the gradient's norms, 2 and 1, when the update is made."""
        loss, grad_norm, grad_l1 = (self.measured[name].item() for name in ("loss", "grad_norm", "grad_l1"))
        return loss, grad_norm, grad_l1
