"""Retrieval-scaled generation: documents, examples and rounds of searching as a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import NonNegativeInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.problems import texts
from penstock.search.search import Search
from penstock.search.shared.retrieving import nearest


@policy("search.program", "retrieval", papers=[345])
class Retrieval(Program):
    """Answers behind ``documents`` of the problem's own that fit it best, and ``shots`` of its worked examples. In each
    of ``rounds`` before that, the model writes a question of its own, and what fits it is added to the documents
    (IterDRAG; without rounds it is DRAG). How a budget is best shared out among the three is fitted and predicted by
    ``penstock plan retrieval``.

    From the paper: the three ways to spend, both strategies, the model of allocation. Ours: documents are found by
    BM25, where the paper embeds them; a round writes one question, which is not answered on its own; the wording. The
    problem has its ``documents`` and ``shots`` as lists of texts; what it lacks is left out.

    Attributes:
        documents: that are found for each question.
        shots: examples.
        rounds: questions of the model's own.
        inquire: what asks for a question, which ends with its line.
        answer: what stands between all that and the answer; with nothing found, the prompt stands alone.
    """

    documents: NonNegativeInt = 2
    shots: NonNegativeInt = 1
    rounds: NonNegativeInt = 1
    inquire: str = "\n\nWhat has to be looked up:\n"
    answer: str = "\n\nAnswer:\n"

    def check(self, problem: Mapping[str, Any]) -> None:
        texts(problem, "documents")
        texts(problem, "shots")

    async def run(self, search: Search) -> Branch | None:
        library = texts(search.problem, "documents")
        shots = texts(search.problem, "shots")[: self.shots]
        prompt = search.root.texts.decode(search.root.tokens)
        found = nearest(prompt, library, self.documents)
        search.notes["questions"] = []
        for _ in range(self.rounds):
            question = search.root.fork(1)[0].ask(self._shown(library, found, shots) + self.inquire)
            question.fate = "aside"
            await question.extend(text="\n")
            search.notes["questions"].append(question.text.strip())
            found = list(dict.fromkeys([*found, *nearest(question.text, library, self.documents)]))
        search.notes["documents"] = found
        branch = search.root.fork(1)[0]
        if found or shots:
            branch.ask(self._shown(library, found, shots) + self.answer)
        await branch.extend()
        if "" in search.scorers:  # it has nothing to choose: a score says what its settings are worth
            await search.judge([branch])
        return branch

    def _shown(self, library: Sequence[str], found: Sequence[int], shots: Sequence[str]) -> str:
        return "".join(f"\n\n{text}" for text in [*shots, *(library[place] for place in found)])

    @classmethod
    def limit(cls) -> Program:
        return cls(documents=0, shots=0, rounds=0)
