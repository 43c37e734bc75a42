"""Text files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field

from penstock.core.errors import DataError
from penstock.data.corpora.contract import Corpus, Document
from penstock.data.corpora.files import opened, sizes, source_files
from penstock.policy import policy


@policy("data.corpus", "text")
class Text(Corpus):
    """A UTF-8 text file, or every ``.txt`` and ``.md`` file below a folder, one document a file, compressed or not
    (``.gz``, ``.zst``). Line ends stay as they are.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".md")

    path: Path = Field(examples=["texts"])

    def items(self) -> Iterator[Document | DataError]:
        for path in source_files(self.path, self.suffixes):
            yield from text_document(path, path.name if path == self.path else path.relative_to(self.path).as_posix())

    def size(self) -> int | None:
        return sizes(source_files(self.path, self.suffixes))

    @classmethod
    def example(cls, folder: Path, texts: Sequence[str]) -> Self:
        for number, text in enumerate(texts):
            (folder / f"{number:03}.md").write_bytes(text.encode())
        return cls(path=folder)


def text_document(path: Path, name: str) -> Iterator[Document | DataError]:
    """The file at ``path`` as a document called ``name``; nothing where it is empty, an error where it is no text."""
    try:
        with opened(path) as file:
            text = file.read().decode()
    except UnicodeDecodeError as error:
        yield DataError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}",
            hint="Choose the files with patterns, such as '**/*.py', or leave such files out with --skip-bad "
            "(skip_bad in a configuration).",
        )
    except DataError as fault:
        yield fault
    else:
        if text:
            yield Document(name, text)
