"""Parallel, distill, refine: drafts become notes, and notes the next draft."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search


@policy("search.program", "pdr", papers=[96])
class ParallelDistillRefine(Program):
    """In each round ``drafts`` texts are drawn in parallel, the model distils them into notes of at most ``workspace``
    tokens, and writes an answer behind the problem and the notes alone, which is handed to the drafts of the next
    round. So no context is longer than the problem, the drafts of a round, and the wording. With one draft this is
    sequential refinement. It needs no scorer.

    From the paper: the three parts, and that only the notes are handed on. Ours: the wording.

    Attributes:
        rounds: 0 for a single text.
        drafts: of each round.
        workspace: tokens of the notes, at most.
        begin: what stands before each draft, the notes, and an answer.
        distil, refine, improve: what stands between drafts and notes, notes and answer, and an answer and the next
            drafts.
    """

    rounds: NonNegativeInt = 2
    drafts: PositiveInt = 3
    workspace: PositiveInt = 256
    begin: str = "\n\n"
    distil: str = "\n\nWhat of this is right and useful, in short:\n"
    refine: str = "\n\nTherefore:\n"
    improve: str = "\n\nA better solution:\n"

    async def run(self, search: Search) -> Branch | None:
        answer: Branch | None = None
        for _ in range(self.rounds):
            begun = search.root.fork(1)[0]
            if answer is not None:
                begun.ask(self.begin + answer.text + self.improve)
            drafts = await search.extend(begun.fork(self.drafts))
            said = "".join(self.begin + each.text for each in drafts)
            notes = search.root.fork(1)[0].ask(said + self.distil)
            notes.fate = "aside"
            await notes.extend(tokens=self.workspace)
            answer = await search.root.fork(1)[0].ask(self.begin + notes.text + self.refine).extend()
        return answer if answer is not None else (await search.sample(1))[0]

    @classmethod
    def limit(cls) -> Program:
        return cls(rounds=0)
