"""A switch between short and long reasoning, problem by problem."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search
from penstock.search.shared.asking import chances


@policy("search.program", "cot_switch", papers=[128])
class ThoughtSwitch(Program):
    """Asks the model, for the price of one token, whether a problem needs to be thought through, and draws ``n`` texts
    behind ``long`` where it says so, and behind ``short`` where it does not; each behind a prefix of its own, so that
    they differ. The scorer chooses among them.

    From the paper: the switch, and prefixes for parallel samples. Ours: the switch is a question, and prefixes are
    texts, where the paper trains both. Not built: that training.

    Attributes:
        n: texts.
        threshold: the chance of yes from which on it is thought through.
        question, yes, no: what is asked, and its replies; without a question all are thought through.
        long, short: what a text stands behind.
        prefixes: what stands before that, in turn.
    """

    n: PositiveInt = 4
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    question: str = "\n\nDoes this have to be thought through? Yes or no?\n"
    yes: str = "yes"
    no: str = "no"
    long: str = "\n\nStep by step:\n"
    short: str = "\n\nAnswer:\n"
    prefixes: tuple[str, ...] = ()

    async def run(self, search: Search) -> Branch | None:
        needed = 1.0
        if self.question:
            question = search.root.fork(1)[0].ask(self.question)
            question.fate = "aside"
            (needed,) = await chances(search, [question], self.yes, self.no)
        search.notes |= {"needed": needed, "long": needed >= self.threshold}
        prompt = self.long if search.notes["long"] else self.short
        heads = [prefix + prompt for prefix in self.prefixes or ("",)]
        begun = [search.root.fork(1)[0] for _ in heads[: self.n]]
        for branch, head in zip(begun, heads, strict=False):
            if head:
                branch.ask(head)
        counts = [len(range(place, self.n, len(begun))) for place in range(len(begun))]
        texts = [text for branch, count in zip(begun, counts, strict=True) for text in branch.fork(count)]
        return search.best(await search.judge(await search.extend(texts)))

    @classmethod
    def limit(cls) -> Program:
        return cls(n=1, question="", long="")
