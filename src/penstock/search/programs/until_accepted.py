"""Sampling until a verifier accepts."""

from __future__ import annotations

from pydantic import PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search


@policy("search.program", "until_accepted", papers=[344])
class UntilAccepted(Program):
    """Draws text after text until the scorer, a verifier that may be wrong, accepts one.

    From the paper: accuracy has a ceiling that no budget lifts, right / (right + passed), where ``passed`` is how often
    a draw is wrong and accepted; and with a cost for wrong answers the best number of tries is finite, often below ten,
    which is what ``tries`` is for: ``penstock plan tries`` chooses it by how often the verifier is wrong, and shows the
    ceiling.

    Attributes:
        tries: texts at most.
        least: the score from which on a text is accepted.
    """

    tries: PositiveInt = 8
    least: float = 1.0

    async def run(self, search: Search) -> Branch | None:
        tried: list[Branch] = []
        while len(tried) < self.tries and not search.exhausted:
            tried += await search.judge(await search.extend(search.root.fork(1)))
            if tried[-1].worth >= self.least:
                break
        search.notes |= {"tries": len(tried), "accepted": tried[-1].worth >= self.least}
        return tried[-1] if search.notes["accepted"] else search.best(tried)

    @classmethod
    def limit(cls) -> Program:
        return cls(tries=1)
