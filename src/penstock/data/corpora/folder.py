"""A folder of text files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from pydantic import Field

from penstock.core.errors import DataError, UsageError
from penstock.core.files import explain_os_errors
from penstock.data.corpora.contract import Corpus, Document
from penstock.policy import policy


@policy("data.corpus", "folder")
class Folder(Corpus):
    """Every UTF-8 file below ``path`` that fits one of the glob ``patterns``, one document a file, ordered by path.

    Hidden files and folders (``.git``) are left out. A file that is not UTF-8 is an error, or left out too where
    ``skip_binary`` is set. Line ends stay as they are.
    """

    path: Path = Field(examples=["texts"])
    patterns: tuple[str, ...] = ("**/*",)
    skip_binary: bool = False

    def documents(self) -> Iterator[Document]:
        for path in self._files():
            with explain_os_errors(f"cannot read {path}"):
                payload = path.read_bytes()
            try:
                text = payload.decode()
            except UnicodeDecodeError as error:
                if self.skip_binary:
                    continue
                raise DataError(
                    f"{path} is not UTF-8 text: {error.reason} at byte {error.start}",
                    hint="Choose the files with patterns, such as '**/*.py', or set skip_binary to leave it out.",
                ) from error
            if text:
                yield Document(path.relative_to(self.path).as_posix(), text)

    def size(self) -> int:
        return sum(path.stat().st_size for path in self._files())

    @classmethod
    def example(cls, folder: Path, texts: Sequence[str]) -> Self:
        for number, text in enumerate(texts):
            (folder / f"{number:03}.txt").write_bytes(text.encode())
        return cls(path=folder)

    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            what = "is not a folder" if self.path.exists() else "does not exist"
            raise UsageError(f"{self.path} {what}", hint="A folder corpus is a folder of text files.")
        try:
            found = {path for pattern in self.patterns for path in self.path.glob(pattern)}
        except (ValueError, NotImplementedError) as error:
            raise UsageError(f"cannot search {self.path} for {', '.join(map(repr, self.patterns))}: {error}") from error
        return sorted(
            path
            for path in found
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(self.path).parts)
        )
