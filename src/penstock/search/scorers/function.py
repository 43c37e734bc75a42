"""A user's own function, in a sandbox."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from penstock.core.errors import UsageError
from penstock.core.files import read_text
from penstock.policy import policy
from penstock.search.scorers.contract import Candidate, Problem, Scorer, Verdict
from penstock.search.scorers.sandbox import Limits, sandboxed


@policy("search.scorer", "function")
class Function(Scorer):
    """The function ``score(problem, text)`` of a Python file: it is given the line of the problem as a dict, and gives
    a number. It runs without this program's packages, in the sandbox, each text in a process of its own.

    Attributes:
        path: the file.
        limits: of each text.
    """

    path: Path = Field(examples=[Path(__file__).with_name("example_score.py")])
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _defines_score(self) -> Function:
        text = read_text(self.path)
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            raise UsageError(f"{self.path} is not Python: {error}") from error
        if not any(isinstance(node, ast.FunctionDef) and node.name == "score" for node in tree.body):
            raise UsageError(
                f"{self.path} defines no function score", hint="Write one: def score(problem, text): return 1.0 or 0.0"
            )
        return self

    def score(self, problem: Problem, candidates: Sequence[Candidate]) -> list[float | Verdict]:
        texts = [each.text for each in candidates]
        return [*sandboxed("function", read_text(self.path), problem, texts, self.limits)]

    @classmethod
    def example(cls) -> tuple[Scorer, Problem, list[Candidate], list[float]]:
        scorer = cls(path=Path(__file__).with_name("example_score.py"))
        return scorer, {"target": 6}, [Candidate("2 * 3", ""), Candidate("2 + 3", "")], [1.0, 0.0]
