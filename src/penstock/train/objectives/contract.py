"""The contract ``train.objective``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from penstock.data.chats.examples import Kind
from penstock.data.loader import Batch
from penstock.models.attention import AttentionContext
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.ops.cross_entropy import IGNORE
from penstock.policy import Policy, contract, unwritten


class Example(NamedTuple):
    """An objective, with what it makes of the scores of some tokens.

    Attributes:
        objective: the objective.
        scores: for each token, the scores of its next one before the softmax.
        targets: for each token, its next one; ``IGNORE`` is not predicted.
        loss: the summed loss, in nats.
        documents: for each token, its sequence; None is one sequence.
        extras: for each token, what the objective needs beside, by name.
    """

    objective: Objective
    scores: list[list[float]]
    targets: list[int]
    loss: float
    documents: list[int] | None = None
    extras: Mapping[str, list[Any]] = {}


class Teacher(NamedTuple):
    """A model that is asked for its ``top`` most probable tokens: a folder as ``hub.resolve`` takes it, or the address
    of a server."""

    source: str
    top: int


@contract(
    "train.objective",
    law="losses and gradients of microbatches add up to those of their whole, for dense and for sparse models; "
    "gradients equal differences of the loss; what is not predicted counts nothing; for a few tokens equal to the loss "
    "that the policy gives, worked out by hand",
)
class Objective(Policy):
    """What training minimises: a sum over what a batch counts, which is its predicted tokens, mostly.

    A policy gives :meth:`hidden_loss`, and :meth:`example` for its law.

    Attributes:
        cross_entropy: whether :meth:`hidden_loss` is the plain cross-entropy of the targets, which can be computed from
            rows of the vocabulary on several devices.
        of_heads: whether a head is trained, and not the model that it is for.
        of_pairs: whether a head is trained for two models: one that drafts for the other.
        scalar: whether the model gets a head that gives a text one number.
        learns_from: the texts of a token store, or the kind of examples that a data set is read as.
        unit: what :meth:`count` counts.
    """

    cross_entropy: ClassVar[bool] = False
    of_heads: ClassVar[bool] = False
    of_pairs: ClassVar[bool] = False
    scalar: ClassVar[bool] = False
    learns_from: ClassVar[Literal["texts"] | Kind] = "texts"
    unit: ClassVar[str] = "token"

    def loss(self, model: Any, batch: Batch, context: AttentionContext) -> Tensor:
        """The summed loss of ``batch``, a scalar in nats; the loop divides by :meth:`count` of the step. ``model`` is a
        Decoder; or a head with its target, of an objective :attr:`of_heads`; or with its two models, of one
        :attr:`of_pairs`."""
        hidden, balance = model(batch.tokens, context)
        loss = self.hidden_loss(model, hidden, batch)
        return loss if balance is None else loss + self.balance_loss(model.config, balance)

    def hidden_loss(self, model: Any, hidden: Tensor, batch: Batch) -> Tensor:
        """What a policy gives: the loss of the last hidden states [*T, hidden]. Of ``model`` only the head is used."""
        raise NotImplementedError

    @property
    def refers(self) -> bool:
        """Whether it needs the log-probability of each sequence under the model at the beginning, in
        ``Batch.extras["reference"]``."""
        return False

    @property
    def teacher(self) -> Teacher | None:
        """Whom to ask, before the run, what it would say in the place of each token that is learnt: its most probable
        tokens in ``Batch.extras["teacher_tokens"]``, and their log-probabilities in ``"teacher_logprobs"``."""
        return None

    def count(self, batch: Batch) -> Tensor:
        """By how much the summed loss is divided to be a mean: the predicted tokens, where a policy says no other."""
        return (batch.targets != IGNORE).sum()

    @classmethod
    def trained(cls, decoder: Decoder) -> Any:
        """What is trained where ``decoder`` is the model at hand, for the law: that itself, or a head for it."""
        return decoder

    @classmethod
    def example(cls) -> Example:
        """An objective of this kind, and its loss for the scores of a few tokens, of which one is not predicted.

        Work it out by hand, or take it from the paper: the law holds the code against it.
        """
        raise unwritten(cls, "example()", "return Example(objective, scores, targets, loss) for a few tokens")

    def balance_loss(self, config: DecoderConfig, balance: Tensor) -> Tensor:
        """What the ``balance`` loss of sparse layers adds, weighted as the model says.

        It is a sum over the batch's tokens, so that its weight does not depend on the batch size; and it is linear, so
        that stages of a pipeline can add it for their own layers.
        """
        weight = config.moe.balance_weight if config.moe is not None else 0.0
        return weight * balance
