"""The contract ``kv.policy``: what the cache of a running sequence keeps.

A token's place in the cache is not its position in the text. Keys are rotated by position when they are stored, so
that what is kept can move together into fewer blocks, and the blocks that become free are the pool's again. Each head
of each layer may keep other tokens; all keep as many, so that a sequence has one table of blocks. A policy may also
keep all tokens in fewer places, or more in some layers than in others, in a form of its own, which attention sees by a
view: see :mod:`penstock.ops.paged.view`. Or all tokens stay where they are, and those behind the prompt read some of
them: see :mod:`penstock.ops.paged.selection`.

When a cache is compressed depends on the sequence alone: a policy names the number of computed tokens at which it is
due, and no piece of a batch goes beyond it. What a sequence says is so the same in any batch, with any chunks of its
prompt, from shared blocks, and after a preemption.

A *patient* policy lets caches that are due grow until blocks are missing, and depends on who else is there by that
alone. Where a cache was compressed is remembered with its sequence, which is compressed there again whenever it is
computed again.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, PositiveInt
from torch import Tensor

from penstock.models.config import DecoderConfig
from penstock.ops.paged.selection import BlockSelection
from penstock.ops.paged.view import View
from penstock.policy import Policy, contract, unwritten


@dataclasses.dataclass(frozen=True)
class Cached:
    """What the cache has of a sequence in some layers, by the place of its n tokens; ``*`` are layers and key heads.

    Attributes:
        keys, values: [*, n, D], in the cache's dtype; keys are rotated already.
        attention: float32 [*, q, n], the share of their attention that the last q queries paid to each token, averaged
            over the query heads of the key head; None where the policy watches none.
        drawn: float32 [*, n], what each token drew in all before, as :attr:`Kept.drawn` has it, and 0 for those that
            have come since; None where the policy does not remember it.
        computed: tokens of the text, where they are not as many as there are here.
        missing: of each layer, how many of the first tokens are not there, where layers have not as many; nothing is
            paid to these.
    """

    keys: Tensor
    values: Tensor
    attention: Tensor | None = None
    drawn: Tensor | None = None
    computed: int | None = None
    missing: tuple[int, ...] = ()

    def of_layer(self, layer: int) -> Cached:
        """What there is of one layer."""
        own = slice(self.missing[layer] if self.missing else 0, None)
        attention = None if self.attention is None else self.attention[layer][..., own]
        return Cached(self.keys[layer][..., own, :], self.values[layer][..., own, :], attention)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What takes the place of it, in the order of the text: ``keys`` and ``values`` [*, m, D], and ``drawn`` float32
    [*, m], which is remembered of each, where the policy does that. What goes to the host's memory are the vectors
    ``aside`` [*, p, D] of the tokens that are packed, where the policy's view says so."""

    keys: Tensor
    values: Tensor
    drawn: Tensor | None = None
    aside: Tensor | None = None


@contract(
    "kv.policy",
    law="a budget that covers all gives the tokens of the full cache; what is kept is as much as the policy says, and "
    "the rest of the blocks are the pool's again; the tokens of a sequence do not depend on the batch, on chunks, "
    "sharing, forks or preemption; layers that share keys and values keep their norms; a packed token that a query "
    "likes most is what it sees; layers that keep unequally many tokens see their own; of a cache that stays whole, "
    "tokens behind the prompt read what the budget says; caches that are compressed together become, to the last bit, "
    "what they become one after the other; what is kept, or read, equals the paper's rule by brute force; one that "
    "waits for pressure gives the tokens of the full cache where nothing presses, and else those of a cache compressed "
    "where it was, with fewer preemptions",
)
class CachePolicy(Policy):
    """Decides what the cache of a sequence keeps, and when the rest goes."""

    #: Whether it remembers a number for each token that stays.
    remembers: ClassVar[bool] = False

    @property
    def compresses(self) -> bool:
        """Whether anything is ever evicted or merged."""
        return True

    @property
    def patient(self) -> bool:
        """Whether caches that are due are compressed only where blocks are missing, before anybody is preempted."""
        return False

    @property
    def watches(self) -> int:
        """How many of the last queries it asks about."""
        return 0

    @property
    def view(self) -> View | None:
        """How attention sees the tokens that are :meth:`packed`. None where each place has one token. Such a policy
        remembers nothing, and watches only where its view is not of all tokens."""
        return None

    @property
    def selection(self) -> BlockSelection | None:
        """What tokens behind the prompt read of a cache that stays whole. None where they read all of it."""
        return None

    @property
    def dense(self) -> bool:
        """Whether all tokens stay, and each is read by all that come after it."""
        return not self.compresses and self.selection is None

    def packed(self, computed: int) -> int:
        """How many tokens share the first places of a cache that was compressed with so many ``computed``; 0 where each
        has one."""
        return 0 if self.view is None else computed

    def limit(self) -> CachePolicy:
        """The limiting case: with these options, tokens are those of the full cache."""
        raise unwritten(type(self), "limit()", "return the policy with a budget that covers all")

    def fitted(self, model: DecoderConfig) -> CachePolicy:
        """The policy for a ``model`` with texts of up to its ``context``.

        Raises:
            UsageError: it is of no use there.
        """
        return self

    def due(self, prompt: int, computed: int, dropped: int) -> int | None:
        """When the cache is compressed next: once so many tokens of the text are computed. More than ``computed``, of
        which ``dropped`` are not in the cache any more; None is never. The text began with a ``prompt`` of so many."""
        raise NotImplementedError

    def keeps(self, computed: int) -> int:
        """How many tokens the cache has after it is compressed with so many ``computed``; fewer than there are."""
        raise NotImplementedError

    def compress(self, cached: Cached, count: int) -> Kept:
        """What is kept of ``cached``: ``count`` tokens in each head. The leading dimensions are computed each by
        itself; where the policy has a :attr:`view`, ``cached`` has all layers and heads, its tokens are in the order in
        which that restores them, and what is kept are places."""
        raise NotImplementedError


