"""How long a run is: in steps, tokens, epochs or minutes, whichever ends first."""

from __future__ import annotations

import math

from penstock.train.config import TrainConfig


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
