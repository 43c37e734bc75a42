"""The answer that has the most of the scorer's weight."""

from __future__ import annotations

from pydantic import PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search
from penstock.search.shared.voting import elected, weights


@policy("search.program", "weighted_majority", papers=[93])
class WeightedMajority(Program):
    """Draws ``n`` texts, each of which votes for its answer with its score; where scores are negative, with exp(score)
    (ours)."""

    n: PositiveInt = 8

    async def run(self, search: Search) -> Branch | None:
        samples = await search.judge(await search.sample(self.n))
        return elected(samples, weights(samples))

    @classmethod
    def limit(cls) -> Program:
        return cls(n=1)
