"""A cascade by agreement: where a weak model is of one mind, the strong one is not asked."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search
from penstock.search.shared.voting import elected


@policy("search.program", "cascade", papers=[175])
class Cascade(Program):
    """Draws ``n`` texts of the search's own model, the weak one, in each of several formats. Where the share of them
    that give the most frequent answer reaches ``least``, that is the answer; else the strong model writes it.

    From the paper: agreement of sampled answers as the sign of an easy problem, voting over two formats of thought,
    in words and in programs. Ours: what asks for a format is a text; a program is read like any other text, not run.

    Attributes:
        n: texts in each format.
        formats: what stands behind the prompt to ask for each.
        least: the share of equal answers that is enough.
        strong: name of the strong model.
    """

    n: PositiveInt = 4
    formats: Annotated[tuple[str, ...], Field(min_length=1)] = ("",)
    least: Annotated[float, Field(ge=0, le=1)] = 0.75
    strong: str = "strong"

    def asks(self) -> tuple[str, ...]:
        return (self.strong,) if self.least > 0 else ()

    async def run(self, search: Search) -> Branch | None:
        begun = [search.root.fork(1)[0] for _ in self.formats]
        for branch, form in zip(begun, self.formats, strict=True):
            if form:
                branch.ask(form)
        texts = await search.extend([text for branch in begun for text in branch.fork(self.n)])
        found = elected(texts)
        agreed = 0.0 if found is None else sum(each.finished and each.answer == found.answer for each in texts)
        search.notes |= {"agreement": agreed / len(texts), "escalated": agreed / len(texts) < self.least}
        if search.notes["escalated"]:
            return await search.root_of(self.strong).fork(1)[0].extend()
        return found or texts[0]

    @classmethod
    def limit(cls) -> Program:
        return cls(n=1, least=0.0)
