"""What objectives over pairs of answers share."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from pydantic import PositiveInt
from torch import Tensor

from penstock.data.chats.examples import Kind
from penstock.data.loader import Batch
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.ops.cross_entropy import IGNORE, linear_log_probabilities
from penstock.train.objectives.contract import Objective


class Pairs(NamedTuple):
    """The pairs of a batch, [B, P] each: what the chosen and the rejected answers are worth, summed over their tokens,
    and how many tokens these are; and which of the places hold a pair."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    there: Tensor


class Preference(Objective):
    """A loss of pairs of a chosen and a rejected answer, neighbours in a row of ``data.preferences``; the mean is over
    pairs. The loss for balance of sparse layers is no part of it. A policy gives :meth:`pair_loss`.

    ``chunk`` tokens' logits exist at a time.
    """

    learns_from: ClassVar[Kind] = "preferences"
    unit: ClassVar[str] = "pair"

    chunk: PositiveInt = 2048

    def pair_loss(self, pairs: Pairs, batch: Batch) -> Tensor:
        """The loss of each pair, [B, P]; places without a pair may hold any finite number."""
        raise NotImplementedError

    def worth(self, model: Decoder, hidden: Tensor, batch: Batch) -> Tensor:
        """What each token [B, L] adds to the worth of its answer: its log-probability, where a policy says no other."""
        return log_probabilities(model, hidden, batch, self.chunk)

    def hidden_loss(self, model: Decoder, hidden: Tensor, batch: Batch) -> Tensor:
        pairs = pairs_of(batch, self.worth(model, hidden, batch))
        return torch.where(pairs.there, self.pair_loss(pairs, batch), 0.0).sum()

    def count(self, batch: Batch) -> Tensor:
        return pairs_of(batch, torch.zeros_like(batch.targets, dtype=torch.float32)).there.sum()

    def balance_loss(self, config: DecoderConfig, balance: Tensor) -> Tensor:
        return torch.zeros_like(balance)


def log_probabilities(model: Decoder, hidden: Tensor, batch: Batch, chunk: int) -> Tensor:
    """The log-probability of each target, [B, L], 0 where nothing is predicted."""
    rows, targets = hidden.flatten(0, -2), batch.targets.flatten()
    found = linear_log_probabilities(rows, model.head.weight, targets, chunk=chunk, cap=model.config.logits_cap)
    return found.view(batch.targets.shape)


def pairs_of(batch: Batch, values: Tensor) -> Pairs:
    """The sums of ``values`` [B, L] over the sequences of each pair."""
    sums, counts = by_sequence(batch, values), by_sequence(batch, (batch.targets != IGNORE).to(values.dtype))
    chosen, rejected = counts[:, 0::2], counts[:, 1::2]
    return Pairs(sums[:, 0::2], sums[:, 1::2], chosen, rejected, (chosen > 0) & (rejected > 0))


def by_sequence(batch: Batch, values: Tensor) -> Tensor:
    """The sums of ``values`` [B, L] over each sequence of a row, in their order: [B, S], S even, with zeros behind."""
    rows, length = values.shape
    sums = torch.zeros(rows, length + length % 2, dtype=values.dtype, device=values.device)
    return sums.scatter_add(1, batch.documents - batch.documents[:, :1], values)


def of_sequence(batch: Batch, values: Tensor) -> Tensor:
    """What ``values`` [B, L] have at all tokens of each sequence, laid out as :func:`by_sequence` does."""
    rows, length = values.shape
    found = torch.zeros(rows, length + length % 2, dtype=values.dtype, device=values.device)
    return found.scatter(1, batch.documents - batch.documents[:, :1], values)
