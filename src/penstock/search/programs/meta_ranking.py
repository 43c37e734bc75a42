"""Meta ranking: a weak model compares an answer with others whose worth is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import NonNegativeFloat

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.problems import tables
from penstock.search.search import Search
from penstock.search.shared.asking import chances, reopened


@policy("search.program", "meta_ranking", papers=[415])
class MetaRanking(Program):
    """Draws a text of the search's own model, and asks that model of each of the problem's ``references`` (tables with
    ``prompt``, ``answer`` and ``right``) whether its own answer is the more reliable of the two. A comparison that it
    wins counts its weight for it, and one that it loses against it, ``better`` where the reference is right and
    ``worse`` where it is wrong; where the sum is below ``threshold``, the strong model writes the answer.

    From the paper: pairwise comparison across questions with a few references, and the cascade. Ours: which weights,
    and that a comparison is won with more than half of the chance of two words. A problem without references goes to
    the strong model, since nothing is known of it.

    Attributes:
        better: weight of a comparison with a reference that is right.
        worse: weight of one with a reference that is wrong.
        threshold: the least sum that is enough.
        strong: name of the strong model; none to keep the weak one's text.
        compare: what stands between the two pairs and the reply; ``yes`` and ``no`` are the replies.
    """

    better: NonNegativeFloat = 1.0
    worse: NonNegativeFloat = 1.0
    threshold: float = 0.0
    strong: str = "strong"
    compare: str = "\n\nIs the first answer more reliable than this one: yes or no?\n"
    yes: str = "yes"
    no: str = "no"

    def check(self, problem: Mapping[str, Any]) -> None:
        tables(problem, "references", ("prompt", "answer", "right"))

    def asks(self) -> tuple[str, ...]:
        return (self.strong,) if self.strong else ()

    async def run(self, search: Search) -> Branch | None:
        (text,) = await search.sample(1)
        references = tables(search.problem, "references", ()) if self.strong else []
        begun = reopened(text) if references else text
        questions = [begun.fork(1)[0].ask(f"\n\n{_pair(each)}{self.compare}") for each in references]
        for each in [begun, *questions] if references else []:
            each.fate = "aside"
        won = [chance > 0.5 for chance in await chances(search, questions, self.yes, self.no)]
        worth = self.total(won, references)
        search.notes |= {"worth": worth, "escalated": bool(self.strong) and (worth < self.threshold or not references)}
        if search.notes["escalated"]:
            return await search.root_of(self.strong).fork(1)[0].extend()
        return text

    def total(self, won: Sequence[bool], references: Sequence[Mapping[str, Any]]) -> float:
        """The weighted votes of comparisons."""
        weights = [self.better if each["right"] else self.worse for each in references]
        return sum(weight if win else -weight for weight, win in zip(weights, won, strict=True))

    @classmethod
    def limit(cls) -> Program:
        return cls(strong="")


def _pair(reference: Mapping[str, Any]) -> str:
    return f"{reference['prompt']}\n{reference['answer']}"
