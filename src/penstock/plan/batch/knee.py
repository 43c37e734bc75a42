"""The knee of the throughput curve."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Annotated

from pydantic import Field

from penstock.core.errors import UsageError
from penstock.plan.batch.contract import Advice, BatchAdvisor, Curve, Example
from penstock.policy import policy


@policy("plan.batch", "knee", papers=[240])
class Knee(BatchAdvisor):
    """The smallest batch that comes within a few percent of the highest throughput (Batching Configuration Advisor).

    Past it, more sequences take memory and time between tokens, and give next to nothing: what decoding waits for is
    the memory's bandwidth. The memory that is left serves another replica. The advisor is the paper's; the share
    is our reading of where its plateau begins.

    Attributes:
        share: of the highest throughput.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.9

    def advise(self, curve: Curve, slowest: float | None = None) -> Advice:
        allowed = curve.largest
        if slowest is not None:
            allowed = bisect_right(range(1, allowed + 1), slowest, key=curve.seconds)
        if allowed < 1:
            what = "memory for" if curve.largest < 1 else f"a token every {slowest:g} s for"
            raise UsageError(
                f"there is not {what} even one sequence", hint="Take a larger device or shorter sequences."
            )

        def throughput(batch: int) -> float:
            return batch / curve.seconds(batch)

        ceiling = throughput(allowed)
        batch = 1 + bisect_left(range(1, allowed + 1), self.share * ceiling, key=throughput)
        batch = min(batch, allowed)  # with a share of 1, rounding may leave none that reaches it
        return Advice(batch, throughput(batch), curve.seconds(batch), ceiling)

    @classmethod
    def example(cls) -> Example:
        # 1, 2, 3, 3.2, 3.33 and 3.5 tokens/s, of which the last is too slow: three quarters of 3.33 are 2.5.
        return Example(cls(share=0.75), [1.0, 1.0, 1.0, 1.25, 1.5, 12 / 7], slowest=1.6, batch=3)
