"""Several small beams instead of a wide one."""

from __future__ import annotations

from pydantic import PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.programs.beam import grown
from penstock.search.search import Search


@policy("search.program", "dvts")
class DiverseVerifierTreeSearch(Program):
    """``trees`` beams of ``expand`` texts each, which do not compete with one another: of each only the best text goes
    on, step by step (diverse verifier tree search, Beeching et al. 2024). The answer is the best of all.

    Attributes:
        trees: how many.
        expand: texts of each.
        steps: at most.
    """

    trees: PositiveInt = 4
    expand: PositiveInt = 4
    steps: PositiveInt = 64

    async def run(self, search: Search) -> Branch | None:
        works = (grown(search, root, self.expand, self.expand, self.steps) for root in search.root.fork(self.trees))
        return search.best(each for beam in await search.together(works) for each in beam)

    @classmethod
    def limit(cls) -> Program:
        return cls(trees=1, expand=1)
