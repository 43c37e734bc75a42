"""Elastic budgets: so many tokens to think, so many to answer."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search
from penstock.search.shared.asking import reopened


@policy("search.program", "elastic", papers=[445])
class Elastic(Program):
    """Draws one text in two parts with a budget each: a thought, which is closed for the model where its tokens run
    out, and a solution, which always has its own.

    From the paper: both budgets, and the forced end of the thought. Ours: a text that ends within its thought is closed
    too, so that there is always a solution; the budget of the search is a further limit, which may leave none. Not
    built: the training that gets a model used to thoughts that are cut off.

    Attributes:
        thinking: tokens of the thought, at most; with 0 there is none, and nothing is opened or closed.
        solution: tokens of the solution, at most.
        opening: what begins a thought, if the prompt does not.
        closing: what ends it.
    """

    thinking: NonNegativeInt = 512
    solution: PositiveInt = 512
    opening: str = ""
    closing: str = "</think>"

    async def run(self, search: Search) -> Branch | None:
        branch = search.root.fork(1)[0]
        if self.thinking:
            if self.opening:
                branch.append(self.opening)
            begun = len(branch.tokens)
            await branch.extend(tokens=self.thinking, text=self.closing)
            search.notes["thinking"] = len(branch.tokens) - begun
            search.notes["forced"] = self.closing not in branch.text
            branch = reopened(branch).ask(self.closing if search.notes["forced"] else "")
        return await branch.extend(tokens=self.solution)

    @classmethod
    def limit(cls) -> Program:
        return cls(thinking=0, solution=1 << 30)
