"""Measured or assumed times of a pipeline's work, as an option of policies, a costs file, and the simulator's costs."""

from __future__ import annotations

from pydantic import Field, field_validator

from penstock.core.config import Config
from penstock.core.errors import UsageError
from penstock.pipeline.ir import Schedule
from penstock.pipeline.simulator import Costs, Link


class StagesError(UsageError):
    """The times are lists for another number of stages than a schedule has."""


class Times(Config):
    """What F, I, W and a transfer take for one microbatch, in units that are free as long as they agree.

    Attributes:
        forward, input_grad, weight_grad: one number for a p-th of the model, or a list with one for each stage.
        transfer: between two devices.
        host: of the activation of a microbatch on a p-th of the model, between a device and its host's memory.
        deferred: of the activation of a microbatch, the share that W still needs after I.
    """

    forward: float | tuple[float, ...] = 1.0
    input_grad: float | tuple[float, ...] = 1.0
    weight_grad: float | tuple[float, ...] = 1.0
    transfer: float = Field(0.0, ge=0)
    host: float = Field(1.0, ge=0)
    deferred: float = Field(1.0, ge=0, le=1)

    @field_validator("forward", "input_grad", "weight_grad")
    @classmethod
    def _not_negative(cls, value: float | tuple[float, ...]) -> float | tuple[float, ...]:
        if any(seconds < 0 for seconds in (value if isinstance(value, tuple) else (value,))):
            raise ValueError("times are not negative")
        return value

    def each(self, field: str, stages: int, share: float = 1.0) -> tuple[float, ...]:
        """The times of ``field`` for each of ``stages``, of which one is ``share`` times a p-th of the model.

        Raises:
            StagesError: the times are a list for another number of stages.
        """
        value = getattr(self, field)
        if not isinstance(value, tuple):
            return (value * share,) * stages
        if len(value) != stages:
            raise StagesError(
                f"the times of {field} are for {len(value)} stages, and this pipeline has {stages}",
                hint="Give one number for all stages, or a list with one for each.",
            )
        return value

    def costs(self, schedule: Schedule) -> Costs:
        """The simulator's costs of ``schedule``; activations and weights are those of a p-th of the model.

        Raises:
            StagesError: the times are lists for another number of stages.
        """
        stages = schedule.stages
        share = schedule.devices / stages
        return Costs(
            forward=self.each("forward", stages, share),
            input_grad=self.each("input_grad", stages, share),
            weight_grad=self.each("weight_grad", stages, share),
            activation=(share,) * stages,
            deferred=(share * self.deferred,) * stages,
            weights=(share,) * stages,
            link=Link(latency=self.transfer),
            host=Link(latency=self.host * share),
        )
