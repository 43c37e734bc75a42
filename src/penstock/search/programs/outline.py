"""Outline, then reason."""

from __future__ import annotations

from pydantic import NonNegativeInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search
from penstock.search.shared.asking import reopened


@policy("search.program", "outline", papers=[153])
class Outline(Program):
    """One model, such as an instruct model, writes a short outline; the search's own, such as a reasoning model, works
    it out. It needs no scorer.

    From the paper: both parts. Ours: the wording, and that an outline ends where the model goes on to the solution by
    itself.

    Attributes:
        tokens: of the outline, at most; with 0 there is none.
        model: who writes it; the search's own without a name.
        sketch: what asks for an outline.
        work: what stands between the outline and the solution; an outline that comes to it ends there.
    """

    tokens: NonNegativeInt = 128
    model: str = ""
    sketch: str = "\n\nAn outline of the solution, in short:\n"
    work: str = "\n\nThe solution:\n"

    def asks(self) -> tuple[str, ...]:
        return (self.model,) if self.model else ()

    async def run(self, search: Search) -> Branch | None:
        branch = search.root.fork(1)[0]
        if self.tokens:
            outline = (branch if not self.model else search.root_of(self.model).fork(1)[0]).ask(self.sketch)
            outline.fate = "aside"
            await outline.extend(tokens=self.tokens, text=self.work or ())
            sketched, came, _ = outline.text.partition(self.work) if self.work else (outline.text, "", "")
            search.notes["outline"] = sketched
            if self.model:
                branch.ask(self.sketch + sketched + self.work)
            else:
                branch = reopened(outline).ask("" if came else self.work)
        return await branch.extend()

    @classmethod
    def limit(cls) -> Program:
        return cls(tokens=0)
