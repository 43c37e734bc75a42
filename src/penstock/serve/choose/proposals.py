"""What a model drafts from, and tokens that are chosen with that in view."""

from __future__ import annotations

import dataclasses

import numpy as np
from torch import Tensor

from penstock.core.devices import upload
from penstock.models.sampling import draw
from penstock.ops.cuts import cut_softmax
from penstock.serve.choose.asked import Asked
from penstock.serve.choose.sampler import Sampled, Sampler
from penstock.speculate.verifiers.contract import Verifier


@dataclasses.dataclass(frozen=True)
class Proposals:
    """The distributions that tentative tokens were drawn from, and who verifies them.

    Attributes:
        verifier: says which tokens come out.
        chances: float32 [n, V].
        rows: int64 [slots, W], which of these the tentative token of a slot at a depth was drawn from; -1 for none.
    """

    verifier: Verifier
    chances: Tensor
    rows: np.ndarray

    def settle(self, scores: Tensor, asked: Asked, tokens: Tensor) -> None:
        """Puts what comes out of the rows with drawn drafts into ``tokens`` [R], in place of what was chosen from
        ``scores`` [R, V] alone. Greedy rows stay: there every verifier comes to the same."""
        assert asked.window is not None
        depths = asked.depths
        inside = np.flatnonzero((asked.rows["temperature"] > 0) & (depths < self.rows.shape[1]))
        own = inside[self.rows[asked.slots[inside], depths[inside]] >= 0]
        own = own[asked.depths[own] < (asked.window[asked.owners[own]] >= 0).sum(-1)]
        if not own.size:
            return
        device = scores.device
        draws, rows = upload(asked.draws[:, own], device), upload(own, device)
        target = cut_softmax(scores[rows], draws[:4])
        proposal = self.chances[upload(self.rows[asked.slots[own], depths[own]], device)]
        drafted = upload(asked.window[asked.owners[own], depths[own]], device)
        tokens[rows] = draw(self.verifier.chances(target, proposal, drafted.unsqueeze(-1)), draws[4])


class ProposingSampler(Sampler):
    """Draws from distributions that are written down.

    Attributes:
        proposed: float32 [R, V], those of the rows of the last step.
    """

    proposed: Tensor

    def sample(
        self, logits: Tensor, asked: Asked, drawn: Tensor | None = None, proposals: Proposals | None = None
    ) -> tuple[Sampled, Tensor]:
        # What a graph drew was not written down.
        return super().sample(logits, asked)

    def _choose(self, scores: Tensor, asked: Asked) -> Tensor:
        draws = self._of(asked.draws)
        self.proposed = cut_softmax(scores, draws[:4])
        return draw(self.proposed, draws[4])
