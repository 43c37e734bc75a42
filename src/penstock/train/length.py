"""How long a run is: in steps, tokens, epochs or minutes, whichever ends first; and how far it has come."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from penstock.train.config import TrainConfig
from penstock.train.report import Position


def updates(config: TrainConfig, samples: int) -> int | None:
    """The updates of a whole run, None where only the clock ends it.

    Args:
        config: the run's.
        samples: windows of ``batch.length`` tokens in an epoch. The last update of a run may go a little beyond its
            tokens or epochs.
    """
    ends = [] if config.steps is None else [config.steps]
    if config.tokens is not None:
        ends.append(math.ceil(config.tokens / config.batch.tokens))
    if config.epochs is not None:
        ends.append(max(1, math.ceil(config.epochs * samples * config.batch.length / config.batch.tokens)))
    return min(ends, default=None)


def unfinished_warmup(config: TrainConfig, steps: int | None) -> str:
    """What is wrong where a run of ``steps`` updates ends within its warm-up, or nothing."""
    if steps is None or config.schedule.warmup_updates(steps) < steps:
        return ""
    highest = max(config.schedule.factor(step, steps) for step in (0, steps - 1))
    return (
        f"the warm-up of {config.schedule.warmup_updates(steps)} updates does not end in this run of {steps}: "
        f"the highest learning rate is {highest:.3f} of the peak; set schedule.warmup, a share of the run, instead"
    )


@dataclasses.dataclass
class Length:
    """A run's length, in updates or on the clock, whichever ends first.

    Attributes:
        steps: updates in the whole run, None where only the clock ends it.
        minutes: of compiling and of steps, None where the clock does not end it.
        compiling: seconds that compiling has taken.
    """

    steps: int | None
    minutes: float | None
    compiling: float = 0.0

    @property
    def _seconds(self) -> float:
        """What ``minutes`` leaves for steps; at least one is made."""
        return max(60 * (self.minutes or 0.0) - self.compiling, 1e-3)

    def progress(self, step: int, seconds: float) -> float:
        """The part of the run that is done, 0 to 1, after ``step`` updates that took ``seconds``."""
        by_step = step / self.steps if self.steps else 0.0
        by_time = seconds / self._seconds if self.minutes else 0.0
        return min(1.0, max(by_step, by_time))

    def total_steps(self, position: Position) -> float:
        """Updates in the whole run; with a time budget, an estimate from the pace so far."""
        known = float(self.steps or "inf")
        if not self.minutes or position.seconds == 0.0:
            return known if self.steps else 1e9
        return min(known, position.step * self._seconds / position.seconds)

    def seconds_left(self, position: Position, update: Callable[[], float]) -> float:
        """How long the rest of the run takes at most, where an update takes ``update()`` seconds."""
        limits = [60 * self.minutes - position.seconds] if self.minutes else []
        if self.steps:
            limits.append((self.steps - position.step) * update())
        return min(limits)
