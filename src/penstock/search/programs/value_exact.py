"""Exact samples from p(x) exp(reward(x) / alpha), by rejection."""

from __future__ import annotations

import math

from pydantic import PositiveFloat, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search


@policy("search.program", "value_exact")
class ValueExact(Program):
    """Draws whole texts and accepts each with the chance exp((score - best) / alpha), where ``best`` is no less than
    any score: the first that is accepted is an exact sample from p(x) exp(score(x) / alpha) / Z, as tuning by reward
    with a penalty on leaving the model would give. After ``tries`` without one, the best of them is the answer, and
    ``accepted`` is noted as false.

    Attributes:
        alpha: the price of leaving the model.
        best: a bound on scores. A score above it counts as it.
        tries: texts at most.
        together: texts that are drawn side by side; those behind an accepted one are not used.
    """

    alpha: PositiveFloat = 0.5
    best: float = 1.0
    tries: PositiveInt = 16
    together: PositiveInt = 4

    async def run(self, search: Search) -> Branch | None:
        tried: list[Branch] = []
        search.notes["accepted"] = False
        while len(tried) < self.tries and not search.exhausted:
            count = min(self.together, self.tries - len(tried))
            for branch in await search.judge(await search.extend(search.root.fork(count))):
                tried.append(branch)
                chance = math.exp(min(0.0, (branch.worth - self.best) / self.alpha))
                if branch.finished and search.choose([chance, 1 - chance]) == 0:
                    search.notes["accepted"] = True
                    return branch
        return search.best(tried)

    @classmethod
    def limit(cls) -> Program:
        return cls(tries=1)
