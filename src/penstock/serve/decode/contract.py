"""The contract ``decode.rule``: a way to choose tokens beyond temperature and cuts."""

from __future__ import annotations

from typing import ClassVar, TypeVar

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

    A rule has no state: what it needs to know are the tokens so far.
    """

    #: Whether :meth:`rescore` is called. Each token must be known to the host then before the next one is chosen.
    follows: ClassVar[bool] = False

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
