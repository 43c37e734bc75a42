"""A step as data: everything that computing it takes, and nothing but arrays.

A step can be sent to another process, recorded, replayed, and tested without a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as List

import numpy as np

from penstock.ops.paged.contract import PagedBatch
from penstock.serve.choose.asked import Asked
from penstock.serve.kv.compaction import Compaction
from penstock.serve.kv.moving import Move
from penstock.serve.run.copies import Copied


@dataclasses.dataclass(frozen=True)
class Superposed:
    """Rows of a part that stand for several tokens each.

    Attributes:
        rows: int64 [K], which rows.
        tokens: int64 [K, n], of each.
        weights: float64 [K, n], the tokens' shares; 0 of those that only fill the array.
    """

    rows: np.ndarray
    tokens: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, known: List[tuple[np.ndarray, np.ndarray]]) -> Superposed:
        """Those that stand at ``rows``, int64 [K]: the tokens and weights of each are ``known``."""
        tokens, weights = np.zeros((2, len(known), max(len(each) for each, _ in known)))
        for place, (own, shares) in enumerate(known):
            tokens[place, : len(own)], weights[place, : len(own)] = own, shares
        return cls(rows, tokens.astype(np.int64), weights)

    def within(self, begin: int, end: int) -> Superposed | None:
        """Those of the rows from ``begin`` to ``end``, counted from there; None where there is none."""
        own = (self.rows >= begin) & (self.rows < end)
        return Superposed(self.rows[own] - begin, self.tokens[own], self.weights[own]) if own.any() else None


@dataclasses.dataclass(frozen=True)
class Part:
    """A pass through the model, which computes some neighbouring entries of a batch.

    Attributes:
        inputs: int64 [3, N]: the tokens, or 0, and of probes -1, -2 and so on; where the others stand in the list of
            newest ones, or 0; and their positions.
        plan: where they belong.
        scored: rows after which the scores of the next token are wanted.
        prompt_logprobs: rows after which the log-probability of the prompt's next token is wanted.
        draws: int64 [7, S], of the S scored ones: how the next token is drawn where nothing changes the scores, as
            float64 (see :attr:`Asked.draws`); where it belongs in the list of newest ones, 0 where tentative tokens
            have to be settled first; and what log-probabilities are wanted of it (see :attr:`Asked.wanted`).
        copied: copies of scored rows, with other experts; None where there are none.
        adapters: int64 [N], the slots of the tokens' adapters, 0 for none; None where no token has one.
        probes: rows that are probes, whose states are kept for what is drafted next; None where there are none.
        superposed: rows in whose places several tokens stand; None where there are none.
    """

    inputs: np.ndarray
    plan: PagedBatch
    scored: np.ndarray
    prompt_logprobs: np.ndarray
    draws: np.ndarray
    copied: Copied | None = None
    adapters: np.ndarray | None = None
    probes: np.ndarray | None = None
    superposed: Superposed | None = None

    @property
    def all_scored(self) -> bool:
        """Whether the next token is wanted behind each."""
        return len(self.scored) == len(self.inputs[0])

    @property
    def chooses(self) -> bool:
        """Whether nothing is wanted of it but tokens."""
        return len(self.scored) > 0 and not len(self.prompt_logprobs) and self.probes is None

    @property
    def draws_of_rows(self) -> np.ndarray:
        """int64 [7, N]: the :attr:`draws` where they are scored; of the other rows, what does no harm."""
        if self.all_scored:
            return self.draws
        spread = np.zeros((len(self.draws), len(self.inputs[0])), np.int64)
        spread[:, self.scored] = self.draws
        return spread

    @property
    def decoding(self) -> bool:
        """Whether each token is the only one of its sequence, and the next is wanted."""
        return self.plan.own_shape.others == 0 and self.all_scored


@dataclasses.dataclass(frozen=True)
class Placed:
    """A sequence that takes a slot: its ``tokens`` int64 [n] where it is penalized, else none; the first ``prompt`` of
    them were given."""

    slot: int
    tokens: np.ndarray
    prompt: int


@dataclasses.dataclass(frozen=True)
class Step:
    """What an executor does in one step, in this order.

    Attributes:
        compactions: caches that are compressed before anything else, as one after the other would be.
        copies: int64 [2, C], blocks to be copied, from and to.
        placed: sequences that take slots, where penalties have to be kept for them, or were for the one before.
        parts: the passes; several are computed at the same time where the device can.
        lead: the part that goes first where two want the same.
        asked: what the scored rows of all parts want, in order.
        prompt_logprobs: int64 [K], tokens of prompts whose log-probabilities are wanted, in the order of the parts'
            rows.
        alternatives: how many of the most probable tokens are told beside each of these.
        moves: tokens of contexts that are moved to where they stand, before anything else is done.
        keeps: those that are moved to where they are cached, once the passes are computed.
        probes: int64 [R], for each scored row of all parts, which of the probes of all parts is the first that stands
            behind it, -1 where none does; None where there are none.
    """

    compactions: tuple[Compaction, ...]
    copies: np.ndarray
    placed: tuple[Placed, ...]
    parts: tuple[Part, ...]
    lead: int
    asked: Asked
    prompt_logprobs: np.ndarray
    alternatives: int
    moves: tuple[Move, ...] = ()
    keeps: tuple[Move, ...] = ()
    probes: np.ndarray | None = None
