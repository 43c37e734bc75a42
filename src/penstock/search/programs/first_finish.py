"""The sample that ends first."""

from __future__ import annotations

from pydantic import PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search


@policy("search.program", "first_finish", papers=[352])
class FirstFinish(Program):
    """Draws ``n`` texts side by side, takes the one that ends first, and stops the others at once: correct reasoning
    tends to be the shorter one. It needs no scorer.

    From the paper: all of it. Ours: first is counted in tokens, not in seconds, and of equals the first in order wins,
    so that the same seed gives the same answer whatever else the engine does.
    """

    n: PositiveInt = 4

    async def run(self, search: Search) -> Branch | None:
        return await search.first(search.root.fork(self.n))

    @classmethod
    def limit(cls) -> Program:
        return cls(n=1)
