"""Kinetics: test-time compute is allocated by what it costs with the reading of memory."""

from __future__ import annotations

from pydantic import PositiveInt

from penstock.models.config import DecoderConfig
from penstock.ops.paged.selection import BlockSelection
from penstock.plan.hardware import Hardware
from penstock.policy import policy
from penstock.search.planners.contract import Planner
from penstock.search.prices import Prices


@policy("search.planner", "kinetics", papers=[337])
class Kinetics(Planner):
    """Counts eFLOPs: operations, and those that could have been done while keys, values and weights were read. Long
    texts and many of them make a small model read more than they make it compute, so budgets go to larger models, and,
    where attention is sparse, to longer and more texts.

    From the paper: eFLOPs, the choice among models, dense and block top-k attention, lengths and numbers of texts.
    Ours, as the form is from knowledge: each text reads the prompt's keys for itself, as the ledger counts; what
    choosing blocks costs, a key a block; accuracies are what your own models drew, with the attention that they drew it
    with (the cache policy ``block_topk``, or dense), not a fitted law. Other cache policies count as dense.

    Attributes:
        batch: sequences that share a reading of the weights; None leaves the weights out, as in large batches.
    """

    batch: PositiveInt | None = None

    def prices(
        self, model: DecoderConfig, hardware: Hardware, width: int = 2, selection: BlockSelection | None = None
    ) -> Prices:
        return Prices(model, hardware, width, selection=selection, batch=self.batch)

    @classmethod
    def limit(cls) -> Planner:
        return cls()
