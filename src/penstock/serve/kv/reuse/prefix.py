"""Contexts in a row."""

from __future__ import annotations

from typing import Self

from penstock.policy import policy
from penstock.serve.kv.reuse.contract import Reuse, Weighing


@policy("kv.reuse", "prefix")
class PrefixReuse(Reuse):
    """Encodes contexts one behind the other, as a part of the prompt: what is reused is its longest known prefix.

    Nothing is lost in quality, and of contexts that come in another order nothing is found behind the first one that
    differs.
    """

    @property
    def weighing(self) -> Weighing | None:
        return None

    def limit(self) -> Self:
        return self
