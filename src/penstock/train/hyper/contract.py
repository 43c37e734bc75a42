"""The contract ``train.hyper``."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, NonNegativeFloat, PositiveInt

from penstock.core.config import Config
from penstock.policy import Choice, Policy, contract, unwritten
from penstock.train.schedules.contract import Schedule

#: Positive, and far from where floating point ends.
Amount = Annotated[float, Field(ge=1e-30, le=1e30)]


class Scale(Config):
    """How large a run is.

    ``parameters`` and ``tokens`` are the N and D of scaling laws; ``batch`` counts the tokens of an update (None: the
    rule chooses), and batches are made of whole sequences of ``length`` tokens.
    """

    parameters: Amount
    tokens: Amount
    batch: Amount | None = None
    length: PositiveInt = 512

    def whole(self, batch: float) -> int:
        """``batch`` tokens, rounded to whole sequences, at least one."""
        return max(1, round(batch / self.length)) * self.length

    def steps(self, batch: int) -> int:
        """How many updates of ``batch`` tokens make the run, at least one."""
        return max(1, round(self.tokens / batch))


class Settings(Config):
    """What a rule recommends.

    ``batch`` counts tokens, ``steps`` updates; ``lr`` is the peak rate. ``findings`` are numbers met on the way that a
    person may want to know, by name.
    """

    batch: PositiveInt
    steps: PositiveInt
    lr: Amount
    weight_decay: NonNegativeFloat
    schedule: Annotated[Schedule, Choice("train.schedule")]
    findings: dict[str, float] = Field(default_factory=dict)


@contract(
    "train.hyper",
    law="settings are finite, spend the tokens to within an update, and stay the same when their batch is asked for; "
    "at one scale equal to the settings that the policy gives, worked out by hand",
)
class HyperRule(Policy):
    """A rule that sets hyperparameters from the scale of a run, from settings that are known to be good elsewhere.

    A policy gives :meth:`settings`, and :meth:`example` for its law.
    """

    def settings(self, scale: Scale) -> Settings:
        """The settings for a run of ``scale``.

        Raises:
            UsageError: the rule cannot serve that scale.
        """
        raise NotImplementedError

    @classmethod
    def example(cls) -> tuple[Self, Scale, Settings]:
        """A rule of this kind, a scale, and the settings that the rule has for it.

        Work them out by hand, or take them from the paper: the law holds the code against them.
        """
        raise unwritten(cls, "example()", "return a rule, a scale, and the settings for it")
