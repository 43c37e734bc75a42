"""The contract ``model.head``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from penstock.models.attention import AttentionContext
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.policy import Policy, contract


class Guess(NamedTuple):
    """What a head guesses after each token of some texts.

    Attributes:
        hidden: [*T, hidden]; products with the rows of the target's head are the logits.
        ahead: the guess after token i is for the token i + 1 + ``ahead``.
        seen: how many of the tokens behind i the guess has seen.
    """

    hidden: Tensor
    ahead: int
    seen: int = 0


class HeadModule(nn.Module):
    """The weights of a head. Those of the target are not among them."""

    def initialize(self, target: Decoder, seed: int) -> None:
        """Fills the weights, so that training begins near what the ``target`` itself would guess."""
        raise NotImplementedError

    def guesses(self, target: Decoder, hidden: Tensor, tokens: Tensor, context: AttentionContext) -> Iterable[Guess]:
        """What is guessed after each of ``tokens`` (integers [*T]), as training sees it: all places at once.

        Args:
            target: the model that is drafted for. Its weights are constants.
            hidden: its hidden states [*T, hidden] of these tokens.
            tokens: the texts.
            context: of the texts.
        """
        raise NotImplementedError


@runtime_checkable
class Exits(Protocol):
    """A head whose guesses come out of the target's first layers."""

    def decoder(self, target: Decoder) -> Decoder:
        """The first layers of ``target`` and the head as a model. It keeps nothing of a token but what those layers
        keep in the target."""
        ...


@runtime_checkable
class Foresees(Protocol):
    """A head whose guesses come out of the target's last hidden state alone, for several tokens ahead at once."""

    @property
    def reach(self) -> int:
        """How many tokens it guesses."""
        ...

    def ahead(self, hidden: Tensor, depth: int) -> Tensor:
        """The guess at ``depth`` 0 and more, as hidden states [*T, hidden], from those after a token: for the token
        ``depth`` + 2 places behind it. The one behind it is what the target itself says."""
        ...


@runtime_checkable
class Transfers(Protocol):
    """A head that makes states of tokens to come of those that the target has behind its first layers; they go through
    the others."""

    @property
    def reach(self) -> int:
        """How many tokens it guesses."""
        ...

    @property
    def layers(self) -> int:
        """How many layers come first."""
        ...

    def transfer(self, states: Tensor) -> Tensor:
        """Of the ``states`` [*T, hidden] behind the first layers, those of tokens to come, [*T, reach, hidden]: the
        first stands in the place behind the token, and guesses for the one behind that."""
        ...

    def passed(self, target: Decoder, states: Tensor, context: AttentionContext) -> Tensor:
        """The last hidden states [*T, hidden], from those behind the first layers."""
        ...


class Continuing(Decoder):
    """A model whose tokens come with the hidden state after the token before each.

    Attributes:
        before: for each token of the next pass, the hidden state after the token before it, [*T, hidden]; zeros where
            there is none.
    """

    before: Tensor


@runtime_checkable
class Continues(Protocol):
    """A head that goes on with the target's last hidden states, and with its own where tokens are drafted."""

    def continuing(self, target: Decoder) -> Continuing:
        """The head as a model, with a cache of its own."""
        ...


@runtime_checkable
class Prompts(Protocol):
    """A head that is some tokens of its own, which the target computes behind those of the text, to guess what comes
    there."""

    @property
    def reach(self) -> int:
        """How many tokens it is, and guesses: the one that stands j places behind a token of the text says what comes
        j + 1 places behind it."""
        ...

    def prompted(self, target: Decoder) -> Decoder:
        """``target``, to which the tokens -1, -2 and so on are these, in order."""
        ...


@contract(
    "model.head",
    law="a guess depends on no token that it has not seen; only the head learns, and the target stays as it is; a head "
    "comes back from its folder bit for bit, and not for another model; what an engine drafts with it are those very "
    "guesses, and the engine's tokens are those of plain decoding",
)
class Head(Policy):
    """A head on a model: it drafts tokens with the model's own layers or hidden states, and is trained for this model
    (``penstock train --preset drafter-early-exit --set target=MODEL``)."""

    #: The policy of ``speculate.drafter`` by which an engine drafts with it.
    drafter: ClassVar[str] = "head"

    def build(self, shape: DecoderConfig) -> HeadModule:
        """The head for models of this ``shape``, with weights of any value.

        Raises:
            UsageError: there is none for such models.
        """
        raise NotImplementedError
