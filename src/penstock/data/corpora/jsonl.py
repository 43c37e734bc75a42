"""Files with one JSON object a line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, ClassVar, Self

from pydantic import Field

from penstock.core.errors import DataError, nearest
from penstock.core.files import explain_os_errors
from penstock.data.corpora.contract import Corpus, Document, source_files
from penstock.policy import policy


@policy("data.corpus", "jsonl")
class JsonLines(Corpus):
    """The string under ``field`` in each line of a ``.jsonl`` or ``.jsonl.gz`` file, or of all those below a folder.

    Blank lines and empty or null strings are left out. A document is named after its file and line.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".jsonl.gz")

    path: Path = Field(examples=["texts"])
    field: str = "text"

    def documents(self) -> Iterator[Document]:
        files = source_files(self.path, self.suffixes)
        for path in files:
            name = path.name if path == self.path else path.relative_to(self.path).as_posix()
            for number, line in enumerate(_lines(path), 1):
                text = self._text(line, f"{path}, line {number}") if line.strip() else None
                if text:
                    yield Document(f"{name}:{number}", text)

    def size(self) -> int | None:
        files = source_files(self.path, self.suffixes)
        compressed = any(path.suffix == ".gz" for path in files)
        return None if compressed else sum(path.stat().st_size for path in files)

    @classmethod
    def example(cls, folder: Path, texts: Sequence[str]) -> Self:
        lines = [json.dumps({"body": text, "text": "another"}).encode() + b"\n" for text in texts]
        half = len(lines) // 2
        (folder / "a.jsonl").write_bytes(b"\n".join(lines[:half]))
        (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[half:])))
        return cls(path=folder, field="body")

    def _text(self, line: bytes, where: str) -> str | None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} is not a JSON object but a {type(record).__name__}")
        if self.field not in record:
            raise DataError(f"{where} has no field {self.field!r}: {nearest(self.field, record)}")
        text = record[self.field]
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where}: {self.field!r} is not a string but a {type(text).__name__}")
        return text


def _open(path: Path) -> gzip.GzipFile | BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[bytes]:
    with explain_os_errors(f"cannot read {path}"):
        try:
            with _open(path) as file:
                yield from file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path} is not a whole gzip file: {error}") from error
