"""Prompt look-up."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Annotated

from pydantic import Field, model_validator

from penstock.policy import policy
from penstock.speculate.contract import Draft, Drafter


class NgramDraft:
    """Remembers where each run of ``shortest`` to ``longest`` tokens of a text was seen last.

    Looking up and extending cost as many dictionary look-ups as there are lengths, however long the text is.
    """

    def __init__(self, shortest: int, longest: int, most: int) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._most = most
        self._tokens: list[int] = []
        #: Of each run, where the token behind it stands: the last and the last but one place.
        self._behind: dict[tuple[int, ...], tuple[int, int]] = {}

    def extend(self, tokens: List[int]) -> None:
        for token in tokens:
            self._tokens.append(token)
            end = len(self._tokens)
            for length in self._lengths:
                if length <= end:
                    run = tuple(self._tokens[end - length :])
                    self._behind[run] = end, self._behind.get(run, (-1, -1))[0]

    def propose(self, most: int) -> list[int]:
        end = len(self._tokens)
        for length in self._lengths:
            if length < end:
                # The last place is the end of the text itself; what was there before has something behind it.
                _, place = self._behind[tuple(self._tokens[end - length :])]
                if place >= 0:
                    return self._tokens[place : place + min(most, self._most)]
        return []


@policy("speculate.drafter", "ngram")
class Ngram(Drafter):
    """What followed the last time that the text had come to the same few tokens (prompt look-up decoding).

    Needs no model and no training. Pays where output repeats the prompt or itself: edits of code, extraction,
    summaries, answers with quotes. From the published method: the longest run of tokens at the end of the text that
    occurred before, in prompt or output, and what followed it there. Ours: of several places the latest, which is kept
    in a table instead of being searched for.

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

    def start(self, tokens: List[int]) -> Draft:
        draft = NgramDraft(self.shortest, self.longest, self.tokens)
        draft.extend(tokens)
        return draft
