"""A decoder's pass in pieces, each from the attention of one layer to that of the next.

Compiled, one piece does for all layers that are alike: a model of eighty layers is compiled as fast as one of eight.
Nothing is lost by it: attention is a border to the compiler anyhow.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.models.attention import AttentionContext
from penstock.models.rotary import Turns
from penstock.ops.attention import PLAIN, Extras

if TYPE_CHECKING:
    from penstock.models.decoder import Decoder, Layer

#: How often a piece is compiled at most: once for each kind of layer of each model, alone and with adapters, for one
#: token and for more. Beyond that, PyTorch would go on eagerly without a word.
VARIANTS = 64


def begin(model: Decoder, first: Layer, tokens: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Turns]:
    """What goes into the ``first`` layer of ``model`` for ``tokens`` (integers [*T]), what its attention finds, and the
    turns of rotary positions."""
    x, rotary, _ = model.through((), tokens, context)
    return x, first.attend(x, rotary, context), rotary


def onward(
    before: Layer, after: Layer, x: Tensor, attended: Tensor, rotary: Turns, context: AttentionContext
) -> tuple[Tensor, Tensor]:
    """What goes into the layer ``after``, and what its attention finds, from the same of the layer ``before``."""
    x, _ = before.finish(x, attended)
    return x, after.attend(x, rotary, context)


class Pieces:
    """The pieces, as they are."""

    def __init__(self) -> None:
        self._begin, self._onward = begin, onward

    def walk(self, model: Decoder, tokens: Tensor, context: AttentionContext) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each layer of ``model``, one after the other: the hidden states [*T, hidden] that go into it, and what its
        attention finds [*T, config.attended]."""
        layers = model.present
        x, attended, rotary = self._begin(model, layers[0], tokens, self._at(layers[0], context))
        yield x, attended
        for before, after in itertools.pairwise(layers):
            x, attended = self._onward(before, after, x, attended, rotary, self._at(after, context))
            yield x, attended

    def last(self, model: Decoder, tokens: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Of the last layer of ``model``, what :meth:`walk` gives."""
        return deque(self.walk(model, tokens, context), maxlen=1).pop()

    def adapted(self) -> Pieces:
        """The pieces for a pass with adapters."""
        return self

    def _at(self, layer: Layer, context: AttentionContext) -> AttentionContext:
        """What ``layer`` is given as its ``context``."""
        return context


class CompiledPieces(Pieces):
    """The pieces, each compiled at its first use for what it has not met."""

    def __init__(self) -> None:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
        # What was compiled for a model would be taken for another that has adapters behind its layers, or is divided.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        # A model's numbers, such as what a norm adds, stay as they are. If they are taken for variables at first, each
        # piece is traced twice, and what is kept on disk is found the second time.
        torch._dynamo.config.specialize_float = True
        self._begin = torch.compile(begin, dynamic=True)
        self._onward = torch.compile(onward, dynamic=True)

    def _at(self, layer: Layer, context: AttentionContext) -> AttentionContext:
        return AtPlace(context, layer.attention.layer)


@dataclasses.dataclass(frozen=True)
class AtPlace:
    """``context`` for the layer at ``place``, whichever one asks: the number that a layer knows itself by would be a
    constant of what is compiled, and this one is not."""

    context: AttentionContext
    place: int

    @property
    def positions(self) -> Tensor:
        return self.context.positions

    @property
    def keeps(self) -> bool:
        return self.context.keeps

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        extras: Extras = PLAIN,
    ) -> Tensor:
        return self.context.attend(self.place, query, key, value, scale=scale, window=window, extras=extras)


#: What a pass is made of where nothing is compiled.
EAGER = Pieces()
