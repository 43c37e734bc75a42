"""An example of a scorer's file: is the text an expression with the value that the problem names?"""

from __future__ import annotations

import ast
from typing import Any


def score(problem: dict[str, Any], text: str) -> float:
    """1 where the text has the value ``problem["target"]``, else 0."""
    tree = ast.parse(text.strip(), mode="eval")
    return float(eval(compile(tree, "text", "eval"), {"__builtins__": {}}) == problem["target"])
