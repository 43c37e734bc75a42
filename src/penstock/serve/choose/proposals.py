"""What a model drafts from, and tokens that are chosen with that in view."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.core.devices import upload
from penstock.core.randomness import derive, uniforms
from penstock.models.sampling import draw
from penstock.ops.cuts import cut_softmax
from penstock.serve.choose.asked import Asked
from penstock.serve.choose.sampler import Drawn, Sampled, Sampler
from penstock.speculate.drafting import draw_drafts
from penstock.speculate.tree import drafts_at
from penstock.speculate.verifiers.contract import Verifier


@dataclasses.dataclass(frozen=True)
class Proposals:
    """The distributions that tentative tokens were drawn from, and who verifies them.

    Attributes:
        verifier: says which tokens come out.
        chances: float32 [n, V].
        drafts: int64 [n, k], the tokens that were drawn from each of these, in order; -1 behind the last.
        rows: int64 [slots, W], from which of these what follows a node of a slot (:attr:`Asked.nodes`) was drawn; -1
            where nothing was. Whether something was must not depend on what it is.
    """

    verifier: Verifier
    chances: Tensor
    drafts: np.ndarray
    rows: np.ndarray

    def settle(self, scores: Tensor, asked: Asked, tokens: Tensor) -> None:
        """Puts what comes out of the rows with drawn drafts into ``tokens`` [R], in place of what was chosen from
        ``scores`` [R, V] alone. Greedy rows stay: there every verifier comes to the same."""
        nodes = asked.nodes
        inside = np.flatnonzero((asked.rows["temperature"] > 0) & (nodes < self.rows.shape[1]))
        own = inside[self.rows[asked.slots[inside], nodes[inside]] >= 0]
        if not own.size:
            return
        device, drawn = scores.device, self.rows[asked.slots[own], nodes[own]]
        draws, rows = upload(asked.draws[:, own], device), upload(own, device)
        target = cut_softmax(scores[rows], draws[:4])
        proposal, drafted = self.chances[upload(drawn, device)], upload(self.drafts[drawn], device)
        tokens[rows] = draw(self.verifier.chances(target, proposal, drafted), draws[4])


class ProposingSampler(Sampler):
    """Draws from distributions that are written down.

    Attributes:
        proposed: float32 [R, V], those of the rows of the last step.
    """

    proposed: Tensor

    def sample(
        self, logits: Tensor, asked: Asked, drawn: Drawn | None = None, proposals: Proposals | None = None
    ) -> tuple[Sampled, Tensor]:
        # What a graph drew was not written down.
        return super().sample(logits, asked)

    def _choose(self, scores: Tensor, asked: Asked) -> Tensor:
        draws = self._of(asked.draws)
        self.proposed = cut_softmax(scores, draws[:4])
        return draw(self.proposed, draws[4])


class BranchingSampler(Sampler):
    """Draws several drafts for each place of a tree, and does not go on by any of them.

    Where the text is chosen as without drafts, the first draft is what this model would say itself, by the draw of the
    place, and the others are the likeliest besides. Else they are drawn as the verifier has it.

    Args:
        slots, vocabulary, device: as of :class:`Sampler`.
        branches: how many drafts a place has, by depth; one behind the last.
        verifier: of the drafts.

    Attributes:
        drafts: int64 [R, k], of the rows of the last step, -1 behind the last of each.
        proposed: float32 [R, V], what they were drawn from; None where the verifier does not ask.
    """

    drafts: Tensor
    proposed: Tensor | None

    def __init__(
        self, slots: int, vocabulary: int, device: torch.device, branches: Sequence[int], verifier: Verifier
    ) -> None:
        super().__init__(slots, vocabulary, device)
        self._branches, self._verifier = branches, verifier

    def sample(
        self, logits: Tensor, asked: Asked, drawn: Drawn | None = None, proposals: Proposals | None = None
    ) -> tuple[Sampled, Tensor]:
        scores = self._rescored(logits, asked) if asked.rows["rescored"].any() else logits
        # All rows of a step are equally far ahead.
        count = min(drafts_at(self._branches, int(asked.depths[0])), scores.shape[-1])
        self.proposed = None
        if self._verifier.matches:
            self.drafts = self._likeliest(scores, asked, count)
        else:
            self.proposed = cut_softmax(scores, self._of(asked.draws[:4]))
            self.drafts = draw_drafts(self.proposed, count, self._verifier.drafting, self._of(_numbers(asked, count)))
            greedy = np.flatnonzero(asked.rows["temperature"] == 0)
            if greedy.size:
                best = scores[self._of(greedy)].float().topk(count, -1)
                self.drafts[self._of(greedy)] = best.indices.where(best.values > -torch.inf, -1)
        tokens = self.drafts[:, 0]
        return Sampled(tokens), tokens[self._of(asked.first)]

    def _likeliest(self, scores: Tensor, asked: Asked, count: int) -> Tensor:
        """What is chosen, and of the others those with the highest scores."""
        chosen = self._choose(scores, asked).unsqueeze(-1)
        others = scores.float().scatter(-1, chosen, -torch.inf).topk(count - 1, -1)
        return torch.cat([chosen, others.indices.where(others.values > -torch.inf, -1)], -1)


def _numbers(asked: Asked, count: int) -> np.ndarray:
    """Numbers float64 [R, count] for the drafts of each row, the first the row's own."""
    keys = asked.rows["key"]
    others = [uniforms(keys ^ np.uint64(derive(number, "drafts")), asked.counts) for number in range(1, count)]
    return np.stack([asked.draws[4], *others], -1)
