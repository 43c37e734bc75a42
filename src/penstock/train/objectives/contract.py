"""The contract ``train.objective``."""

from __future__ import annotations

from torch import Tensor

from penstock.data.loader import Batch
from penstock.models.attention import AttentionContext
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.policy import Policy, contract


@contract("train.objective", law="the gradients of microbatches add up to the gradient of their whole")
class Objective(Policy):
    """What training minimises: a sum over the predicted tokens of a batch."""

    def loss(self, model: Decoder, batch: Batch, context: AttentionContext) -> Tensor:
        """The summed loss of ``batch``, a scalar in nats; the loop divides by the predicted tokens of the step."""
        hidden, balance = model(batch.tokens, context)
        loss = self.hidden_loss(model, hidden, batch)
        return loss if balance is None else loss + self.balance_loss(model.config, balance)

    def hidden_loss(self, model: Decoder, hidden: Tensor, batch: Batch) -> Tensor:
        """What a policy gives: the loss of the last hidden states [*T, hidden]. Of ``model`` only the head is used."""
        raise NotImplementedError

    def balance_loss(self, config: DecoderConfig, balance: Tensor) -> Tensor:
        """What the ``balance`` loss of sparse layers adds, weighted as the model says.

        It is a sum over the batch's tokens, so that its weight does not depend on the batch size; and it is linear, so
        that stages of a pipeline can add it for their own layers.
        """
        weight = config.moe.balance_weight if config.moe is not None else 0.0
        return weight * balance
