"""The contract ``search.scorer``: what a text is worth."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from penstock.policy import Policy, contract, unwritten

#: What is known of a problem.
Problem = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A text that is scored.

    Attributes:
        text: behind the prompt.
        answer: what the search reads off it.
        finished: whether it has ended; else it is a part of a solution.
        logprob: its log-probability under the model.
        certainty: the mean self-certainty of its tokens, in nats.
    """

    text: str
    answer: str
    finished: bool = True
    logprob: float = 0.0
    certainty: float = 0.0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a scorer said of a text: a number, or why it could not say any."""

    score: float
    error: str | None = None

    @classmethod
    def failure(cls, why: str) -> Verdict:
        """There is no score; 0 stands for it."""
        return cls(0.0, why)


@contract(
    "search.scorer",
    law="a finite number for each text, those of the policy's example, worked out by hand; the same for the same "
    "texts; a text that cannot be scored, or makes its scorer raise, hang, fork or fill the memory, or is run and ends "
    "what judges it, fails alone, with the reason; no process is left; a text that is run sees no processes but its "
    "own",
)
class Scorer(Policy):
    """Says what texts are worth; more is better. It is called beside the engine, in a thread of its own."""

    def open(self) -> None:
        """Makes ready what it judges with, such as a model, before anything is drawn.

        Raises:
            PenstockError: it is not there, or is none.
        """

    def __call__(self, problem: Problem, candidates: Sequence[Candidate]) -> list[float | Verdict]:
        """:meth:`score`."""
        return self.score(problem, candidates)

    def score(self, problem: Problem, candidates: Sequence[Candidate]) -> list[float | Verdict]:
        """A number for each of the ``candidates``, which are scored together; or a verdict that one failed."""
        raise NotImplementedError

    @classmethod
    def example(cls) -> tuple[Scorer, Problem, list[Candidate], list[float]]:
        """A scorer, a problem, candidates, and their scores, worked out by hand."""
        raise unwritten(cls, "example()", "return a scorer, a problem, candidates and the scores that they must have")


#: What scores: a policy's method, or a function of a user's.
Scoring = Callable[[Problem, Sequence[Candidate]], Sequence[float | Verdict]]


@dataclasses.dataclass(frozen=True)
class Single:
    """Scores each text by itself, with a user's ``function`` of the problem and a text, which may fail on any."""

    function: Callable[[Problem, str], float]

    def __call__(self, problem: Problem, candidates: Sequence[Candidate]) -> list[float | Verdict]:
        return [self.function(problem, each.text) for each in candidates]


def verdicts(scoring: Scoring, problem: Problem, candidates: Sequence[Candidate], seconds: float) -> list[Verdict]:
    """What ``scoring`` says of the ``candidates``, whatever it does: where it raises, gives something else than a
    number for each, or takes more than so many ``seconds`` for each, they fail; of a :class:`Single`, each alone. A
    thread that hangs is left to itself."""
    if isinstance(scoring, Single):
        return [verdict for each in candidates for verdict in _together(scoring, problem, [each], seconds)]
    return _together(scoring, problem, candidates, seconds * len(candidates))


def _together(scoring: Scoring, problem: Problem, candidates: Sequence[Candidate], seconds: float) -> list[Verdict]:
    """Verdicts on ``candidates`` that are scored by one call, which has so many ``seconds``."""
    found: list[Sequence[float | Verdict]] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            found.append(list(scoring(problem, candidates)))
        except BaseException as error:  # SystemExit too: it is the scorer's own
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True, name="scorer")
    thread.start()
    thread.join(seconds)
    if raised:
        return [Verdict.failure(f"{type(raised[0]).__name__}: {raised[0]}")] * len(candidates)
    if not found:
        return [Verdict.failure(f"it took more than {seconds:g} s")] * len(candidates)
    if len(found[0]) != len(candidates):
        return [Verdict.failure(f"{len(found[0])} scores for {len(candidates)} texts")] * len(candidates)
    return [_verdict(each) for each in found[0]]


def _verdict(said: Any) -> Verdict:
    if isinstance(said, Verdict):
        return said
    try:
        number = float(said)
    except (TypeError, ValueError, OverflowError):
        return Verdict.failure(f"the score {said!r:.40} is no number")
    return Verdict(number) if math.isfinite(number) else Verdict.failure(f"the score is {number}")
