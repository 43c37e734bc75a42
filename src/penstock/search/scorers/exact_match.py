"""The answer is the right one, or not."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.policy import policy
from penstock.search.scorers.contract import Candidate, Problem, Scorer, Verdict


@policy("search.scorer", "exact_match", papers=[314])
class ExactMatch(Scorer):
    """1 where the answer is the problem's, but for blanks around it, else 0: the automatic verifier of repeated
    sampling.

    Attributes:
        field: of the problem, in which the right answer stands.
    """

    field: str = "answer"

    def score(self, problem: Problem, candidates: Sequence[Candidate]) -> list[float | Verdict]:
        if self.field not in problem:
            return [Verdict.failure(f"the problem has no {self.field!r}")] * len(candidates)
        right = str(problem[self.field]).strip()
        return [float(each.finished and each.answer.strip() == right) for each in candidates]

    @classmethod
    def example(cls) -> tuple[Scorer, Problem, list[Candidate], list[float]]:
        texts = [Candidate("so 12", "12 "), Candidate("so 13", "13"), Candidate("12", "12", finished=False)]
        return cls(), {"answer": 12}, texts, [1.0, 0.0, 0.0]
