"""The loader: windows of a token stream as batches, from one integer of state."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Generator, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.errors import DataError
from penstock.data.ahead import map_ahead
from penstock.data.samplers.contract import Sampler
from penstock.ops.cross_entropy import IGNORE


class TokenStream(Protocol):
    """What the loader reads: documents end to end, such as a :class:`~penstock.data.store.Split`."""

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        ...

    def read(self, start: int, count: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Tokens [start, start + count) and the number of the document that each belongs to."""
        ...


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of packed documents.

    Attributes:
        tokens: int64 [B, L].
        targets: int64 [B, L], the token after each; ``IGNORE`` where that belongs to another document.
        documents: int64 [B, L], the document of each token, for :class:`~penstock.models.attention.PackedRows`.
        extras: [B, L, ...] each, by name: what an objective needs beside them.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    extras: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch of what ``change`` makes of each tensor."""
        extras = {name: change(values) for name, values in self.extras.items()}
        return Batch(change(self.tokens), change(self.targets), change(self.documents), extras)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device``."""
        return self.each(lambda values: values.to(device))


class Batches:
    """Batches of the samples of a data set, in the order of a sampler, for one of ``world`` ranks. A kind of data set
    gives :meth:`read`.

    A position in the run counts samples over all ranks. It is the whole state: a run that continues at the same
    position, with any number of ranks, sees the same samples as one that never stopped.

    Args:
        samples: how many there are in an epoch.
        length: tokens a row.
        sampler: the order of the samples.
        seed: for the sampler.
        rank: this process's place in [0, world).
        world: number of processes that share each global batch.

    Raises:
        ValueError: ``rank`` is not in [0, world), or ``length`` is not positive.
    """

    def __init__(
        self, samples: int, length: int, *, sampler: Sampler, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not in [0, {world})")
        if length < 1:
            raise ValueError(f"rows of {length} tokens")
        self.samples, self.length = samples, length
        self._sampler, self._seed = sampler, seed
        self._rank, self._world = rank, world

    def read(self, samples: npt.NDArray[np.int64]) -> Batch:
        """The rows of ``samples``."""
        raise NotImplementedError

    def batch(self, start: int, rows: int) -> Batch:
        """This rank's part of the global batch at positions [start, start + rows).

        Raises:
            ValueError: ``rows`` is not a positive multiple of the number of ranks.
        """
        own = rows // self._world
        if own < 1 or rows % self._world:
            raise ValueError(f"a batch of {rows} rows cannot be shared by {self._world} ranks")
        return self.read(self.order(start + self._rank * own, own))

    def order(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """The samples at positions [start, start + count)."""
        return self._sampler.indices(start, count, self.samples, self._seed)

    def prefetch(
        self, start: int, rows: int, *, steps: int | None = None, depth: int = 2
    ) -> Generator[Batch, None, None]:
        """The batches at ``start``, ``start + rows``, ...: ``steps`` of them, or without end.

        A background thread keeps ``depth`` batches ready beyond the one handed out. Close the iterator, or exhaust it,
        to end the thread; an exception of reading is raised at the batch that it concerns.
        """
        starts = itertools.count(start, rows) if steps is None else range(start, start + steps * rows, rows)
        return map_ahead(lambda position: self.batch(position, rows), starts, threads=1, depth=depth)


class Loader(Batches):
    """Windows of a token stream.

    Sample i is tokens [i L, i L + L], one more than the ``length`` L, so that neighbours share a token and each token
    but the first is a target exactly once an epoch; the ragged last window is dropped.

    Args:
        split: the token stream.
        length, sampler, seed, rank, world: see :class:`Batches`.

    Raises:
        DataError: the stream is shorter than one sample.
        ValueError: see :class:`Batches`.
    """

    def __init__(
        self, split: TokenStream, *, length: int, sampler: Sampler, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(
            (split.tokens - 1) // max(length, 1), length, sampler=sampler, seed=seed, rank=rank, world=world
        )
        if self.samples < 1:
            raise DataError(
                f"{split.tokens} tokens are too few for a row of {length} and the token after it",
                hint="Use a larger corpus, or shorter sequences.",
            )
        self._split = split

    def read(self, samples: npt.NDArray[np.int64]) -> Batch:
        tokens = np.empty((len(samples), self.length + 1), np.int64)
        documents = np.empty_like(tokens)
        for row, sample in enumerate(samples.tolist()):
            tokens[row], documents[row] = self._split.read(sample * self.length, self.length + 1)
        same = documents[:, 1:] == documents[:, :-1]
        targets = np.where(same, tokens[:, 1:], IGNORE)
        return Batch(
            torch.from_numpy(tokens[:, :-1].copy()),
            torch.from_numpy(targets),
            torch.from_numpy(documents[:, :-1].copy()),
        )
