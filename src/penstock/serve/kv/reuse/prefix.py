"""Contexts in a row."""

from __future__ import annotations

from penstock.policy import policy
from penstock.serve.kv.reuse.contract import Reuse


@policy("kv.reuse", "prefix")
class PrefixReuse(Reuse):
    """Encodes contexts one behind the other, as a part of the prompt: what is reused is its longest known prefix.

    Nothing is lost in quality, and of contexts that come in another order nothing is found behind the first one that
    differs.
    """
