"""The house: its rows from top to bottom, and which module imports which, read from the source.

A *row* is a top-level package or module; a *room* is a package within a row, or within another room.
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
    """(module, module or package that it imports) below ``source``, both without the package's own name. Of a package
    that is not there, the first part."""
    paths = {".".join(path.relative_to(source).with_suffix("").parts): path for path in sorted(source.rglob("*.py"))}
    there = {*paths, *(name.removesuffix(".__init__") for name in paths)}
    for module, path in paths.items():
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            while name not in there and "." in name:
                name = name.rpartition(".")[0]
            yield module, name


def row(module: str) -> str:
    """The row of the house in which ``module`` lies: the first part of its name."""
    return module.split(".")[0]


def room(module: str) -> str:
    """The room of ``module`` in its row, such as ``pipeline.run``; a loose module is a room of its own."""
    return ".".join(module.split(".")[:2])


def beside(one: str, other: str) -> tuple[str, str]:
    """The modules or packages, side by side in the innermost package that holds both, which ``one`` and ``other`` are
    or lie in. A package's own ``__init__`` is the package."""
    first, second = one.removesuffix(".__init__").split("."), other.removesuffix(".__init__").split(".")
    shared = 0
    while shared < min(len(first), len(second)) and first[shared] == second[shared]:
        shared += 1
    return ".".join(first[: shared + 1]), ".".join(second[: shared + 1])
