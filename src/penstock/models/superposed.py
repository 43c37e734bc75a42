"""Rows that stand for several tokens at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from penstock.models.decoder import Decoder


class SuperposedRows(NamedTuple):
    """Some rows of a pass in whose places several tokens stand, each with its share.

    Attributes:
        rows: int64 [K], which rows.
        tokens: int64 [K, n]; where a row has fewer, others stand for the rest, and weigh nothing.
        weights: float64 [K, n].
    """

    rows: Tensor
    tokens: Tensor
    weights: Tensor

    def put(self, x: Tensor, embedded: Callable[[Tensor], Tensor]) -> Tensor:
        """``x`` [N, hidden], what a model takes in, with the vectors of these rows in their places: sums of what it
        takes in for their tokens, which ``embedded`` tells, by weight."""
        return x.index_copy(0, self.rows, superposed(embedded, self.tokens, self.weights))


def superposed(embedded: Callable[[Tensor], Tensor], tokens: Tensor, weights: Tensor) -> Tensor:
    """The vectors [K, hidden] that stand for K times n ``tokens``, int64 [K, n]: the sums of what a model takes in for
    each, which ``embedded`` tells, by ``weights`` float64 [K, n]. Summed in float64, so that one token alone is itself,
    bit for bit."""
    known = embedded(tokens)
    return (weights.unsqueeze(-1) * known).sum(1).to(known.dtype)


@contextlib.contextmanager
def superposing(model: Decoder, rows: SuperposedRows | None) -> Iterator[None]:
    """Within it, these ``rows`` of each pass of ``model`` stand for several tokens; None leaves it as it is."""
    model.superposed = rows
    try:
        yield
    finally:
        model.superposed = None
