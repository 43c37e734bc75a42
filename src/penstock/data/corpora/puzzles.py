"""Puzzles with their solutions, to train what test-time search is measured on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from penstock.data.corpora.contract import Corpus, Document
from penstock.data.puzzle_forms import formed
from penstock.data.puzzles import KINDS, puzzles
from penstock.policy import policy

#: About how many bytes a puzzle has.
SIZE = 48

#: And one that is asked in another form.
FORMED = 96


@policy("data.corpus", "puzzles")
class Puzzles(Corpus):
    """Small Python functions, Countdown, 4x4 and 6x6 Sudoku with their solutions, in turn; those that ``penstock
    bench search`` asks are held out by construction.

    Attributes:
        count: how many.
        hardest: how hard they are: of so many levels, in turn.
        formed: the share of them that are asked as programs of test-time search ask, in one of the forms of
            :mod:`penstock.data.puzzle_forms`; the others are bare.
    """

    count: PositiveInt = 3000
    hardest: Annotated[int, Field(ge=1, le=6)] = 1
    formed: Annotated[float, Field(ge=0, le=1)] = 0.0

    def documents(self) -> Iterator[Document]:
        draw = random.Random("forms")
        sources = [puzzles(kind, held_out=False, hardest=self.hardest) for kind in KINDS]
        for number, source in zip(range(self.count), itertools.cycle(sources), strict=False):
            puzzle = next(source)
            text = formed(puzzle, draw) if draw.random() < self.formed else puzzle.prompt + puzzle.solution
            yield Document(f"{puzzle.kind} {number}", text)

    def size(self) -> int:
        return round(self.count * (SIZE + self.formed * (FORMED - SIZE)))

    @classmethod
    def example(cls, folder: Path, texts: Sequence[str]) -> None:
        """Nobody writes puzzles: they are made."""
