"""Several drafts of a text, which a model goes on with at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from collections.abc import Sequence as List
from typing import Annotated

from pydantic import Field

from penstock.policy import policy
from penstock.speculate.contract import Draft
from penstock.speculate.drafters.model import Model, ModelDraft
from penstock.speculate.texts import Texts


class SuperposedDraft(ModelDraft):
    """Knows what followed short runs of tokens, in any of the ``texts``."""

    def __init__(self, texts: Texts, drafter: Superposed, tokens: List[int]) -> None:
        super().__init__(drafter.tokens)
        self._texts, self._drafter, self._text = texts, drafter, texts.begin()
        self.extend(tokens)

    def extend(self, tokens: List[int]) -> None:
        for token in tokens:
            self._texts.append(self._text, token)

    def chances(self, ahead: List[int], tokens: List[int], shares: List[float]) -> list[float]:
        followed = self._texts.followers(self._text, ahead)
        count, say = followed.total(), self._drafter.say
        if not count:
            return list(shares)
        return [(1 - say) * share + say * followed[token] / count for token, share in zip(tokens, shares, strict=True)]


@policy("speculate.drafter", "superposed", papers=[399])
class Superposed(Model):
    """Several texts that a smaller model drafts in one pass a token, however many there are (Superposed Decoding).

    Pays where several drafts are to be verified, and rows of the model that drafts cost much: a tree of ``draft_tree``
    has it compute all of its tokens. From the paper: in each pass the model is given one row for all drafts, the
    weighted sum of their last tokens' embeddings; the drafts are crossed with the tokens that are the likeliest behind
    it, as many as there are drafts; each of the crossed ones is scored by the model's probability, mixed with that of
    n-grams behind the draft itself; and the best stay, as many as before. From knowledge: the weights, which are the
    drafts' own probabilities. Ours: all that is drafted for the verifier is the tree of the drafts that stayed last, so
    that the text is the target's in any case; n-grams are of one length, counted in the texts of the engine and not in
    a corpus, mixed by a sum, and without a say where they were never seen; a draft that ends the text stays and is not
    crossed any more; penalties and grammars hold for each draft by itself. Drafts that are answers themselves, without
    a verifier: ``decode.rule/superposed``.

    Attributes:
        source: a model folder, a run folder, a boxed model or a hub name.
        tokens: most that are drafted at a time, of each text.
        drafts: how many texts. One is what the model says greedily.
        say: how much is the n-grams'; 0 leaves it to the model.
        run: how many tokens have to agree before what followed them counts.
        kept: tokens of all requests together that are remembered, the latest; 0 for each request its own alone.
    """

    tokens: Annotated[int, Field(ge=1, le=32)] = 4
    drafts: Annotated[int, Field(ge=1, le=8)] = 3
    say: Annotated[float, Field(ge=0, le=1)] = 0.3
    run: Annotated[int, Field(ge=1, le=16)] = 2
    kept: Annotated[int, Field(ge=0, le=10_000_000)] = 200_000

    @property
    def branches(self) -> bool:
        return False

    @property
    def superposes(self) -> int:
        return self.drafts

    @property
    def remembers(self) -> bool:
        return self.kept > 0 and self.say > 0

    def opened(self) -> Callable[[List[int]], Draft]:
        texts = Texts(self.run, self.kept)
        return functools.partial(SuperposedDraft, texts, self) if self.remembers else self.start

    def start(self, tokens: List[int]) -> Draft:
        return SuperposedDraft(Texts(self.run, self.kept), self, tokens)
