"""The contract ``data.corpus``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from penstock.core.errors import DataError
from penstock.policy import Policy, contract


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


@contract("data.corpus", law="every pass gives the same documents in the same order, none empty, no name twice")
class Corpus(Policy):
    """A collection of documents. Empty texts are left out.

    A policy gives :meth:`items` where single documents can be damaged, else :meth:`documents`.
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
