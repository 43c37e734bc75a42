"""The schedule refined from the gradient norms of a former run, for Adam; SGD has its own."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from penstock.core.errors import ConfigError
from penstock.core.metrics import read_metrics
from penstock.policy import policy
from penstock.train.schedules.contract import Schedule

#: Width of the median filter as a share of the run: the authors' for their tuned schedules.
SMOOTHING = 0.1
#: At most so many norms are kept of a run, evenly spaced.
POINTS = 200

# The bounds leave room for squares and their sums.
Norm = Annotated[float, Field(ge=1e-30, le=1e30, allow_inf_nan=False)]


class Refinement(Schedule):
    """The theory that the refined schedules share (When, Why and How Much?, theorem on the last iterate).

    With gradient norms G_t and weights w_t = G_t ** -``power``, the best rates for the last iterate are
    eta_t = c w_t (w_{t+1} + ... + w_T), normalised here so that the largest is 1. Large norms at the start give a
    warm-up, falling norms at the end a rapid annealing, and constant norms linear decay.

    ``norms`` are smoothed norms of a former run at even intervals; a path is read as that run's folder, so that a
    configuration says ``norms = "runs/first"`` and the new run's own record holds the numbers. Our reading: U updates
    make U + 1 iterates, and the norm at the last one, which no update measured, is taken to be that of the one before;
    then constant norms give 1 - t/U, the policy ``linear``, exactly. A run of another length is the same curve over
    relative time. The theory takes norms as given: where they fall because a smooth, easy problem converges (least
    squares, say), linear decay can do better.
    """

    metric: ClassVar[str]
    power: ClassVar[float]

    norms: tuple[Norm, ...] = Field(min_length=1, examples=[[8.0, 2.0, 1.0, 1.0, 1.0, 0.5]])

    @field_validator("norms", mode="before")
    @classmethod
    def _from_run(cls, value: Any) -> Any:
        return smoothed_norms(Path(value), cls.metric) if isinstance(value, str | Path) else value

    def shape(self, step: int, total: float) -> float:
        curve = _refine(self.norms, self.power)
        return float(np.interp(step / total * (len(curve) - 1), np.arange(len(curve)), curve))


@policy("train.schedule", "refined", papers=[385])
class Refined(Refinement):
    """Refined for optimizers with a rate for each coordinate (Adam): weights are inverse l1 norms of the gradients."""

    metric: ClassVar[str] = "grad_l1"
    power: ClassVar[float] = 1.0

    @classmethod
    def example(cls) -> tuple[Self, list[float]]:
        # The weights are 1/4, 1/2, 1 and 1; their products with the sums of those after them 5/8, 1, 1 and 0.
        return cls(norms=(4.0, 2.0, 1.0)), [0.625, 1.0, 1.0, 0.0]


@functools.lru_cache(maxsize=8)
def _refine(norms: tuple[float, ...], power: float) -> NDArray[np.float64]:
    """The factors at the n + 1 instants 0, 1/n, ..., 1 of a run, from n norms; the last is 0."""
    measured = np.array([*norms, norms[-1]])
    weights = (measured / measured.min()) ** -power
    later = np.append(np.cumsum(weights[:0:-1])[::-1], 0.0)
    rates = weights * later
    factors: NDArray[np.float64] = rates / rates.max()
    return factors


def smoothed_norms(run: Path, metric: str) -> list[float]:
    """Median-filtered gradient norms of a run, at most :data:`POINTS` of them.

    Like the authors' filter, it repeats the first norm before the start, so that a spike there survives, and mirrors
    the norms at the end.

    Args:
        run: the run's folder, with its ``metrics.jsonl``.
        metric: ``grad_norm`` or ``grad_l1``.

    Raises:
        ConfigError: the folder has no such metric.
    """
    norms = np.array([record[metric] for record in read_metrics(run / "metrics.jsonl") if metric in record])
    if not len(norms):
        raise ConfigError(
            f"there is no {metric!r} in {run / 'metrics.jsonl'}",
            hint="'norms' must name the folder of a run that 'penstock train' has made.",
        )
    half = int(SMOOTHING * len(norms)) // 2
    padded = np.pad(np.pad(norms, (half, 0), mode="edge"), (0, half), mode="reflect")
    kept = min(len(norms), POINTS)
    centres = np.arange(kept) * len(norms) // kept
    return [float(np.median(padded[i : i + 2 * half + 1])) for i in centres]
