"""The oracle for contexts: what follows a text that sees others beside it, by one dense softmax over all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.models.decoder import Decoder
from penstock.ops.attention import PLAIN, Extras
from penstock.serve.kv.reuse.contract import Weighing
from penstock.testing.kept_scores import KeptRows
from penstock.testing.reference import every_logits


def dense(query: Tensor, own: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], after: int, weighing: Weighing,
          scale: float) -> Tensor:  # fmt: skip
    """Attention [n, H, D] of all n tokens of a text, with the ``query`` [n, H, D] and its ``own`` keys and values
    [n, K, D], from the token ``after`` on beside ``others`` [c, K, D], in float64: the softmax over the scores s of the
    text and t / T + (S - 1) log sum exp(t / T), with the scores t of the others."""
    groups, count = query.shape[1] // own[0].shape[1], len(query)
    keys, values, beside, seen = (x.double().repeat_interleave(groups, 1) for x in (*own, *others))
    scores = scale * torch.einsum("thd,nhd->htn", query.double(), keys)
    scores.masked_fill_(torch.ones(count, count, dtype=torch.bool).triu(1), -math.inf)
    cooled = scale / weighing.temperature * torch.einsum("thd,nhd->htn", query.double(), beside)
    cooled = cooled + (weighing.scale - 1) * cooled.exp().sum(-1, keepdim=True).log()
    cooled[:, :after] = -math.inf
    weights = torch.cat([scores, cooled], -1).softmax(-1)
    return torch.einsum("htn,nhd->thd", weights, torch.cat([values, seen]))


@dataclasses.dataclass
class BesideRows:
    """An attention context for a whole text beside contexts, whose keys and values [c, K, D] are given by layer.

    Attributes:
        positions: int64 [n], of the text.
    """

    positions: Tensor
    others: list[tuple[Tensor, Tensor]]
    after: int
    weighing: Weighing
    keeps: bool = True

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        extras: Extras = PLAIN,
    ) -> Tensor:
        assert window is None and extras.none
        out = dense(query, (key, value), self.others[layer], self.after, self.weighing, scale)
        return out.to(query.dtype)


class BesideScores:
    """What follows a text, for one text after another, that sees ``contexts`` from its token ``shared`` on; where there
    is no ``weighing``, contexts stand in it there.

    Args:
        model: whose scores they are.
        likely: what the texts are prefixes of, most of them.
    """

    def __init__(
        self,
        model: Decoder,
        likely: Sequence[int],
        contexts: Sequence[Sequence[int]],
        shared: int,
        weighing: Weighing | None,
    ) -> None:
        self._model, self._contexts, self._shared, self._weighing = model, contexts, shared, weighing
        self._text, self._rows = list(likely), self._scored(list(likely))

    def after(self, tokens: Sequence[int]) -> Tensor:
        """Scores [vocabulary] of the token after ``tokens``, float64."""
        if list(tokens) != self._text[: len(tokens)]:
            self._text, self._rows = list(tokens), self._scored(list(tokens))
        return self._rows[len(tokens) - 1 - len(self._text)]

    @torch.no_grad()
    def _scored(self, text: list[int]) -> Tensor:
        """Of what follows each token of ``text``, contexts in it included, [n, vocabulary]."""
        if self._weighing is None:
            before, behind = text[: self._shared], text[self._shared :]
            return every_logits(self._model, [*before, *(token for each in self._contexts for token in each), *behind])
        places = torch.arange(len(text))
        shift = max(map(len, self._contexts))
        positions = places + shift * (places >= self._shared)
        rows = BesideRows(positions, self._encoded(text[: self._shared]), self._shared, self._weighing)
        return self._model.logits(self._model(torch.tensor(text), rows).hidden).double()

    def _encoded(self, before: list[int]) -> list[tuple[Tensor, Tensor]]:
        """The keys and values of the contexts, by layer, each encoded behind ``before``."""
        found = []
        for context in self._contexts:
            rows = KeptRows(torch.arange(len(before) + len(context)))
            self._model(torch.tensor([*before, *context]), rows)
            pairs = zip(rows.keys, rows.values, strict=True)
            found.append([(key[:, len(before) :], value[:, len(before) :]) for key, value in pairs])
        return [
            (torch.cat(keys, 1).transpose(0, 1), torch.cat(values, 1).transpose(0, 1))
            for keys, values in (zip(*layer, strict=True) for layer in zip(*found, strict=True))
        ]
