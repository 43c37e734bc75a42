"""The oracle for contexts that are moved: whole texts, without a cache, whose keys and values are replaced by those of
earlier texts where a policy leaves them as they were."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.ops.attention import PLAIN, Extras
from penstock.serve.kv.reuse.contract import ChunkCache, Neighbour, Reuse

#: The keys and values of some tokens by layer, [n, K, D] each.
Pairs = list[tuple[Tensor, Tensor]]


@dataclasses.dataclass
class ReplacedRows:
    """An attention context for a whole text, some of whose keys and values are not its own. It notes what there is.

    Attributes:
        positions: int64 [n].
        places: int64 [m], where others are, and ``others`` these.
        pairs: the keys and values by layer, as they were attended to.
        weights: the attention [n, n] of each layer, averaged over the query heads, float64.
    """

    positions: Tensor
    places: Tensor
    others: Pairs
    pairs: Pairs = dataclasses.field(default_factory=list)
    weights: list[Tensor] = dataclasses.field(default_factory=list)
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
        key, value = key.clone(), value.clone()
        if len(self.places):
            key[self.places], value[self.places] = self.others[layer]
        self.pairs.append((key, value))
        groups, count = query.shape[1] // key.shape[1], len(query)
        keys, values = (each.double().repeat_interleave(groups, 1) for each in (key, value))
        scores = scale * torch.einsum("thd,nhd->htn", query.double(), keys)
        weights = scores.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
        self.weights.append(weights.mean(0))
        return torch.einsum("htn,nhd->thd", weights, values).to(query.dtype)


def turned(key: Tensor, by: int, config: DecoderConfig) -> Tensor:
    """Keys [n, K, D] as they are ``by`` so many positions further, as of complex numbers: dimension i and i + D / 2 are
    the parts of one, which is multiplied by exp(i by theta^(-2 i / D))."""
    assert config.rope.scaling is None and config.rope.fraction == 1 and not config.rope.interleaved
    dim = key.shape[-1]
    angles = by * config.rope.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    numbers = torch.complex(*key.double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([numbers.real, numbers.imag], -1).to(key.dtype)


@dataclasses.dataclass(eq=False)
class Remembered:
    """A context as it was computed: what the policy knows of it, and its keys and values there."""

    cache: ChunkCache
    pairs: Pairs


class MovedTexts:
    """Texts with contexts, one after the other, each of which may find contexts of those before.

    Args:
        model: whose keys and values they are.
        policy: says what is computed again.
    """

    def __init__(self, model: Decoder, policy: Reuse) -> None:
        self.model, self._policy = model, policy
        self._known: dict[tuple[int, ...], Remembered] = {}

    def placed(self, before: Sequence[int], contexts: Sequence[list[int]]) -> tuple[list[int], Pairs, list[bytes]]:
        """Which places of a text with ``contexts`` behind ``before`` have keys and values of earlier texts; these; and
        of each context a name for what it depends on. Places with the same contents as in a row are not named."""
        neighbours = [Neighbour(repr(list(before)).encode(), 0, len(before))] if before else []
        places: list[int] = []
        pairs: list[Pairs] = []
        behind, names = repr(list(before)), []
        start = len(before)
        for context in contexts:
            names.append(behind.encode())
            known, kept = self._known.get(tuple(context)), list(range(len(context)))
            if known is not None:
                whole = known.cache.behind == names[-1]
                renewed = () if whole else self._policy.renewed(known.cache, start, neighbours).tolist()
                kept = [place for place in kept if place not in renewed]
                places += [start + place for place in kept]
                by = start - known.cache.start
                pairs.append([(turned(key[kept], by, self.model.config), value[kept]) for key, value in known.pairs])
                behind += "" if whole or not kept else f"moved from {known.cache.mark!r}, but for {renewed}"
            behind += repr(context)
            neighbours.append(Neighbour(repr(context).encode(), start, len(context)))
            start += len(context)
        joined = [(torch.cat([one[0] for one in own]), torch.cat([one[1] for one in own]))
                  for own in zip(*pairs, strict=True)]  # fmt: skip
        return places, joined, names

    @torch.no_grad()
    def scored(self, before: Sequence[int], contexts: Sequence[list[int]], text: Sequence[int]) -> Tensor:
        """Scores [len(text), vocabulary] of what follows each token of the ``text`` behind the ``contexts``."""
        return self._passed(before, contexts, text)[1][-len(text) :]

    def remember(self, before: Sequence[int], contexts: Sequence[list[int]]) -> None:
        """A text was computed: its contexts can be found, those that could not be before."""
        rows, _ = self._passed(before, contexts, [0])
        names = self.placed(before, contexts)[2]
        weights, start = torch.stack(rows.weights).mean(0), len(before)
        neighbours = [Neighbour(repr(list(before)).encode(), 0, len(before))] if before else []
        found = {}
        for context, behind in zip(contexts, names, strict=True):
            own = slice(start, start + len(context))
            drawn = [weights[own, each.start : each.start + each.tokens].sum(1) for each in neighbours]
            table = torch.stack(drawn, 1) if drawn else torch.zeros(len(context), 0)
            mark = behind + repr(context).encode()
            cache = ChunkCache(context, start, behind, mark, tuple(neighbours), table.float().numpy())
            found[tuple(context)] = Remembered(cache, [(key[own], value[own]) for key, value in rows.pairs])
            neighbours.append(Neighbour(repr(context).encode(), start, len(context)))
            start += len(context)
        self._known = found | self._known

    @torch.no_grad()
    def _passed(
        self, before: Sequence[int], contexts: Sequence[list[int]], text: Sequence[int]
    ) -> tuple[ReplacedRows, Tensor]:
        places, pairs, _ = self.placed(before, contexts)
        tokens = [*before, *(token for context in contexts for token in context), *text]
        rows = ReplacedRows(torch.arange(len(tokens)), torch.tensor(places, dtype=torch.int64), pairs)
        return rows, self.model.logits(self.model(torch.tensor(tokens), rows).hidden).double()


class MovedScores:
    """What follows a text, for one text after another, that has ``contexts`` behind its ``shared`` first tokens.

    Args:
        texts: that came before.
        likely: what the texts are prefixes of, most of them.
    """

    def __init__(self, texts: MovedTexts, likely: Sequence[int], contexts: Sequence[list[int]], shared: int) -> None:
        self._texts, self._contexts, self._shared = texts, contexts, shared
        self._text, self._rows = list(likely), self._scored(list(likely))

    def after(self, tokens: Sequence[int]) -> Tensor:
        """Scores [vocabulary] of the token after ``tokens``, float64."""
        if list(tokens) != self._text[: len(tokens)]:
            self._text, self._rows = list(tokens), self._scored(list(tokens))
        return self._rows[len(tokens) - 1 - len(self._text)]

    def _scored(self, text: list[int]) -> Tensor:
        return self._texts.scored(text[: self._shared], self._contexts, text[self._shared :])
