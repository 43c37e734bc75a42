"""Errors that a law demands."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from penstock.core.errors import PenstockError


@contextlib.contextmanager
def refused(error: type[PenstockError], part: str) -> Iterator[None]:
    """Asserts that the block raises ``error``, with ``part`` in its message."""
    try:
        yield
    except error as raised:
        assert part in str(raised), f"the refusal does not say {part!r}: {raised}"
    else:
        raise AssertionError(f"nothing is refused where {part!r} should be said")
