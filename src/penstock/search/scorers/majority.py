"""What the others say too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from penstock.policy import policy
from penstock.search.scorers.contract import Candidate, Problem, Scorer, Verdict


@policy("search.scorer", "majority")
class Majority(Scorer):
    """The share of the finished texts scored together that give the same answer (self-consistency, Wang et al. 2022);
    0 for a text that has not ended or has no answer."""

    def score(self, problem: Problem, candidates: Sequence[Candidate]) -> list[float | Verdict]:
        votes = Counter(each.answer for each in candidates if each.finished and each.answer)
        total = max(1, votes.total())
        return [votes[each.answer] / total if each.finished and each.answer else 0.0 for each in candidates]

    @classmethod
    def example(cls) -> tuple[Scorer, Problem, list[Candidate], list[float]]:
        texts = [Candidate("a 1", "1"), Candidate("b 1", "1"), Candidate("2", "2"), Candidate("1", "1", finished=False)]
        return cls(), {}, [*texts, Candidate("", "")], [2 / 3, 2 / 3, 1 / 3, 0.0, 0.0]
