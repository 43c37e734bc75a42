"""Adaptive sampling: the model says whether it could do better, in the middle of an answer too."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search
from penstock.search.shared.asking import asked, chances


@policy("search.program", "adaptive_sampling", papers=[400])
class AdaptiveSampling(Program):
    """Draws text after text. In its middle and at its end the model is asked whether a new one would be better, for the
    price of one token: the chance that it gives decides whether a text is given up early, whether another one is drawn,
    and, with no other judge, which one is the answer.

    From the paper: one token's probability as the judgement, pruning, stopping, choosing. Ours: the question is a text
    and two words that can be set; the paper trains the model to say a token of its own. Not built: that training, and
    its temperatures that change with the number of samples.

    Attributes:
        n: texts at most, given up ones too.
        middle: tokens after which a text is judged the first time; 0 for at its end only.
        prune: the chance of a better one above which a text is given up in its middle.
        enough: the chance of a better one below which no more are drawn.
        question: what is asked; ``yes`` and ``no`` are the replies.
    """

    n: PositiveInt = 8
    middle: NonNegativeInt = 64
    prune: Annotated[float, Field(ge=0, le=1)] = 0.8
    enough: Annotated[float, Field(ge=0, le=1)] = 0.2
    question: str = "\n\nWould a new answer be better? Yes or no?\n"
    yes: str = "yes"
    no: str = "no"

    async def run(self, search: Search) -> Branch | None:
        ended: list[Branch] = []
        for number in range(self.n):
            branch = search.root.fork(1)[0]
            search.notes["samples"] = number + 1
            if self.middle and number < self.n - 1:
                await branch.extend(tokens=self.middle)
                if not branch.finished:
                    begun, branch = branch, branch.fork(1)[0]
                    if await self.better(search, begun) > self.prune:
                        branch.drop()
                        continue
            ended.append(await branch.extend())
            better = await self.better(search, branch)
            branch.score = 1 - better
            if better < self.enough:
                break
        return search.best(ended)

    async def better(self, search: Search, branch: Branch) -> float:
        """The chance that a new text is better than ``branch``."""
        return (await chances(search, [asked(branch, self.question)], self.yes, self.no))[0]

    @classmethod
    def limit(cls) -> Program:
        return cls(n=1)
