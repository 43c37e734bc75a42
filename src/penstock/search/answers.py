"""Reading the answer off a text."""

from __future__ import annotations

import re
from collections.abc import Callable

from penstock.core.errors import UsageError


def last_line(text: str) -> str:
    """What the last line says that says anything; of ``\\boxed{...}`` in the text, what is in the last of them."""
    place = text.rfind("\\boxed{")
    if place >= 0:
        depth, begin = 1, place + len("\\boxed{")
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if not depth:
                return text[begin:end].strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def matching(pattern: str) -> Callable[[str], str]:
    """Reads the last match of a regular expression: its first group, or all of it where there is none.

    Raises:
        UsageError: it is no regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"the answer's pattern {pattern!r} is no regular expression: {error}") from error

    def read(text: str) -> str:
        found = list(compiled.finditer(text))
        return (found[-1][1 if compiled.groups else 0] or "").strip() if found else ""

    return read