class Repeated(CachePolicy):
    """Compresses a cache at the end of the prompt, and again whenever that leaves ``every`` tokens fewer.

    Attributes:
        when: at once when it is ``due``, or from then on, under ``pressure``: once blocks are missing.
        every: how far beyond what it keeps a cache may grow before it is compressed.
        whole_prompt: compress no sooner than at the end of the prompt. Without it, the prompt is compressed as it is
            computed, in pieces, and never takes more memory than what is kept and ``every``; its later pieces do not
            see what went before.
    """

    when: Literal["due", "pressure"] = "due"
    every: PositiveInt = 64
    whole_prompt: bool = True

    @property
    def patient(self) -> bool:
        return self.when == "pressure"

    def due(self, prompt: int, computed: int, dropped: int) -> int | None:
        if not self.compresses:
            return None
        place = max(computed + 1, prompt if self.whole_prompt else 0)
        # A token more makes the surplus one more at most.
        while (missing := self.every - (place - dropped - self.keeps(place))) > 0:
            place += missing
        return place


def _whole(budget: float) -> float:
    if budget > 1 and budget != int(budget):
        raise ValueError(f"a budget of {budget} is neither a share nor a number of tokens")
    return budget


#: Up to 1 a share of tokens, above it a number.
Budget = Annotated[float, Field(gt=0), AfterValidator(_whole)]


class Budgeted(Repeated):
    """Keeps what a budget allows.

    Attributes:
        budget: up to 1 a share of the tokens that were computed, above it a number of tokens.
    """

    budget: Budget = 0.5

    def limit(self) -> CachePolicy:
        return self.model_copy(update={"budget": 1.0})

    @property
    def compresses(self) -> bool:
        return self.budget != 1

    @property
    def least(self) -> int:
        """The fewest tokens that are kept."""
        return 1

    def keeps(self, computed: int) -> int:
        wanted = math.ceil(self.budget * computed) if self.budget <= 1 else int(self.budget)
        return min(max(wanted, self.least), computed)


class Selecting(Budgeted):
    """Keeps tokens as they are, those that :meth:`select` names."""

    def select(self, cached: Cached, count: int) -> Tensor:
        """The places of the tokens that stay: int64 [*, count], ascending."""
        raise NotImplementedError

    def compress(self, cached: Cached, count: int) -> Kept:
        places = self.select(cached, count)
        rows = places.unsqueeze(-1)
        drawn = attention_drawn(cached).take_along_dim(places, -1) if self.remembers else None
        return Kept(cached.keys.take_along_dim(rows, -2), cached.values.take_along_dim(rows, -2), drawn)


def watched(cached: Cached) -> Tensor:
    """The attention that a policy asked for."""
    assert cached.attention is not None
    return cached.attention


def attention_drawn(cached: Cached) -> Tensor:
    """What each token drew, before and of the last queries: float32 [*, n]."""
    assert cached.drawn is not None
    return cached.drawn + watched(cached).sum(-2)


def with_newest(scores: Tensor, count: int, newest: int) -> Tensor:
    """The places of the ``newest`` last tokens and of the others with the highest ``scores`` [*, n], ``count`` in all:
    int64 [*, count], ascending. Of equal scores, the earlier token stays."""
    length = scores.shape[-1]
    newest = min(newest, count)
    early = scores[..., : length - newest].sort(dim=-1, descending=True, stable=True).indices[..., : count - newest]
    late = torch.arange(length - newest, length, device=scores.device).expand(*scores.shape[:-1], newest)
    return torch.cat([early.sort(-1).values, late], -1)
