"""Rows of whole examples: how they are packed, and the batches of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from penstock.core.errors import DataError
from penstock.data.chats.examples import Examples
from penstock.data.loader import Batch, Batches
from penstock.data.samplers.contract import Sampler
from penstock.ops.cross_entropy import IGNORE


class Packed(NamedTuple):
    """Which examples stand in each row, and what became of those that are longer than a row.

    Attributes:
        rows: numbers of examples, in the order in which they stand.
        cut: how many were cut to the length of a row.
        left_out: how many stand in no row, because too little of them would be left.
    """

    rows: list[npt.NDArray[np.int64]]
    cut: int
    left_out: int


def pack(sizes: npt.NDArray[np.int64], length: int) -> list[npt.NDArray[np.int64]]:
    """Puts items of ``sizes`` up to ``length`` into rows of ``length``, whole, each into the row with the least room
    that takes it, the largest first (best fit decreasing).

    Returns:
        The items of each row, in ascending order.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = 0  # bit r: some row has room r
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(item)
        by_room[room - size].append(row)
        rooms |= 1 << (room - size)
    return [np.sort(np.array(row, np.int64)) for row in rows]


def packed(examples: Examples, length: int) -> Packed:
    """The rows of a split. An example of one sequence that is longer than a row is cut at its end, if something to
    learn is left of it; one of several sequences is left out."""
    sizes = examples.sizes()
    long = np.flatnonzero(sizes > length)
    kept = [i for i in long.tolist() if examples.width == 1 and examples.learns(i, length)]
    chosen = np.sort(np.concatenate([np.flatnonzero(sizes <= length), np.array(kept, np.int64)]))
    rows = [chosen[row] for row in pack(np.minimum(sizes[chosen], length), length)]
    return Packed(rows, len(kept), len(long) - len(kept))


class PackedLoader(Batches):
    """Batches of packed examples: no token sees another sequence, and positions begin anew in each.

    In a row, the sequences are numbered from 0 in ``Batch.documents``: those of an example are neighbours, and example
    e of the row has the numbers e * width to e * width + width - 1. ``Batch.extras`` has what the examples say of a
    sequence at each of its tokens, and what they say of a learnt token where that is predicted. What is left of a row
    is filled with a document of its own, in which nothing is predicted.

    Raises:
        DataError: there is no example that fits into a row.
    """

    def __init__(
        self, examples: Examples, *, length: int, sampler: Sampler, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self._examples = examples
        self.packed = packed(examples, length)
        if not self.packed.rows:
            raise DataError(
                f"of {examples.count} examples, none fits into a row of {length} tokens", hint="Make rows longer."
            )
        super().__init__(len(self.packed.rows), length, sampler=sampler, seed=seed, rank=rank, world=world)

    def read(self, samples: npt.NDArray[np.int64]) -> Batch:
        shape = (len(samples), self.length)
        tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        documents = np.zeros(shape, np.int64)
        extras: dict[str, npt.NDArray[Any]] = {name: np.zeros(shape, np.float32) for name in self._examples.extras}
        for name, values in self._examples.tokenwise.items():
            extras[name] = np.zeros((*shape, *values.shape[1:]), values.dtype)
        for row, sample in enumerate(samples.tolist()):
            place = number = 0
            for example in self.packed.rows[sample].tolist():
                for sequence in self._examples.sequences(example):
                    own, learnt = self._examples.read(sequence, self.length)
                    end = place + len(own)
                    tokens[row, place:end], documents[row, place:end] = own, number
                    targets[row, place : end - 1] = np.where(learnt[1:], own[1:], IGNORE)
                    for name, values in self._examples.extras.items():
                        extras[name][row, place:end] = values[sequence]
                    if self._examples.tokenwise:
                        predicted = np.flatnonzero(learnt[1:])
                        first = int(self._examples.learnt_before[sequence])
                        for name, values in self._examples.tokenwise.items():
                            extras[name][row, place + predicted] = values[first : first + len(predicted)]
                    place, number = end, number + 1
            documents[row, place:] = number
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(targets),
            torch.from_numpy(documents),
            {name: torch.from_numpy(values) for name, values in extras.items()},
        )
