"""Files with one JSON object a line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field

from penstock.core.errors import DataError
from penstock.data.corpora.files import opened, sizes, source_files
from penstock.data.corpora.records import Record, Records
from penstock.policy import policy


@policy("data.corpus", "jsonl")
class JsonLines(Records):
    """The string in ``field`` of each line of a ``.jsonl`` or ``.ndjson`` file, or of all those below a folder.

    The files may be compressed (``.gz``, ``.zst``). ``meta.text`` is a field within a field. Blank lines and empty or
    null strings are left out. A document is named after its file and line.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson")

    path: Path = Field(examples=["texts"])

    def records(self, only: str | None = None) -> Iterator[Record | DataError]:
        for path in source_files(self.path, self.suffixes):
            name = path.name if path == self.path else path.relative_to(self.path).as_posix()
            try:
                with opened(path) as file:
                    for number, line in enumerate(file, 1):
                        if line.strip():
                            yield _record(line, f"{name}:{number}", f"{path}, line {number}")
            except DataError as fault:
                yield fault

    def size(self) -> int | None:
        return sizes(source_files(self.path, self.suffixes))

    @classmethod
    def example(cls, folder: Path, texts: Sequence[str]) -> Self:
        lines = [json.dumps({"body": text, "text": "another"}).encode() + b"\n" for text in texts]
        half = len(lines) // 2
        (folder / "a.jsonl").write_bytes(b"\n".join(lines[:half]))
        (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[half:])))
        return cls(path=folder, field="body")


def _record(line: bytes, name: str, where: str) -> Record | DataError:
    try:
        return Record(name, where, json.loads(line))
    except (ValueError, RecursionError) as error:
        return DataError(f"{where} is not JSON: {error}")
