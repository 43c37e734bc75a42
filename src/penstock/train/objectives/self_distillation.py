"""Self-distillation of a head."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from penstock.data.loader import Batch
from penstock.models.attention import AttentionContext, rows_of
from penstock.models.decoder import Decoder
from penstock.models.heads.contract import Guess
from penstock.models.heads.headed import Headed
from penstock.models.heads.medusa import Medusa
from penstock.ops.cross_entropy import IGNORE
from penstock.policy import policy
from penstock.train.objectives.contract import Example, Objective


@policy("train.objective", "self_distillation", papers=[162, 333])
class SelfDistillation(Objective):
    """Cross-entropy of what a head guesses against what its target says in the same place.

    What a draft is accepted for is to be what the target says, not what the text has, so the target's whole
    distribution is learnt. From the papers: the model itself is the teacher of its exit [162], and of its prompt tokens
    [333]. Ours: texts are those of the corpus, not of the model's own making; guesses further ahead, which count only
    where those before were right, weigh less.

    Attributes:
        decay: the weight of a guess for the token that is k further ahead is ``decay``**k.
        chunk: how many tokens' logits exist at a time.
    """

    of_heads: ClassVar[bool] = True

    decay: float = Field(0.8, gt=0, le=1)
    chunk: PositiveInt = 1024

    def loss(self, model: Any, batch: Batch, context: AttentionContext) -> Tensor:
        with torch.no_grad():
            hidden = model.target(batch.tokens, context).hidden
        return self._summed(model, hidden, batch, context)

    def hidden_loss(self, model: Any, hidden: Tensor, batch: Batch) -> Tensor:
        return self._summed(model, hidden, batch, rows_of(batch.documents))

    def _summed(self, model: Headed, hidden: Tensor, batch: Batch, context: AttentionContext) -> Tensor:
        total = hidden.new_zeros(())
        for guess in model.head.guesses(model.target, hidden, batch.tokens, context):
            total = total + self.decay**guess.ahead * self._against(model.target, guess, hidden, batch)
        return total

    def _against(self, target: Decoder, guess: Guess, hidden: Tensor, batch: Batch) -> Tensor:
        """The summed cross-entropy of one guess in all places that have what it is for."""
        ahead, length = guess.ahead, batch.tokens.shape[-1]
        if ahead >= length:
            return hidden.new_zeros(())
        same = batch.documents[..., : length - ahead] == batch.documents[..., ahead:]
        counts = (same & (batch.targets[..., ahead:] != IGNORE)).flatten()
        guessed, said = guess.hidden[..., : length - ahead, :].flatten(0, -2), hidden[..., ahead:, :].flatten(0, -2)
        return torch.stack(
            [
                recompute(_cross_entropy, target, *piece, use_reentrant=False)
                for piece in zip(*(torch.split(each, self.chunk) for each in (guessed, said, counts)), strict=True)
            ]
        ).sum()

    @classmethod
    def trained(cls, decoder: Decoder) -> Any:
        return Headed.new(decoder, Medusa(heads=2), seed=0)

    @classmethod
    def example(cls) -> Example:
        # The target says 1/3 of each token, then 1/4, 1/4 and 1/2, then 1/8, 3/8 and 1/2; heads that have learnt
        # nothing say the same, of a token and of two tokens later. What follows the second token is not predicted.
        scores = [[1.0, 1.0, 1.0], [0.0, 0.0, math.log(2)], [0.0, math.log(3), math.log(4)]]
        one_ahead, two_ahead = 1.5 * math.log(2), math.log(3)
        return Example(cls(decay=0.5), scores, [2, IGNORE, 0], 0.5 * one_ahead + 0.25 * two_ahead)


def _cross_entropy(target: Decoder, guessed: Tensor, said: Tensor, counts: Tensor) -> Tensor:
    """That of the logits of some ``guessed`` hidden states [N, hidden] to those of what is ``said`` [N, hidden], summed
    over the places that count."""
    wide = torch.promote_types(guessed.dtype, torch.float32)
    teacher = target.logits(said).to(wide).softmax(-1)
    each = -(teacher * target.logits(guessed).to(wide).log_softmax(-1)).sum(-1)
    return (each * counts).sum()
