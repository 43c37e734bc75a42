"""The contract ``data.corpus``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Self

from penstock.core.errors import DataError
from penstock.policy import Policy, contract, unwritten


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and a name that tells where it came from.

    Raises:
        DataError: the text cannot be encoded as UTF-8 (it holds half of a surrogate pair, as JSON escapes can).
    """

    name: str
    text: str

    def __post_init__(self) -> None:
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{self.name} is not valid Unicode: {error.reason} at character {error.start}") from error


@contract(
    "data.corpus",
    law="the documents are the texts that were written, in their order, but for the empty ones; every pass gives the "
    "same, streamed, no name twice; the size is about theirs",
)
class Corpus(Policy):
    """A collection of documents. Empty texts are left out.

    A policy gives :meth:`items` where single documents can be damaged, else :meth:`documents`; mostly :meth:`size`; and
    :meth:`example` for its law.
    """

    #: Endings of the file names that hold such a corpus, where a file can; it has options ``path`` and ``field`` then.
    suffixes: ClassVar[tuple[str, ...]] = ()

    def documents(self) -> Iterator[Document]:
        """The documents, streamed: none is kept.

        Raises:
            UsageError: a path is not there.
            DataError: the contents are not what the corpus expects; the message names the place.
        """
        for item in self.items():
            if isinstance(item, DataError):
                raise item
            yield item

    def items(self) -> Iterator[Document | DataError]:
        """The documents, and in the place of each that is damaged what is wrong with it: who reads on skips it."""
        yield from self.documents()

    def size(self) -> int | None:
        """About how many bytes of text there are, for the time left; None where only reading it all would tell."""
        return None

    @classmethod
    def example(cls, folder: Path, texts: Sequence[str]) -> Self | None:
        """Writes ``texts`` as a corpus of this kind below the empty ``folder``, and returns that corpus. The law is
        that its documents are these texts, in their order, without the empty ones.

        None where the kind has one corpus that nobody writes, such as the source of the standard library; then the law
        is that of this corpus with its default options.
        """
        raise unwritten(cls, "example(folder, texts)", "write the texts below the folder, and return the corpus")
