"""Log-probabilities of tokens: one array a step, from which records are made where somebody reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as List
from typing import overload

import msgspec
import numpy as np
import torch
from torch import Tensor

from penstock.ops.logprobs import FIXED, logprob_table


class TokenLogprobs(msgspec.Struct, frozen=True):  # one for each token that is told
    """Log-probabilities at one position: of the token there, whose rank is 1 where it is the most probable one, and of
    the most probable tokens in order (token, logprob); and how the model's probabilities are spread there.

    Attributes:
        entropy: of the distribution, in nats; 0 where ``SamplingParams.spread`` did not ask for it.
        certainty: its distance from the even one, KL(uniform || model), in nats (Kang et al. 2025, self-certainty);
            0 likewise.
    """

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]
    entropy: float = 0.0
    certainty: float = 0.0


class LogprobRows(List[TokenLogprobs]):
    """Log-probabilities at n positions, as rows of an array: records are made of those that are asked for. A slice is a
    view.

    Args:
        table: int32 [n, 5 + 2k]: a token, its rank, and as bits of fp32 its log-probability and the position's entropy
            and certainty; behind them the k most probable tokens, a token and its log-probability each.
    """

    __slots__ = ("table",)

    def __init__(self, table: np.ndarray) -> None:
        self.table = table

    @staticmethod
    def of(records: Iterable[TokenLogprobs]) -> LogprobRows:
        """The rows of ``records``, which have equally many alternatives."""
        rows = [
            (
                each.token,
                each.rank,
                *map(_bits, (each.logprob, each.entropy, each.certainty)),
                *(part for token, logprob in each.top for part in (token, _bits(logprob))),
            )
            for each in records
        ]
        return LogprobRows.stacked([np.array(row, np.int32) for row in rows])

    @staticmethod
    def stacked(rows: List[np.ndarray]) -> LogprobRows:
        """Those with these ``rows``, int32 [5 + 2k] each."""
        return LogprobRows(np.stack(rows) if rows else np.zeros((0, FIXED), np.int32))

    @staticmethod
    def joined(parts: List[LogprobRows]) -> LogprobRows:
        """Those of all ``parts``, which have equally many alternatives, one behind the other."""
        return LogprobRows(np.concatenate([part.table for part in parts])) if parts else LogprobRows.stacked([])

    def cut(self, start: int, stop: int, alternatives: int) -> LogprobRows:
        """The rows from ``start`` to ``stop``, with no more than so many ``alternatives``."""
        return LogprobRows(self.table[start:stop, : FIXED + 2 * alternatives])

    @property
    def logprobs(self) -> list[float]:
        """Of the tokens themselves."""
        values: list[float] = _floats(self.table[:, 2:3])[:, 0].tolist()
        return values

    @property
    def spreads(self) -> list[list[float]]:
        """Of the tokens, log-probability, entropy and certainty each, in nats: all by one look at the array."""
        values: list[list[float]] = _floats(self.table[:, 2:FIXED]).tolist()
        return values

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, place: int) -> TokenLogprobs: ...
    @overload
    def __getitem__(self, place: slice) -> LogprobRows: ...
    def __getitem__(self, place: int | slice) -> TokenLogprobs | LogprobRows:
        if isinstance(place, slice):
            return LogprobRows(self.table[place])
        return _record(self.table[place])

    def __iter__(self) -> Iterator[TokenLogprobs]:
        return map(_made, self.table.tolist(), _floats(self.table).tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, List) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))


def _record(row: np.ndarray) -> TokenLogprobs:
    return _made(row.tolist(), _floats(row).tolist())


def _made(names: list[int], values: list[float]) -> TokenLogprobs:
    """The record of a row, as integers and as numbers of fp32."""
    top = list(zip(names[FIXED::2], values[FIXED + 1 :: 2], strict=True))
    return TokenLogprobs(names[0], values[2], names[1], top, values[3], values[4])


def _floats(table: np.ndarray) -> np.ndarray:
    return table.view(np.float32)


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Log-probabilities under the model itself, for R tokens at their positions.

    Attributes:
        packed: int32 [N, 5 + 2k], the table of :class:`LogprobRows`: one array, so that one copy brings it to the host.
        own: int64 [R], the rows of it that are told; None for all.
        most: the alternatives that are told of these at most; None for all.
    """

    packed: Tensor
    own: np.ndarray | None = None
    most: int | None = None

    @staticmethod
    def of(logits: Tensor, tokens: Tensor, most: int, spread: Tensor | None = None) -> Logprobs:
        """Those of ``tokens`` [R], given ``logits`` [R, vocabulary], with ``most`` alternatives; entropy and certainty
        for the rows that bool [R] ``spread`` names, of none without it: they cost a pass over all scores."""
        return Logprobs(logprob_table(logits, tokens, most, spread))

    @staticmethod
    def joined(parts: List[Logprobs]) -> Logprobs:
        """Those of all ``parts``, which have equally many alternatives, one behind the other."""
        return Logprobs(torch.cat([part.packed for part in parts]))

    def to_host(self) -> Logprobs:
        """The same on the host, once what is queued on the device now is done."""
        return dataclasses.replace(self, packed=self.packed.to("cpu", non_blocking=True))

    @property
    def rows(self) -> LogprobRows:
        """The same as rows; it must be on the host."""
        table = self.packed.numpy()
        if self.own is not None and len(self.own) < len(table):
            table = table[self.own]
        # A copy: rows may be kept for long, and memory that a device has written to is needed for the next steps.
        return LogprobRows(table[:, : None if self.most is None else FIXED + 2 * self.most].copy())
