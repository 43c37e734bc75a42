"""Samplers that tell how sure the model was of what it drafts."""

from __future__ import annotations

from torch import Tensor

from penstock.serve.choose.asked import Asked
from penstock.serve.choose.proposals import BranchingSampler, Proposals, ProposingSampler
from penstock.serve.choose.sampler import Drawn, Sampled, Sampler


class ConfidentSampler(Sampler):
    """Draws as a sampler does, and tells the model's own probability of the token of each row, whatever the temperature
    and the cuts: after bias, penalties, grammars and rules.

    Attributes:
        confidence: float32 [R], of the rows of the last step.
    """

    confidence: Tensor

    def sample(
        self, logits: Tensor, asked: Asked, drawn: Drawn | None = None, proposals: Proposals | None = None
    ) -> tuple[Sampled, Tensor]:
        # Before it is remembered what was chosen, which is charged for then.
        scores = self._rescored(logits, asked) if asked.rows["rescored"].any() else logits
        sampled, newest = super().sample(logits, asked, drawn, proposals)
        chances = scores.float().softmax(-1)
        self.confidence = chances.gather(-1, sampled.tokens.unsqueeze(-1)).squeeze(-1)
        return sampled, newest


class ConfidentProposingSampler(ConfidentSampler, ProposingSampler):
    """The same where distributions are written down."""


class ConfidentBranchingSampler(ConfidentSampler, BranchingSampler):
    """The same of the first draft of each place, which is what the model would say itself."""
