"""Value-guided decoding: samples from p(x) exp(value(x) / alpha), block by block."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search
from penstock.search.shared.allotting import prune
from penstock.search.shared.resampling import normalised


@policy("search.program", "value_guided")
class ValueGuided(Program):
    """Draws ``candidates`` for the next step and goes on with one of them, drawn with the chance exp(score / alpha)
    among them, until the text ends (block-wise controlled decoding, Mudgal et al. 2024). With many candidates a step
    has the distribution p(step) exp(score / alpha) / Z; with one it is the model's own.

    Attributes:
        candidates: of each step.
        alpha: the price of leaving the model: small ones follow the score.
        steps: at most.
    """

    candidates: PositiveInt = 4
    alpha: PositiveFloat = 0.1
    steps: PositiveInt = 64

    async def run(self, search: Search) -> Branch | None:
        branch = search.root
        for _ in range(self.steps):
            drawn = await search.judge(await search.extend(branch.fork(self.candidates), step=True))
            branch = drawn[search.choose(normalised([each.worth / self.alpha for each in drawn]))]
            prune(drawn, [branch])
            if branch.finished or search.exhausted:
                break
        return branch

    @classmethod
    def limit(cls) -> Program:
        return cls(candidates=1)
