"""Repeated sampling: how many problems some sample solves."""

from __future__ import annotations

from pydantic import PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search


@policy("search.program", "coverage", papers=[314])
class Coverage(Program):
    """Draws ``n`` texts and has all of them judged by a scorer that knows, such as tests: one is right where its score
    is 1. What is noted are ``samples`` and ``right``; :mod:`penstock.search.coverage` makes of them, over all problems,
    the unbiased pass@k and its fitted power law, as ``penstock search`` prints them.

    From the paper: sampling with a verifier, the estimate, the law log c = a k^b. A sample that the budget cut off
    counts as wrong.
    """

    n: PositiveInt = 32

    async def run(self, search: Search) -> Branch | None:
        samples = await search.judge(await search.sample(self.n))
        search.notes |= {"samples": len(samples), "right": sum(each.score == 1 for each in samples)}
        return search.best(samples)

    @classmethod
    def limit(cls) -> Program:
        return cls(n=1)
