"""Sampling until one more sample is not worth it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.coverage import saturation
from penstock.search.search import Search


@policy("search.program", "saturation", papers=[350])
class Saturation(Program):
    """Draws as many texts as are worth it, and takes the best: accuracy is taken to grow as ceiling (1 - (1 - rate)^n),
    and the samples end at the first n after which the next one would gain less than ``threshold``.

    From the paper: the law and its saturation point. Ours: that ``ceiling`` and ``rate`` are options, as
    ``penstock search --program coverage`` prints them where the scorer knows what is right. Not built: sequential
    rethinking, the other of the paper's two axes.

    Attributes:
        ceiling: accuracy that no number of samples exceeds.
        rate: the chance that a further sample turns what is left.
        threshold: the least gain that is worth a sample.
        most: samples at most.
    """

    ceiling: Annotated[float, Field(gt=0, le=1)] = 1.0
    rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.02
    most: PositiveInt = 64

    async def run(self, search: Search) -> Branch | None:
        n = min(self.most, max(1, saturation(self.ceiling, self.rate, self.threshold)))
        search.notes["n"] = n
        return search.best(await search.judge(await search.sample(n)))

    @classmethod
    def limit(cls) -> Program:
        return cls(most=1)
