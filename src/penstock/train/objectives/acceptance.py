"""What a target accepts of a draft, predicted."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from penstock.data.loader import Batch
from penstock.models.acceptance.head import Pair
from penstock.models.attention import AttentionContext
from penstock.models.decoder import Decoder
from penstock.ops.cross_entropy import IGNORE
from penstock.policy import policy
from penstock.train.objectives.contract import Example, Objective


@policy("train.objective", "acceptance", papers=[374])
class Acceptance(Objective):
    """Cross-entropy of the predicted probability that a drafted token is accepted against the probability that it is,
    min(1, p / q) for the target's probability p and the draft's q.

    From the paper: a head on the drafting model that predicts the conditional acceptance probability. From its authors'
    code: the soft labels, and a weight for rejections. Ours: what is drafted is not drawn. In each place of the corpus,
    the draft's likeliest tokens are taken together, each by its probability, so that the loss has no noise of draws;
    and texts are those of the corpus, not the target's own. What comes before a token is the text itself, since a
    prediction counts where all before it was accepted. Not built: the mixing of drafted tokens into the texts, which
    the authors need where their head reads the drafted token's own hidden state.

    Attributes:
        temperature: of the texts that will be drafted; 0 is greedy decoding, where a token is accepted if it is the
            target's likeliest.
        drafts: how many of the draft's likeliest tokens are looked at in each place.
        rejections: the weight of rejections. The authors take 6, against the many acceptances; with 1, predictions are
            probabilities, for which the controller's threshold is meant.
        chunk: how many tokens' logits exist at a time.
    """

    of_pairs: ClassVar[bool] = True

    temperature: float = Field(1.0, ge=0, le=10)
    drafts: PositiveInt = 8
    rejections: float = Field(1.0, gt=0, le=100)
    chunk: PositiveInt = 1024

    def loss(self, model: Any, batch: Batch, context: AttentionContext) -> Tensor:
        with torch.no_grad():
            drafted, said = (each(batch.tokens, context).hidden for each in (model.draft, model.target))
        return self._summed(model, drafted, said, batch)

    def hidden_loss(self, model: Any, hidden: Tensor, batch: Batch) -> Tensor:
        """Where both models have the same ``hidden`` states."""
        return self._summed(model, hidden, hidden, batch)

    def _summed(self, model: Pair, drafted: Tensor, said: Tensor, batch: Batch) -> Tensor:
        counts = (batch.targets != IGNORE).flatten()
        whole = (drafted.flatten(0, -2), said.flatten(0, -2), counts)
        pieces = zip(*(torch.split(each, self.chunk) for each in whole), strict=True)
        return torch.stack([recompute(self._cross_entropy, model, *each, use_reentrant=False) for each in pieces]).sum()

    def _cross_entropy(self, model: Pair, drafted: Tensor, said: Tensor, counts: Tensor) -> Tensor:
        """That of some hidden states of both models, [N, hidden] each, summed over the places that count."""
        share, accepted, logits = self.predicted(model, drafted, said)
        each = accepted * F.logsigmoid(logits) + self.rejections * (1 - accepted) * F.logsigmoid(-logits)
        return -((share * each).sum(-1) * counts).sum()

    def predicted(self, model: Pair, drafted: Tensor, said: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the likeliest tokens that may be drafted from some hidden states ``drafted`` [N, hidden] where the target
        has ``said`` [N, hidden]: the share of each, the probability that it is accepted, and the logit of that which
        is predicted, [N, drafts] each."""
        with torch.no_grad():
            proposal = self._chances(model.draft.logits(drafted))
            chances, tokens = proposal.topk(min(self.drafts, proposal.shape[-1]), -1)
            target = self._chances(model.target.logits(said)).gather(-1, tokens)
            accepted = (target / chances.clamp_min(torch.finfo(chances.dtype).tiny)).clamp(max=1)
        logits = model.head(model.draft, drafted.unsqueeze(1).expand(-1, tokens.shape[1], -1), tokens)
        return chances / chances.sum(-1, keepdim=True), accepted, logits.to(chances.dtype)

    def _chances(self, logits: Tensor) -> Tensor:
        """The distributions that tokens are drawn from."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperature:
            return (wide / self.temperature).softmax(-1)
        return F.one_hot(wide.argmax(-1), wide.shape[-1]).to(wide.dtype)

    @classmethod
    def trained(cls, decoder: Decoder) -> Any:
        # A target that is twice as sure as the draft, or at least another one.
        target = copy.deepcopy(decoder)
        with torch.no_grad():
            target.head.weight.mul_(2)
        return Pair.new(decoder, target, seed=0)

    @classmethod
    def example(cls) -> Example:
        # The draft says 1/4, 1/4 and 1/2, and the target, whose scores are twice these, 1/6, 1/6 and 2/3: it accepts
        # the sum of the smaller ones, 5/6. Where the draft says 1/3 of each, so does the target, which accepts all. A
        # head that has learnt nothing says 1/2 of everything, so that each acceptance costs log 2, and each rejection
        # three times that.
        scores = [[0.0, 0.0, math.log(2)], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]
        return Example(cls(rejections=3), scores, [2, IGNORE, 0], (5 / 6 + 3 / 6 + 1) * math.log(2))
