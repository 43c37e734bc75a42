"""All of it."""

from __future__ import annotations

from penstock.policy import policy
from penstock.serve.kv.policies.contract import Cached, CachePolicy, Kept


@policy("kv.policy", "full")
class Full(CachePolicy):
    """Keeps the keys and values of all tokens."""

    @property
    def compresses(self) -> bool:
        return False

    def limit(self) -> CachePolicy:
        return self

    def due(self, prompt: int, computed: int, dropped: int) -> int | None:
        return None

    def keeps(self, computed: int) -> int:
        return computed

    def compress(self, cached: Cached, count: int) -> Kept:
        return Kept(cached.keys, cached.values)
