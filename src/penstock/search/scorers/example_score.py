"""An example of a scorer's file: is the text an expression with the value that the problem names?"""

import ast


def score(problem, text):
    """1 where the text has the value ``problem["target"]``, else 0."""
    tree = ast.parse(text.strip(), mode="eval")
    return float(eval(compile(tree, "text", "eval"), {"__builtins__": {}}) == problem["target"])
