"""The best of n samples."""

from __future__ import annotations

from pydantic import PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search


@policy("search.program", "best_of_n", papers=[93])
class BestOfN(Program):
    """Draws ``n`` texts and takes the one that the scorer likes best."""

    n: PositiveInt = 8

    async def run(self, search: Search) -> Branch | None:
        return search.best(await search.judge(await search.sample(self.n)))

    @classmethod
    def limit(cls) -> Program:
        return cls(n=1)
