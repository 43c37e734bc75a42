"""What was said before: in this text, and in those of other requests."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as List
from typing import Annotated

from pydantic import Field

from penstock.policy import policy
from penstock.speculate.contract import Draft, Drafter
from penstock.speculate.texts import Text, Texts
from penstock.speculate.tree import Tree, chain, woven

#: Places at which a text is followed at the same time.
FOLLOWED = 16


class SuffixDraft:
    """Follows all places, of any of the ``texts``, that have come to the same tokens as its own."""

    def __init__(self, texts: Texts, drafter: Suffix, tokens: List[int]) -> None:
        self._texts, self._drafter, self._text = texts, drafter, texts.begin()
        #: Texts, the place in each that is behind what agrees, and how many tokens do: most first, then the latest.
        self._followed: list[tuple[Text, int, int]] = []
        self.extend(tokens)

    def extend(self, tokens: List[int]) -> None:
        for token in tokens:
            followed = [
                (text, place + 1, agreed + 1)
                for text, place, agreed in self._followed
                if place < len(text) and text[place] == token
            ]
            self._texts.append(self._text, token)
            if len(followed) < FOLLOWED:
                known = {(id(text), place) for text, place, _ in followed}
                found = self._texts.places(self._text)
                new = ((text, place, self._drafter.shortest) for text, place in found if (id(text), place) not in known)
                followed += itertools.islice(new, FOLLOWED - len(followed))
            self._followed = followed

    def propose(self, most: int) -> list[int]:
        ahead = [each for each in self._followed if each[1] < len(each[0])]
        agreed = ahead[0][2] if ahead else 0
        going = [(text, place) for text, place, own in ahead if own == agreed]
        tokens, chance = list[int](), 1.0
        for _ in range(min(most, self._reach(agreed))):
            if not going:
                break
            [(token, count)] = Counter(text[place] for text, place in going).most_common(1)
            chance *= count / len(going)
            if chance < self._drafter.least:
                break
            tokens.append(token)
            going = [(text, place + 1) for text, place in going if text[place] == token and place + 1 < len(text)]
        return tokens

    def grow(self, branches: List[int], depth: int, most: int) -> Tree:
        first = self.propose(min(depth, most))
        return woven(self._ways(first, depth), branches, most) if branches else chain(first)

    def _ways(self, first: list[int], depth: int) -> Iterator[List[int]]:
        yield first
        for text, place, agreed in self._followed:
            yield text[place : place + min(depth, self._reach(agreed))]

    def _reach(self, agreed: int) -> int:
        """How many tokens are drafted where so many agree."""
        return min(self._drafter.tokens, math.ceil(self._drafter.reach * agreed))


@policy("speculate.drafter", "suffix")
class Suffix(Drafter):
    """What followed most often where any text of the engine, this one or another request's, had come to the same tokens
    (SuffixDecoding, Oliaro et al., 2024).

    Needs no model and no training. Pays where requests resemble each other, or repeat themselves: agents that say much
    the same again and again, edits of one file, answers by a form. From the paper: the longest end of the text that was
    said before, in the request itself or in others; what followed there is drafted by how often it did; and the more
    tokens agree, the more are drafted. Ours: both are one structure, and instead of a suffix tree it is a table of
    where short runs stand, from which a text follows up to 16 places at a time, token by token; what agrees longest
    has a say alone. Not built: a score that chooses between trees of different sizes.

    With the verifier ``exact_match`` the tokens of a request are those of plain decoding, whatever others have said.
    With others that holds of their distribution: which of them come depends on what was drafted.

    Attributes:
        tokens: most that are drafted at a time.
        reach: how many are drafted for each token that agrees.
        least: how likely a drafted token has to be, by what followed elsewhere.
        shortest: how many tokens have to agree.
        kept: tokens of all requests together that are remembered, the latest; 0 for each request its own alone.
    """

    tokens: Annotated[int, Field(ge=1, le=64)] = 24
    reach: Annotated[float, Field(gt=0, le=64)] = 2.0
    least: Annotated[float, Field(ge=0, le=1)] = 0.2
    shortest: Annotated[int, Field(ge=1, le=16)] = 2
    kept: Annotated[int, Field(ge=0, le=10_000_000)] = 200_000

    @property
    def most(self) -> int:
        return self.tokens

    @property
    def branches(self) -> bool:
        return True

    @property
    def remembers(self) -> bool:
        return self.kept > 0

    def opened(self) -> Callable[[List[int]], Draft]:
        texts = Texts(self.shortest, self.kept)
        return functools.partial(SuffixDraft, texts, self) if self.kept else self.start

    def start(self, tokens: List[int]) -> Draft:
        return SuffixDraft(Texts(self.shortest, self.kept), self, tokens)
