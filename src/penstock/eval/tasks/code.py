"""Bits per byte of real code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from penstock.core.randomness import numpy_generator
from penstock.data.building import is_held_out
from penstock.data.corpora.contract import Corpus, Document
from penstock.data.corpora.folder import Folder
from penstock.data.corpora.stdlib import StandardLibrary
from penstock.eval.contract import Predicted, Sample, Task, chosen
from penstock.policy import Choice, policy


@policy("eval.task", "code")
class Code(Predicted):
    """Pieces of documents that training holds out, each behind the lines that stand before it: by default of the
    source of the machine's own Python standard library, its tests included.

    Attributes:
        corpus: where documents come from.
        held_out: the share of them that is held out. A run of ``penstock train`` that held out at least as much of the
            same corpus has not seen them: by default it is 0.02.
        context: characters before a piece, at most.
        length: characters of a piece, about.
    """

    corpus: Annotated[Corpus, Choice("data.corpus", default="stdlib")] = StandardLibrary(tests=True)
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.02
    context: Annotated[int, Field(ge=16)] = 1024
    length: Annotated[int, Field(ge=16)] = 1024

    def holds_out(self, key: str) -> bool:
        return is_held_out(key, self.held_out)

    @classmethod
    def example(cls) -> Task:
        source = Folder(path=Path(__file__).parents[2], patterns=("**/*.py",))
        return cls(samples=8, corpus=source, held_out=0.2, context=200, length=200)

    def draw(self) -> list[Sample]:
        held_out = self.part == "held_out"
        documents = [each for each in self.corpus.documents() if self.holds_out(each.text) == held_out]

        def make(attempt: int) -> Sample:
            return self._piece(documents, attempt)

        return chosen(make, self.samples, lambda sample: bool(sample.reference), "eval.task 'code'")

    def _piece(self, documents: Sequence[Document], attempt: int) -> Sample:
        """Whole lines of one of the ``documents``; nothing, where it is too short."""
        draw = numpy_generator(self.seed, f"eval/code/{self.part}", attempt)
        text = documents[int(draw.integers(len(documents)))].text if documents else ""
        border = text.find("\n", int(draw.integers(len(text) + 1))) + 1
        end = text.find("\n", border + self.length) + 1
        begin = text.find("\n", max(0, border - self.context)) + 1 if border > self.context else 0
        if not 0 < border < end or begin >= border:
            return Sample("", "", "")
        return Sample(text[begin:border], text[border:end], text)
