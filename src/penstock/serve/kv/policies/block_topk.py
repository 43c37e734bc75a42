"""Block top-k sparse attention."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from penstock.ops.paged.selection import BlockSelection
from penstock.policy import policy
from penstock.serve.kv.policies.contract import Budget, CachePolicy


@policy("kv.policy", "block_topk", papers=[337])
class BlockTopK(CachePolicy):
    """Keeps all keys and values, and lets each token that is decoded read the blocks whose mean key it likes best, each
    KV head its own.

    From the paper [337]: block top-k attention in place of dense attention, so that a token costs less and the same
    budget pays for longer and for more texts; its cost is counted with what is read
    (:class:`~penstock.search.prices.Prices`). Of its code, from knowledge: blocks of 16 tokens, which are scored by the
    mean of their keys; prompts are computed densely. Ours: a block is worth what that query head of a KV head gives it
    that gives it the most; the ``first`` and ``newest`` blocks are always read, within the budget. Not built: mean keys
    that are kept beside the blocks, and a kernel that reads nothing but what is chosen: the readable backend makes the
    means anew in each step, of all keys, so it shows what the choice costs in quality, and not in time.

    No memory is freed: for that, see policies that evict tokens. What follows a prompt is found again in the cache
    by forks, not by later prompts that begin with it, which are computed densely.

    Attributes:
        budget: up to 1 the share of the tokens up to itself that a token reads, above it their number; in whole blocks,
            rounded up.
        block: tokens of a block.
        first: how many of the first blocks are always read.
        newest: how many of the newest blocks are, the token's own among them.
    """

    budget: Budget = 0.25
    block: PositiveInt = 16
    first: NonNegativeInt = 1
    newest: PositiveInt = 2

    @property
    def compresses(self) -> bool:
        return False

    @property
    def selection(self) -> BlockSelection:
        return BlockSelection(self.block, self.budget, self.first, self.newest)

    def limit(self) -> CachePolicy:
        return self.model_copy(update={"budget": 1.0})

    def due(self, prompt: int, computed: int, dropped: int) -> int | None:
        return None
