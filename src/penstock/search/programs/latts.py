"""LATTS: each step is drawn until a verifier accepts it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search


@policy("search.program", "latts", papers=[178])
class LocallyAdaptive(Program):
    """Grows one text, and accepts each step with the chance that the scorer, a verifier from 0 to 1, gives the text so
    far; so steps have the distribution p(step) score / Z, and hard ones take more draws. After ``tries`` rejections the
    step before is taken back; after ``backtracks`` of these the text begins anew; after ``restarts`` of these it stops,
    and the best of what was drawn is the answer.

    From the paper: the four ways out, by a criterion of the verifier's. Ours, since the abstract gives none: acceptance
    by chance, and the order of the ways.

    Attributes:
        tries: draws of a step, before it is given up.
        backtracks: steps that are taken back, before the text begins anew.
        restarts: beginnings anew, before the search stops.
        least: the chance of a step that the scorer gives 0.
        steps: of a text, at most.
    """

    tries: PositiveInt = 4
    backtracks: NonNegativeInt = 2
    restarts: NonNegativeInt = 1
    least: Annotated[float, Field(ge=0, le=1)] = 0.0
    steps: PositiveInt = 64

    async def run(self, search: Search) -> Branch | None:
        drawn = 0
        for _ in range(1 + self.restarts):
            line, backs, rejected = [search.root], 0, 0
            while not (line[-1].finished or len(line) > self.steps):
                if rejected == self.tries:
                    if backs == self.backtracks or len(line) == 1:
                        break
                    line.pop().drop()
                    backs, rejected = backs + 1, 0
                (step,) = await search.judge(await search.extend(line[-1].fork(1), step=True))
                drawn += 1
                search.notes["drawn"] = drawn
                chance = self.least + (1 - self.least) * min(1.0, max(0.0, step.worth))
                if search.choose([chance, 1 - chance]) == 0:
                    line.append(step)
                    rejected = 0
                else:
                    step.drop()
                    rejected += 1
            else:
                return line[-1]
        return search.best(search.leaves)

    @classmethod
    def limit(cls) -> Program:
        return cls(least=1.0)
