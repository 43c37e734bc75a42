"""The contract ``plan.batch``: how many sequences to decode at a time."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from penstock.policy import Policy, contract


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


@contract(
    "plan.batch",
    law="the batch is at least 1, fits the memory and keeps the time allowed for a token; the figures are the curve's",
)
class BatchAdvisor(Policy):
    """Picks a batch."""

    def advise(self, curve: Curve, slowest: float | None = None) -> Advice:
        """The batch for ``curve``, with at most ``slowest`` seconds between tokens.

        Raises:
            UsageError: not even one sequence fits the memory, or keeps the time.
        """
        raise NotImplementedError
