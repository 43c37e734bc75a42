"""Kinetics: test-time compute is allocated by what it costs with the reading of memory."""

from __future__ import annotations

from pydantic import PositiveInt

from penstock.models.config import DecoderConfig
from penstock.plan.hardware import Hardware
from penstock.policy import policy
from penstock.search.planners.contract import Planner
from penstock.search.prices import Prices


@policy("search.planner", "kinetics", papers=[337])
class Kinetics(Planner):
    """Counts eFLOPs: operations, and those that could have been done while keys, values and weights were read. Long
    texts and many of them make a small model read more than they make it compute, so budgets go to larger models, and,
    where attention is sparse, to longer and more texts.

    From the paper: eFLOPs, the choice among models, lengths and numbers of texts, block-sparse attention that keeps the
    best blocks. Ours, as the form is from knowledge: each text reads the prompt's keys for itself, as the ledger
    counts; what choosing blocks costs, a key a block; accuracies are what your own models drew, not a fitted law. Not
    built: attention that keeps the best blocks, in the engine. Its cache policies keep tokens, at no cost of choosing.

    Attributes:
        keep: tokens that a token looks at in a layer, at most; None for all.
        block: tokens that are chosen together.
        batch: sequences that share a reading of the weights; None leaves the weights out, as in large batches.
    """

    keep: PositiveInt | None = None
    block: PositiveInt = 16
    batch: PositiveInt | None = None

    def prices(self, model: DecoderConfig, hardware: Hardware, width: int = 2) -> Prices:
        return Prices(model, hardware, width, keep=self.keep, block=self.block, batch=self.batch)

    @classmethod
    def limit(cls) -> Planner:
        return cls(keep=1 << 30)  # more than any context: sparse attention is dense
