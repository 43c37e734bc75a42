"""Prompt look-up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as List
from typing import Annotated

from pydantic import Field, model_validator

from penstock.policy import policy
from penstock.speculate.contract import Draft, Drafter
from penstock.speculate.tree import Tree, leaves, woven

#: Places that are looked at for each way of a tree that is wanted: many say the same.
LOOKED = 4


class NgramDraft:
    """Remembers where each run of ``shortest`` to ``longest`` tokens of a text was seen.

    Looking up and extending cost as many dictionary look-ups as there are lengths, however long the text is.
    """

    def __init__(self, shortest: int, longest: int, most: int) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._most = most
        self._tokens: list[int] = []
        #: Of each run, the last place at which the token behind it stands.
        self._behind: dict[tuple[int, ...], int] = {}
        #: By length, of the run that ends at each place, the place before that; -1 where it is the first.
        self._before = {length: [-1] for length in self._lengths}

    def extend(self, tokens: List[int]) -> None:
        for token in tokens:
            self._tokens.append(token)
            end = len(self._tokens)
            for length in self._lengths:
                before = self._before[length]
                if length > end:
                    before.append(-1)
                    continue
                run = tuple(self._tokens[end - length :])
                before.append(self._behind.get(run, -1))
                self._behind[run] = end

    def propose(self, most: int) -> list[int]:
        place = next(self._places(), None)
        return [] if place is None else self._tokens[place : place + min(most, self._most)]

    def grow(self, branches: List[int], depth: int, most: int) -> Tree:
        ways = leaves(branches)
        places = itertools.islice(self._places(), ways if ways == 1 else LOOKED * ways)
        ahead = min(depth, self._most)
        return woven((self._tokens[place : place + ahead] for place in places), branches, most)

    def _places(self) -> Iterator[int]:
        """Where the text had come to the same tokens: as many as can be first, and of those the latest."""
        for length in self._lengths:
            # At the end is the text itself; what was there before has something behind it.
            place = self._before[length][-1]
            while place >= 0:
                yield place
                place = self._before[length][place]


@policy("speculate.drafter", "ngram")
class Ngram(Drafter):
    """What followed the last time that the text had come to the same few tokens (prompt look-up decoding).

    Needs no model and no training. Pays where output repeats the prompt or itself: edits of code, extraction,
    summaries, answers with quotes. From the published method: the longest run of tokens at the end of the text that
    occurred before, in prompt or output, and what followed it there. Ours: of several places the latest, which is kept
    in a table instead of being searched for; a tree has the others too, those after shorter runs last.

    Attributes:
        tokens: most that are drafted at a time.
        shortest, longest: how many tokens have to agree.
    """

    tokens: Annotated[int, Field(ge=1, le=64)] = 8
    shortest: Annotated[int, Field(ge=1, le=16)] = 2
    longest: Annotated[int, Field(ge=1, le=16)] = 4

    @model_validator(mode="after")
    def _ordered(self) -> Ngram:
        if self.shortest > self.longest:
            raise ValueError(f"shortest ({self.shortest}) cannot be more than longest ({self.longest})")
        return self

    @property
    def most(self) -> int:
        return self.tokens

    @property
    def branches(self) -> bool:
        return True

    def start(self, tokens: List[int]) -> Draft:
        draft = NgramDraft(self.shortest, self.longest, self.tokens)
        draft.extend(tokens)
        return draft
