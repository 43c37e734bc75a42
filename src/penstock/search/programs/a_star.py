"""A*: the most promising partial text goes on."""

from __future__ import annotations

import math
from heapq import heappop, heappush

from pydantic import NonNegativeFloat, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search


@policy("search.program", "a_star", papers=[464])
class AStar(Program):
    """Best-first search over partial texts: those that are open wait in order of what they cost so far and are
    estimated to cost still; the first is forked and goes on by a step in ``expand`` ways, until a text that has ended
    comes first.

    What a text has cost is ``surprise`` times its negative log-probability; what it still costs is estimated as 1 minus
    its score, a process reward from 0 to 1. Where the estimate is never too high, the text that is found costs the
    least of all that were opened.

    From the paper: the queue, the two parts of its order, a few continuations of each. Ours, since the abstract does
    not say: how the two parts are weighted.

    Attributes:
        expand: continuations of a text.
        surprise: weight of the log-probability, 0 to go by the scores alone.
        opened: texts that are opened, at most.
    """

    expand: PositiveInt = 4
    surprise: NonNegativeFloat = 0.0
    opened: PositiveInt = 64

    async def run(self, search: Search) -> Branch | None:
        queue: list[tuple[float, int, Branch]] = [(0.0, 0, search.root)]
        for number in range(self.opened + 1):
            if not queue:
                break
            _, _, first = heappop(queue)
            search.notes["opened"] = number
            if first.finished:
                return first
            if number == self.opened or search.exhausted:
                break
            children = await search.judge(await search.extend(first.fork(self.expand), step=True))
            for child in distinct(children):
                heappush(queue, (self.cost(child), child.number, child))
        return search.best(search.leaves)

    def cost(self, branch: Branch) -> float:
        """What ``branch`` has cost, and is estimated to cost still."""
        if branch.error is not None:  # behind all others
            return math.inf
        still = 0.0 if branch.finished and self.surprise else 1 - branch.worth
        return still - self.surprise * branch.logprob

    @classmethod
    def limit(cls) -> Program:
        return cls(expand=1)


def distinct(branches: list[Branch]) -> list[Branch]:
    """Those of ``branches`` with different texts; of equal ones the first, and the others are dropped."""
    found: dict[tuple[int, ...], Branch] = {}
    for branch in branches:
        if found.setdefault(tuple(branch.tokens), branch) is not branch:
            branch.drop()
    return list(found.values())
