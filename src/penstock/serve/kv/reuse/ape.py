"""Contexts beside each other."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field

from penstock.policy import policy
from penstock.serve.kv.reuse.contract import Reuse, Weighing


@policy("kv.reuse", "ape", papers=[340])
class AdaptiveParallelEncoding(Reuse):
    """Encodes each context by itself, behind the prompt's shared tokens, so that its keys and values can be taken from
    the cache in any order and beside any others (Adaptive Parallel Encoding).

    From the paper [340]: contexts are encoded behind a shared prefix, all at the same positions, and what follows
    stands behind the longest of them; attention to contexts has a temperature below 1, and a scaling factor, by which
    its distribution is brought near to that of contexts in a row. Our reading: scores of contexts are divided by the
    temperature, and the logarithm of the sum of their exponentials is multiplied by the factor, over all contexts of a
    request together; what stands before and behind the contexts is attended to as ever. Ours: a context is a text of
    the prefix tree, with its last block, be it full or not; so it is shared by requests at the same time, evicted, and
    brought back from the host's memory and the disk as all others. So is what stands behind contexts, for requests that
    have the same ones in any order.

    Attributes:
        temperature: of the scores of contexts.
        scale: of their log-sum-exp.
    """

    temperature: Annotated[float, Field(gt=0, le=2)] = 0.9
    scale: Annotated[float, Field(gt=0, le=2)] = 0.9

    @property
    def weighing(self) -> Weighing | None:
        return Weighing(self.temperature, self.scale)

    def limit(self) -> Self:
        return self.model_copy(update={"temperature": 1.0, "scale": 1.0})
