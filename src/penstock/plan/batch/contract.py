"""The contract ``plan.batch``: how many sequences to decode at a time."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

from penstock.policy import Policy, contract, unwritten


class Curve(Protocol):
    """A cost of decoding steps, modelled or measured."""

    @property
    def largest(self) -> int:
        """The largest batch that there is memory for."""
        ...

    def seconds(self, batch: int) -> float:
        """Of a step with ``batch`` sequences; it does not fall with the batch, and tokens/s do not fall either."""
        ...


@dataclasses.dataclass(frozen=True)
class Advice:
    """A batch, with the tokens/s and the seconds between the tokens of a sequence that it gives, and the highest
    tokens/s that any allowed batch gives."""

    batch: int
    throughput: float
    seconds: float
    ceiling: float


class Example(NamedTuple):
    """An advisor, with its advice on one curve.

    Attributes:
        advisor: the advisor.
        seconds: of a step with 1, 2, ... sequences, up to as many as there is memory for.
        slowest: seconds allowed between tokens, None for any.
        batch: what the advisor says.
    """

    advisor: BatchAdvisor
    seconds: list[float]
    slowest: float | None
    batch: int


@contract(
    "plan.batch",
    law="the batch is at least 1, fits the memory and keeps the time allowed for a token, and where none does there is "
    "an error; the figures are the curve's; on one curve the batch that the policy gives, worked out by hand",
)
class BatchAdvisor(Policy):
    """Picks a batch.

    A policy gives :meth:`advise`, and :meth:`example` for its law.
    """

    def advise(self, curve: Curve, slowest: float | None = None) -> Advice:
        """The batch for ``curve``, with at most ``slowest`` seconds between tokens.

        Raises:
            UsageError: not even one sequence fits the memory, or keeps the time.
        """
        raise NotImplementedError

    @classmethod
    def example(cls) -> Example:
        """An advisor of this kind, and what it says of one curve.

        Work it out by hand, or take it from the paper: the law holds the code against it.
        """
        raise unwritten(cls, "example()", "return Example(advisor, seconds, slowest, batch) for one curve")
