"""A decoder's pass for few tokens on a CPU, as the native calls that it came down to the last time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Self, cast

import torch
from torch import Tensor

from penstock.models.attention import AttentionContext
from penstock.models.paged import PagedTokens
from penstock.models.pieces import Pieces
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
    it, everything goes on as it is. What is behind that, up to the scores, is recorded likewise."""

    def __init__(self, room: Room | None = None) -> None:
        super().__init__()
        self._passes: dict[Hashable, _Pass] = {}
        self._room, self._most = room or Room(), MOST
        self._ends: dict[Hashable, _Pass | None] = {}
        self._last_room = Room()  # what goes in there is asked for more than once
        self._adapted: RecordedPieces | None = None

    def forget(self) -> None:
        """Weights are going to lie elsewhere."""
        self._passes.clear()
        self._ends.clear()
        self._room, self._last_room, self._adapted = Room(), Room(), None

    def adapted(self) -> Pieces:
        self._adapted = self._adapted or RecordedPieces(self._room)
        return self._adapted

    def last(self, model: Decoder, tokens: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        memory = context.cache.recorded if isinstance(context, PagedTokens) else None
        if memory is None or not 0 < len(tokens) <= self._most or torch.is_grad_enabled():
            return super().last(model, tokens, context)
        x, rotary, _ = model.through((), tokens, context)
        kind = memory, len(tokens), torch.get_num_threads()
        given = x, *itertools.chain.from_iterable(rotary)
        found = self._passes.get(kind)
        if found is not None:
            return cast("tuple[Tensor, Tensor]", found.again(given))
        made, first = _Pass.recorded(functools.partial(_between, model, context), given, self._room)
        if made is None:  # which may be so for many tokens alone
            self._most = min(len(tokens) - 1, max(FEW, len(tokens) // 2))
        elif self._room.used > ENOUGH:
            self._most = len(tokens) - 1
        else:
            self._passes[kind] = made
        return cast("tuple[Tensor, Tensor]", first)

    def scores(self, model: Decoder, *begun: Tensor) -> Tensor:
        """What :meth:`Decoder.logits` gives for the :meth:`Decoder.tip` of tokens whose pass was ``begun``."""
        rows = len(begun[0])
        kind = rows, torch.get_num_threads()
        if not 0 < rows <= MOST or torch.is_grad_enabled():
            return _scored(model, *begun)[0]
        if kind not in self._ends:
            self._ends[kind], first = _Pass.recorded(functools.partial(_scored, model), begun, self._last_room)
            return first[0]
        found = self._ends[kind]
        return _scored(model, *begun)[0] if found is None else found.again(begun)[0].clone()


def _between(model: Decoder, context: AttentionContext, x: Tensor, *turns: Tensor) -> tuple[Tensor, ...]:
    """What goes into the last layer, and what its attention finds, from what goes into the first."""
    layers, rotary = model.present, tuple(zip(turns[::2], turns[1::2], strict=True))
    attended = layers[0].attend(x, rotary, context)
    for before, after in itertools.pairwise(layers):
        x, _ = before.finish(x, attended)
        attended = after.attend(x, rotary, context)
    return x, attended


def _scored(model: Decoder, *begun: Tensor) -> tuple[Tensor, ...]:
    return (model.logits(model.tip(*begun)),)


class _Pass:
    """One that was recorded."""

    def __init__(self, given: tuple[Tensor, ...], calls: Calls) -> None:
        self._given, self._calls = given, calls
        self._found: tuple[Tensor, ...] = ()

    @classmethod
    def recorded(
        cls, compute: Callable[..., tuple[Tensor, ...]], given: tuple[Tensor, ...], room: Room
    ) -> tuple[Self | None, tuple[Tensor, ...]]:
        """That in which ``compute`` makes something of what is ``given``, None where its calls alone do not give the
        same; and what it gives."""
        made = cls(tuple(each.clone() for each in given), Calls(room))
        made._found = made._calls.record(lambda: compute(*made._given))
        first = tuple(each.clone() for each in made._found)
        return made if made._calls.obstacle is None and made._agrees(first) else None, first

    def again(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The same for what is ``given``, where the next pass puts its own."""
        for there, own in zip(self._given, given, strict=True):
            there.copy_(own)
        self._calls.again()
        return self._found

    def _agrees(self, first: tuple[Tensor, ...]) -> bool:
        """Whether the calls give what came out ``first``."""
        for each in self._found:
            # A single layer hands on what it was given.
            if not any(each is own for own in self._given):
                each.fill_(torch.nan)
        self._calls.again()
        return all(torch.equal(found, own) for found, own in zip(self._found, first, strict=True))


def can_record(model: Decoder) -> bool:
    """Whether passes of ``model`` can be recorded here: not where layers are elsewhere, or read from disk."""
    whole = len(model.present) == len(model.layers)
    return whole and stream_of(model) is None and records()
