"""The contract ``decode.rule``: a way to choose tokens beyond temperature and cuts."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self, TypeVar

from torch import Tensor

from penstock.models.sampling import Sampling
from penstock.policy import Policy, contract

S = TypeVar("S", bound=Sampling)


@contract(
    "decode.rule",
    law="in its limiting case, token for token what plain decoding gives; a sequence's tokens do not depend on what "
    "else is in the batch; one forward pass a token",
)
class DecodeRule(Policy):
    """Changes a sequence's scores, or how tokens are drawn from them, at each position.

    A rule has no state: what it needs to know are the tokens so far, or what the model says after another prompt.
    """

    #: Whether :meth:`rescore` is called. Each token must be known to the host then before the next one is chosen.
    follows: ClassVar[bool] = False

    @property
    def companion(self) -> tuple[int, ...] | None:
        """The prompt of a second sequence, which goes on with the same tokens, and whose scores :meth:`contrast` is
        given; None where there is none.

        Raises:
            UsageError: the prompt is text, which :meth:`tokenized` has not been asked to read.
        """
        return None

    def tokenized(self, encode: Callable[[str], list[int]]) -> Self:
        """The same rule with what it has of text as tokens."""
        return self

    def refuses(self, sampling: Sampling) -> str | None:
        """Why the rule does not go with ``sampling``, as a sentence; None where it does."""
        return None

    def options(self, sampling: S, count: int) -> S:
        """The temperature and cuts with which the token after ``count`` generated ones is drawn."""
        return sampling

    def rescore(self, scores: Tensor, tokens: list[int]) -> Tensor:
        """New scores [vocabulary] in place of ``scores`` (float32), which are of the token after ``tokens``, those of
        the prompt and what followed. Nothing waits for the device."""
        return scores

    def contrast(self, scores: Tensor, other: Tensor) -> Tensor:
        """New scores [vocabulary] in place of ``scores``, given the ``other`` ones, those of the companion; both are
        float32. Nothing waits for the device."""
        return scores
