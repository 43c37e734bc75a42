"""A decoder's pass for few tokens on a CPU, as the native calls that it came down to the last time."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.models.attention import AttentionContext
from penstock.models.paged import PagedTokens
from penstock.models.pieces import Pieces
from penstock.models.rotary import Turns
from penstock.models.streamed import stream_of
from penstock.ops.calls import Calls, Room, records
from penstock.ops.linear import FEW

if TYPE_CHECKING:
    from penstock.models.decoder import Decoder

#: Tokens of a pass that is recorded, and bytes that it makes: with more, what is computed takes far longer than what is
#: saved.
MOST, ENOUGH = 32, 64 << 20


class RecordedPieces(Pieces):
    """The pieces. What lies between the embedding and the attention of the last layer is recorded for each number of
    tokens at its first use, and compared at once: it is computed again by the calls alone. Where these are not all of
    it, everything goes on as it is."""

    def __init__(self, room: Room | None = None) -> None:
        super().__init__()
        self._passes: dict[Hashable, _Pass] = {}
        self._room, self._most = room or Room(), MOST
        self._adapted: RecordedPieces | None = None

    def forget(self) -> None:
        """Weights are going to lie elsewhere."""
        self._passes.clear()
        self._room, self._adapted = Room(), None

    def adapted(self) -> Pieces:
        self._adapted = self._adapted or RecordedPieces(self._room)
        return self._adapted

    def last(self, model: Decoder, tokens: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        memory = context.cache.recorded if isinstance(context, PagedTokens) else None
        if memory is None or not 0 < len(tokens) <= self._most or torch.is_grad_enabled():
            return super().last(model, tokens, context)
        x, rotary, _ = model.through((), tokens, context)
        kind = memory, len(tokens), torch.get_num_threads()
        found = self._passes.get(kind)
        if found is not None:
            return found.again(x, rotary)
        made = _Pass(model, x, rotary, context, self._room)
        if not made.complete:  # which may be so for many tokens alone
            self._most = min(len(tokens) - 1, max(FEW, len(tokens) // 2))
        elif self._room.used > ENOUGH:
            self._most = len(tokens) - 1
        else:
            self._passes[kind] = made
        return made.first


class _Pass:
    """One that was recorded.

    Attributes:
        first: what it gave.
        complete: whether its calls alone give the same.
    """

    def __init__(self, model: Decoder, x: Tensor, rotary: Turns, context: AttentionContext, room: Room) -> None:
        self._x, self._rotary = x.clone(), tuple((cos.clone(), sin.clone()) for cos, sin in rotary)
        self._calls = Calls(room)
        self._found = self._calls.record(lambda: self._computed(model, context))
        self.first = (self._found[0].clone(), self._found[1].clone())
        self.complete = self._calls.obstacle is None and self._agrees()

    def again(self, x: Tensor, rotary: Turns) -> tuple[Tensor, Tensor]:
        """The same for ``x`` and ``rotary``, where the next pass puts its own."""
        self._x.copy_(x)
        for there, turns in zip(self._rotary, rotary, strict=True):
            for to, own in zip(there, turns, strict=True):
                to.copy_(own)
        self._calls.again()
        return self._found

    def _computed(self, model: Decoder, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """What goes into the last layer, and what its attention finds."""
        layers, x = model.present, self._x
        attended = layers[0].attend(x, self._rotary, context)
        for before, after in itertools.pairwise(layers):
            x, _ = before.finish(x, attended)
            attended = after.attend(x, self._rotary, context)
        return x, attended

    def _agrees(self) -> bool:
        """Whether the calls give what came out first."""
        for each in self._found:
            each.fill_(torch.nan)
        self._calls.again()
        return all(torch.equal(found, first) for found, first in zip(self._found, self.first, strict=True))


def can_record(model: Decoder) -> bool:
    """Whether passes of ``model`` can be recorded here: not where layers are elsewhere, or read from disk."""
    whole = len(model.present) == len(model.layers)
    return whole and stream_of(model) is None and records()
