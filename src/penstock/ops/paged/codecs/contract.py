"""The contract ``kv.codec``: how a key or a value of one head lies in a block.

The code of a vector depends on nothing but the vector and on what was learned of its layer and head before the first
request: not on its block, nor on the tokens beside it. So a block can be shared, copied, cut and filled again, and a
token is attended to with the same numbers by everybody. A new token's own key and value are coded before it attends to
them, so that a prompt gives the same numbers in chunks of any size.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from penstock.policy import Policy, contract


class Stored(NamedTuple):
    """What one vector lies in: so many ``numbers`` of a dtype."""

    numbers: int
    dtype: torch.dtype


@contract(
    "kv.codec",
    law="a round trip changes no number by more than the bound that the policy gives; the same code for the same "
    "vector, whatever is coded beside it; blocks take exactly the bytes of the formula; attention over coded blocks "
    "equals plain attention over the decoded keys and values; tokens of a batch identical to those of the request "
    "decoded alone over decoded keys and values, for any arrivals, forks, shared prefixes and preemptions; the same "
    "where caches are compressed, and where the newest tokens are in full precision, whose memory takes the bytes of "
    "its formula; a window that covers all gives the tokens of a plain cache",
)
class Codec(Policy):
    """A way to store keys and values, vector by vector: one for each token and KV head.

    Attributes:
        residual: the newest tokens of a sequence, up to so many, are read as the model computed them. Once there are so
            many, all are read as they are coded, and the next ones begin anew, see :mod:`penstock.ops.paged.residual`.
    """

    residual: NonNegativeInt = 0

    #: Whether a vector with NaN or infinity comes back with NaN.
    holds_nan: ClassVar[bool] = True

    def stored(self, head_dim: int, dtype: torch.dtype) -> Stored:
        """What a vector of ``head_dim`` numbers of ``dtype``, the model's, lies in."""
        raise NotImplementedError

    def lacks(self, head_dim: int) -> str | None:
        """None where it can code vectors of so many numbers, else why not, as a clause."""
        return None

    def encode(self, vectors: Tensor, table: Tensor | None = None) -> Tensor:
        """``vectors`` [..., K, D] of K heads as they are stored: [..., K, n]. ``table`` is what was learned of
        their layer, and of keys or of values."""
        raise NotImplementedError

    def decode(self, stored: Tensor, head_dim: int, dtype: torch.dtype, table: Tensor | None = None) -> Tensor:
        """The vectors [..., K, D] that are ``stored`` [..., K, n], in ``dtype``."""
        raise NotImplementedError

    def bound(self, vectors: Tensor, table: Tensor | None = None) -> Tensor:
        """The most that each number of ``vectors``, in float64, may differ from what comes back of it."""
        raise NotImplementedError

    def vector_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that a vector takes."""
        numbers, stored = self.stored(head_dim, dtype)
        return numbers * stored.itemsize


class LearnedCodec(Codec):
    """A codec whose tables are learned of the keys and values that a model computes of some text, once, before its
    cache is opened; :mod:`penstock.serve.calibration` does so and keeps them.

    Attributes:
        tokens: how many tokens of text are learned from.
        text: a file of text to learn from; None is the source of Python's standard library.
    """

    tokens: PositiveInt = Field(4096, ge=64)
    text: Path | None = None

    def learn(self, vectors: Tensor) -> Tensor:
        """The table [K, ...] of one layer's keys, or of its values, ``vectors`` float32 [N, K, D]."""
        raise NotImplementedError
