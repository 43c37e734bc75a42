"""Several corpora with weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, PositiveFloat

from penstock.core.config import Config
from penstock.core.errors import DataError
from penstock.data.corpora.contract import Corpus, Document
from penstock.data.corpora.jsonl import JsonLines
from penstock.policy import Choice, policy


class Weighted(Config):
    """A corpus of a mixture; each of its documents comes ``weight`` times, on average."""

    corpus: Annotated[Corpus, Choice("data.corpus")]
    weight: PositiveFloat = 1.0


@policy("data.corpus", "mixture")
class Mixture(Corpus):
    """Several corpora, one after another: a store shuffles them.

    A ``weight`` of 3 takes each document three times, of 0.5 half of the documents, of 2.5 each twice and half of them
    once more. A hash of a document's text decides which half, so a larger weight takes the same documents and more. A
    document's name begins with the place of its corpus.
    """

    parts: tuple[Weighted, ...] = Field(min_length=1, examples=[[{"corpus": "stdlib"}]])

    def items(self) -> Iterator[Document | DataError]:
        for place, part in enumerate(self.parts):
            for item in part.corpus.items():
                if isinstance(item, DataError):
                    yield item
                    continue
                for copy in range(_copies(item.text, part.weight)):
                    again = f" ({copy + 1})" if copy else ""
                    yield Document(f"{place}/{item.name}{again}", item.text)

    def size(self) -> int | None:
        sizes = [(part.corpus.size(), part.weight) for part in self.parts]
        known = [size * weight for size, weight in sizes if size is not None]
        return round(sum(known)) if len(known) == len(sizes) else None

    @classmethod
    def example(cls, folder: Path, texts: Sequence[str]) -> Self:
        half = len(texts) // 2
        parts = []
        for name, part in (("a", texts[:half]), ("b", texts[half:])):
            (folder / name).mkdir()
            parts.append(Weighted(corpus=JsonLines.example(folder / name, part)))
        return cls(parts=tuple(parts))


def _copies(text: str, weight: float) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"penstock mixture").digest()
    return int(weight) + (int.from_bytes(digest, "little") / 2**64 < weight % 1)
