"""Hedged sampling: one careful text beside bold ones, and one pass that chooses."""

from __future__ import annotations

import re

from pydantic import NonNegativeFloat, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search


@policy("search.program", "hedged", papers=[305])
class Hedged(Program):
    """Draws one text at the temperature ``cool`` and the others at ``hot``, shows all that differ to the model at once,
    and takes the one whose number it says; where it says none, the first, careful one. It needs no scorer.

    From the paper: few samples that vary in temperature, the greedy one among them, and a choice adapted to the task.
    From knowledge: that one pass compares all of them. Ours: the wording. Not built: the check-list that the paper's
    judge writes first, and minimum Bayes risk across languages.

    Attributes:
        n: texts.
        cool: temperature of the first; None is the search's own.
        hot: temperature of the others.
        begin: what stands before each text, with its ``{number}``.
        choose: what stands behind the numbered texts.
        reply: tokens that the model may say.
    """

    n: PositiveInt = 5
    cool: NonNegativeFloat | None = 0.0
    hot: NonNegativeFloat = 0.8
    begin: str = "\n\n{number}. "
    choose: str = "\n\nThe best one is number "
    reply: PositiveInt = 4

    async def run(self, search: Search) -> Branch | None:
        texts = search.root.fork(1, temperature=self.cool)
        if self.n > 1:
            texts += search.root.fork(self.n - 1, temperature=self.hot)
        await search.extend(texts)
        first: dict[str, Branch] = {}
        for each in texts:
            first.setdefault(each.text, each)
        unlike = list(first.values())
        search.notes["unlike"] = len(unlike)
        if len(unlike) == 1:
            return texts[0]
        shown = "".join(
            self.begin.replace("{number}", str(number)) + each.text for number, each in enumerate(unlike, 1)
        )
        question = search.root.fork(1)[0].ask(shown + self.choose)
        question.fate = "aside"
        await question.extend(tokens=self.reply)
        return unlike[chosen(question.text, len(unlike))]

    @classmethod
    def limit(cls) -> Program:
        return cls(n=1, cool=None)


def chosen(text: str, count: int) -> int:
    """The place that the first number in ``text`` names, counted from 0; 0 where it names none of ``count``."""
    found = re.search(r"\d+", text)
    number = int(found[0]) if found else 1
    return number - 1 if 1 <= number <= count else 0
