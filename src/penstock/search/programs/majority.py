"""The answer that most samples give."""

from __future__ import annotations

from pydantic import PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search
from penstock.search.shared.voting import elected


@policy("search.program", "majority", papers=[93])
class Majority(Program):
    """Draws ``n`` texts and takes the answer that most of them give (self-consistency, Wang et al. 2022). It needs no
    scorer."""

    n: PositiveInt = 8

    async def run(self, search: Search) -> Branch | None:
        return elected(await search.sample(self.n))

    @classmethod
    def limit(cls) -> Program:
        return cls(n=1)
