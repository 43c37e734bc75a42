"""The contract ``decode.rule``: a way to choose tokens beyond temperature and cuts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np
from pydantic import Field
from torch import Tensor

from penstock.models.sampling import Sampling
from penstock.policy import Policy, contract, unwritten

#: Tokens as the wire and the device hold them.
Token = Annotated[int, Field(ge=0, lt=1 << 31)]

S = TypeVar("S", bound=Sampling)

#: What tokens behind a text, whose generated tokens are given, are worth: their log-probabilities, given the model's.
Judge = Callable[[Sequence[int], Sequence[int], Sequence[float]], list[float]]


@dataclasses.dataclass(frozen=True)
class Limit:
    """A limiting case: the ``rule`` with options that make it plain decoding, and ``options`` of requests that go with
    it."""

    rule: DecodeRule
    options: dict[str, float]


class Copies(NamedTuple):
    """Each token that is scored is computed ``more`` times, with Gumbel noise of the scale ``noise`` on the routers'
    logits; its scores are those of the mean of all distributions, the one without noise among them."""

    more: int
    noise: float


@contract(
    "decode.rule",
    law="in the limiting case that the policy gives, token for token what plain decoding gives; a sequence's tokens do "
    "not depend on what else is in the batch; one forward pass a token, and of texts that are superposed, which are "
    "those of the definition, one row; choosing takes no more operations for more sequences",
)
class DecodeRule(Policy):
    """Changes sequences' scores, or how tokens are drawn from them, at each position.

    A policy gives :meth:`limit` for its law, and of the other methods those that it needs, :meth:`rescore` or
    :meth:`combine`, not both. A rule has no state: what it needs to know are the tokens so far, or what the model says
    after other prompts. It is asked once a step for all sequences whose rules are computed alike, with the scores as
    penalties, bans and grammars left them; temperature and cuts come after it. A step is planned on the host
    (``serve/run/planner.py`` calls :meth:`options` and :meth:`read`) and chooses on the device
    (``serve/choose/sampler.py`` calls the others).

    Attributes:
        follows: whether it looks at the text, which is to say: gives :meth:`rescore`. Each token must be known to the
            host then before the next one is chosen, so that the sequence takes part in every second of the steps that
            overlap.
        superposes: whether all continuations of a request are computed in one row, which is to say: gives
            :meth:`judge`. They are chosen on the host, and told at their end.
    """

    follows: ClassVar[bool] = False
    superposes: ClassVar[bool] = False

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.follows = cls.rescore is not DecodeRule.rescore
        cls.superposes = cls.judge is not DecodeRule.judge
        if cls.follows and cls.combine is not DecodeRule.combine:
            raise TypeError(f"{cls.__name__} gives rescore() and combine(), of which only one can choose")

    @classmethod
    def limit(cls) -> Limit:
        """The case in which the rule is plain decoding."""
        raise unwritten(cls, "limit()", "return Limit(cls(...), {...}) with options under which it changes nothing")

    @property
    def companions(self) -> tuple[tuple[int, ...], ...]:
        """The prompts of further sequences, which go on with the same tokens in lockstep, and whose scores
        :meth:`combine` is given; empty where there are none.

        Raises:
            UsageError: a prompt is text, which :meth:`tokenized` has not been asked to read.
        """
        return ()

    @property
    def again(self) -> Copies | None:
        """How each token is computed again with other experts; None where it is not. Only a model with experts can."""
        return None

    @property
    def arithmetic(self) -> Self:
        """The rule as far as :meth:`rescore` and :meth:`combine` depend on it: sequences are computed together where
        this is equal."""
        return self

    def tokenized(self, encode: Callable[[str], list[int]]) -> Self:
        """The same rule with what it has of text as tokens."""
        return self

    def refuses(self, sampling: Sampling) -> str | None:
        """Why the rule does not go with ``sampling``, as a sentence; None where it does."""
        return None

    def judge(self, prompt: Sequence[int]) -> Judge | None:
        """Of one that superposes, what judges the tokens that are likeliest behind the continuations of ``prompt``."""
        return None

    def options(self, sampling: S, count: int) -> S:
        """The temperature and cuts with which the token after ``count`` generated ones is drawn."""
        return sampling

    def read(self, texts: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """What :meth:`rescore` has to know of the tokens so far of R sequences, prompts included, as arrays. Behind
        those there may be tentative ones, drafted and not settled yet."""
        return {}

    def rescore(self, scores: Tensor, **known: Tensor) -> Tensor:
        """New scores [R, vocabulary] in place of ``scores`` (float32), those of the tokens that come next, given what
        :meth:`read` found, on their device. Nothing waits for the device."""
        return scores

    def combine(self, scores: Tensor) -> Tensor:
        """The scores [R, vocabulary] by which R groups choose, given those of all n members of each, ``scores``
        [R, n, vocabulary] (float32), the sequence itself first, then its companions. Nothing waits for the device."""
        return scores[:, 0]
