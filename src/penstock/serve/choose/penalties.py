"""Penalties on tokens that came before, without the host knowing the newest of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.core.devices import upload

#: How many rows there are at first.
ROWS = 8


class Penalties:
    """The tokens of penalized sequences, on the device, in rows that are made as they are needed.

    A row holds the sequence's tokens in order, and how often each token of the vocabulary was generated. Behind the
    sequence's last token, its first is repeated: what becomes of a token's score does not depend on how often the
    token is listed.

    Args:
        slots: of sequences.
        vocabulary: how many tokens there are.
        device: of the scores.
    """

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self._device = device
        self._tokens = torch.zeros((0, 1), dtype=torch.int64, device=device)
        self._counts = torch.zeros((0, vocabulary), dtype=torch.int32, device=device)
        self._row = np.full(slots, -1)
        self._free: list[int] = []

    def __len__(self) -> int:
        """How many rows there are, in use or not."""
        return len(self._tokens)

    @torch.inference_mode()
    def add(self, slot: int, tokens: np.ndarray, prompt: int) -> None:
        """A penalized sequence takes ``slot``, with its ``tokens``, the first ``prompt`` of which were given."""
        if not self._free:
            self._grow()
        row = self._row[slot] = self._free.pop()
        self._widen(len(tokens))
        known = upload(tokens, self._device)
        self._tokens[row] = known[0]
        self._tokens[row, : len(tokens)] = known
        generated = known[prompt:]
        self._counts[row].zero_().index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))

    def drop(self, slot: int) -> None:
        """Another sequence takes ``slot``; what was there need not have been penalized."""
        if self._row[slot] >= 0:
            self._free.append(int(self._row[slot]))
            self._row[slot] = -1

    @torch.inference_mode()
    def apply(self, scores: Tensor, at: Tensor, slots: np.ndarray, longest: int, charges: np.ndarray) -> None:
        """Changes rows ``at`` [P] of ``scores`` [R, vocabulary], float32, which are those of the sequences in ``slots``
        [P], of at most ``longest`` tokens. ``charges`` [P, 3] are their repetition, frequency and presence penalties.
        """
        rows = upload(self._row[slots], self._device)
        tokens = self._tokens[rows, :longest]
        counts = self._counts[rows].gather(-1, tokens)
        factor, each, any_ = upload(charges.astype(np.float32), self._device).unsqueeze(-1).unbind(1)
        own = scores[at.unsqueeze(-1), tokens]
        own = torch.where(own > 0, own / factor, own * factor) - each * counts - any_ * (counts > 0)
        scores[at.unsqueeze(-1), tokens] = own

    @torch.inference_mode()
    def append(self, slots: np.ndarray, lengths: np.ndarray, tokens: Tensor, kept: Tensor | None = None) -> None:
        """The sequences in ``slots`` [P], of ``lengths`` [P] tokens, go on by ``tokens`` [P], or only by those that are
        ``kept`` (bool [P]). A slot may come several times, with other lengths."""
        self._widen(int(lengths.max()) + 1)
        rows, ones = upload(self._row[slots], self._device), torch.ones_like(tokens, dtype=torch.int32)
        if kept is None:
            self._tokens[rows, upload(lengths, self._device)] = tokens
        else:
            self._tokens[rows, upload(lengths, self._device)] = torch.where(kept, tokens, self._tokens[rows, 0])
            ones *= kept
        self._count(rows, tokens, ones)

    @torch.inference_mode()
    def retract(self, slots: np.ndarray, lengths: np.ndarray, tokens: Tensor) -> None:
        """Undoes what :meth:`append` did with the same arguments."""
        rows, less = upload(self._row[slots], self._device), -torch.ones_like(tokens, dtype=torch.int32)
        self._tokens[rows, upload(lengths, self._device)] = self._tokens[rows, 0]
        self._count(rows, tokens, less)

    def _count(self, rows: Tensor, tokens: Tensor, more: Tensor) -> None:
        """Counts ``more`` int32 [P] of ``tokens`` [P] in ``rows`` [P], which may come several times: one kernel,
        where accumulating at two indices would sort them first."""
        self._counts.view(-1).index_add_(0, rows * self._counts.shape[1] + tokens, more)

    def _grow(self) -> None:
        rows = len(self._tokens)
        more = max(ROWS, rows)
        self._free.extend(range(rows, rows + more))
        self._tokens = F.pad(self._tokens, (0, 0, 0, more))
        self._counts = F.pad(self._counts, (0, 0, 0, more))

    def _widen(self, length: int) -> None:
        width = self._tokens.shape[1]
        if length > width:
            more = self._tokens[:, :1].expand(-1, max(length, 2 * width) - width)
            self._tokens = torch.cat([self._tokens, more], 1)


class Tentative:
    """Tentative tokens in the books, as long as rows behind them are charged.

    Args:
        books: the books.
        put: copies an array to their device.
    """

    def __init__(self, books: Penalties, put: Callable[[np.ndarray], Tensor]) -> None:
        self._books, self._put = books, put
        #: Of each slot, the length of its sequence and what stands behind that.
        self._ahead: dict[int, tuple[int, list[int]]] = {}

    def stand(self, slots: np.ndarray, lengths: np.ndarray, ways: Sequence[Sequence[int]]) -> None:
        """Behind the sequences in ``slots`` [P], of ``lengths`` [P] tokens, stand the tokens of ``ways`` [P] alone."""
        less, more = [], []
        for slot, length, way in zip(slots.tolist(), lengths.tolist(), ways, strict=True):
            _, before = self._ahead.get(slot, (length, []))
            pairs = enumerate(zip(before, way, strict=False))
            alike = next((place for place, (one, other) in pairs if one != other), min(len(before), len(way)))
            less += [(slot, length + place, before[place]) for place in range(alike, len(before))]
            more += [(slot, length + place, way[place]) for place in range(alike, len(way))]
            self._ahead[slot] = length, list(way)
        for change, moved in ((self._books.retract, less), (self._books.append, more)):
            if moved:
                own, places, tokens = np.array(moved, np.int64).T
                change(own, places, self._put(np.ascontiguousarray(tokens)))

    def end(self) -> None:
        """Nothing stands there any more."""
        slots, lengths = np.array([(slot, length) for slot, (length, _) in self._ahead.items()], np.int64).T
        self.stand(slots, lengths, [[]] * len(slots))
