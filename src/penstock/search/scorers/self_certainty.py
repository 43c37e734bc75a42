"""How sure the model was."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.policy import policy
from penstock.search.scorers.contract import Candidate, Problem, Scorer, Verdict


@policy("search.scorer", "self_certainty", papers=[341])
class SelfCertainty(Scorer):
    """The mean distance of the distributions that a text's tokens were drawn from to the even one, KL(uniform || model)
    in nats (self-certainty, Kang et al. 2025, by which [341] chooses among answers without thinking; the program
    ``no_thinking`` draws them). It needs no right answer and no other model."""

    def score(self, problem: Problem, candidates: Sequence[Candidate]) -> list[float | Verdict]:
        return [each.certainty for each in candidates]

    @classmethod
    def example(cls) -> tuple[Scorer, Problem, list[Candidate], list[float]]:
        return cls(), {}, [Candidate("a", "a", certainty=1.5), Candidate("b", "b", certainty=0.25)], [1.5, 0.25]
