"""The share of a problem's tests that a program passes, in a sandbox."""

from __future__ import annotations

import re
from collections.abc import Sequence

from penstock.policy import policy
from penstock.search.scorers.contract import Candidate, Problem, Scorer, Verdict
from penstock.search.scorers.sandbox import Limits, sandboxed

#: A block of code in Markdown.
BLOCK = re.compile(r"```(?:python|py)?\n(.*?)(?:```|\Z)", re.DOTALL)


@policy("search.scorer", "unit_tests", papers=[314])
class UnitTests(Scorer):
    """Runs each text as a Python program, behind the problem's ``code`` if it has any, and then its ``tests``, each a
    string of Python such as ``assert add(1, 2) == 3``; the score is the share that passes. Of a text with blocks of
    code in Markdown, the last block is the program. Programs run in the sandbox, each in a process of its own.

    Attributes:
        whole: count only a program that passes all of its tests.
        limits: of each program with its tests.
    """

    whole: bool = False
    limits: Limits = Limits()

    def score(self, problem: Problem, candidates: Sequence[Candidate]) -> list[float | Verdict]:
        tests = problem.get("tests")
        tests = [tests] if isinstance(tests, str) else tests
        if not isinstance(tests, list) or not tests or not all(isinstance(each, str) for each in tests):
            return [Verdict.failure("the problem has no 'tests', a list of strings")] * len(candidates)
        programs = [str(problem.get("code", "")) + _program(each.text) for each in candidates]
        found = sandboxed("tests", tests, {}, programs, self.limits)
        if not self.whole:
            return [*found]
        return [each if each.error is not None else float(each.score == 1) for each in found]

    @classmethod
    def example(cls) -> tuple[Scorer, Problem, list[Candidate], list[float]]:
        problem = {"tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}
        texts = [f"def add(a, b):\n    return {sum}\n" for sum in ("a + b", "a * b", "1 / 0")]
        return cls(), problem, [Candidate(text, "") for text in texts], [1.0, 0.5, 0.0]


def _program(text: str) -> str:
    blocks = BLOCK.findall(text)
    return str(blocks[-1]) if blocks else text
