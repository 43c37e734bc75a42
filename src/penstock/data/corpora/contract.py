"""The contract ``data.corpus``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Self

from penstock.core.errors import DataError, UsageError
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

    A policy gives :meth:`documents`, mostly :meth:`size`, and :meth:`example` for its law.
    """

    #: Endings of the file names that hold such a corpus, where a file can.
    suffixes: ClassVar[tuple[str, ...]] = ()

    def documents(self) -> Iterator[Document]:
        """The documents, streamed: none is kept.

        Raises:
            UsageError: a path is not there.
            DataError: the contents are not what the corpus expects; the message names the place.
        """
        raise NotImplementedError

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


def source_files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """``path`` itself if it is a file, else the files below that folder whose names end so, sorted.

    Raises:
        UsageError: there is no such path, or no such file below it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"there is no file or folder {path}")
    found = sorted(file for file in path.rglob("*") if file.name.endswith(suffixes) and file.is_file())
    if not found:
        raise UsageError(f"there is no {' or '.join(suffixes)} file below {path}")
    return found
