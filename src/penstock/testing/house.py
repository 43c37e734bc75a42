"""The house: its rows from top to bottom, and which module imports which, read from the source.

A *row* is a top-level package or module; a *room* is a package within a row.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

#: From top to bottom: a module imports from its own row and from rows above it.
ROWS = (
    "core",
    "policy",
    "papers",
    "ops",
    "models",
    "data",
    "parallel",
    "pipeline",
    "plan",
    "train",
    "speculate",
    "serve",
    "search",
    "eval",
    "flow",
    "rl",
    "testing",
    "cli",
    "__main__",
)


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of Penstock that run-time imports in ``tree`` name, those within functions too.

    ``from a import b`` gives ``a.b``, where b may be a module or not.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imported(ast.Module(node.orelse, []))
            continue
        else:
            yield from imported(node)
            continue
        yield from (name.removeprefix("penstock.") for name in names if name.startswith("penstock."))


def imports(source: Path) -> Iterator[tuple[str, str]]:
    """(module, what it imports) below ``source``, both without the package's own name."""
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            yield ".".join(parts), name


def row(module: str) -> str:
    """The row of the house in which ``module`` lies: the first part of its name."""
    return module.split(".")[0]


def room(module: str) -> str:
    """The room of ``module``: a package within a row, such as ``pipeline.run``; a loose module is a room of its own."""
    return ".".join(module.split(".")[:2])
