"""The one tree of errors that Penstock raises on purpose.

A :class:`PenstockError` is for a person: it says what was wrong, where, and what to do next. The command line
prints its message without a traceback; any other exception is a defect of Penstock and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PenstockError(Exception):
    """Something went wrong that the user can act on.

    Args:
        what: one sentence, naming the value or file at fault.
        hint: the next step that would help, if there is one.
    """

    exit_code = 1

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(f"{what}\n{hint}" if hint else what)
        self.what = what
        self.hint = hint


class UsageError(PenstockError):
    """The request itself is wrong: an unknown key, a missing path, a value out of range (exit code 2)."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration that does not validate."""


class DataError(PenstockError):
    """A corpus, token store or tokenizer that cannot be used."""


class ModelError(PenstockError):
    """A model folder whose contents do not fit its own description."""


class CheckpointError(PenstockError):
    """A checkpoint that is damaged, incomplete or of another model."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Words for an error about an unknown ``name``: the nearest known names, or all of them when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(known) if known else "none is known"
