"""A folder of files of any kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Self, cast

from pydantic import Field

from penstock.core.errors import DataError, UsageError
from penstock.data.corpora.contract import Corpus, Document
from penstock.data.corpora.files import below, is_compressed, matches, opened, plain_name
from penstock.data.corpora.json_files import holds_records
from penstock.data.corpora.text import text_document
from penstock.policy import create, index, policy


@policy("data.corpus", "folder")
class Folder(Corpus):
    """Every file below ``path`` that fits one of the glob ``patterns``, ordered by path, each read as its name says.

    ``.jsonl``, ``.ndjson`` and ``.parquet`` files hold a document a record, in ``field``; so does a ``.json`` file that
    is a list of objects. Any other file is a document of UTF-8 text. All but Parquet may be compressed (``.gz``,
    ``.zst``). Hidden files and folders (``.git``) are left out, and links to folders are followed. A file that is not
    text is an error, or left out where ``skip_binary`` is set. Line ends stay as they are.
    """

    path: Path = Field(examples=["texts"])
    patterns: tuple[str, ...] = ("**/*",)
    field: str = "text"
    skip_binary: bool = False

    def items(self) -> Iterator[Document | DataError]:
        kinds = kinds_by_suffix()
        for path in self._files():
            name = path.relative_to(self.path)
            kind = next((kinds[suffix] for suffix in kinds if plain_name(path).endswith(suffix)), "text")
            if kind == "json" and not _is_data(path):
                kind = "text"
            if kind == "text":
                for item in text_document(path, name.as_posix()):
                    if isinstance(item, Document) or not self.skip_binary:
                        yield item
                continue
            records = cast(Corpus, create(Corpus.contract_name, kind, path=path, field=self.field))
            for item in records.items():
                above = PurePosixPath(name.parent.as_posix())
                yield item if isinstance(item, DataError) else Document((above / item.name).as_posix(), item.text)

    def size(self) -> int | None:
        files = self._files()
        return None if any(map(is_compressed, files)) else sum(path.stat().st_size for path in files)

    @classmethod
    def example(cls, folder: Path, texts: Sequence[str]) -> Self:
        for number, text in enumerate(texts):
            (folder / f"{number:03}.txt").write_bytes(text.encode())
        return cls(path=folder)

    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            what = "is not a folder" if self.path.exists() else "does not exist"
            raise UsageError(f"{self.path} {what}", hint="A folder corpus is a folder of files.")
        for pattern in self.patterns:
            if not pattern or pattern.startswith("/"):
                raise UsageError(f"cannot search {self.path} for {pattern!r}: patterns are relative, such as '**/*.py'")
        return [
            path
            for path in below(self.path)
            if any(matches(path.relative_to(self.path), pattern) for pattern in self.patterns)
        ]


def kinds_by_suffix() -> dict[str, str]:
    """The corpus that reads files with each ending, by its name."""
    entries = index().entries(Corpus.contract_name)
    return {suffix: entry.name for entry in entries for suffix in cast(type[Corpus], entry.load()).suffixes}


def _is_data(path: Path) -> bool:
    try:
        with opened(path) as file:
            return holds_records(file.read())
    except DataError:
        return False  # whoever reads it as text says why
