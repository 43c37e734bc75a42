"""JSON files with records in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from penstock.core.errors import DataError
from penstock.data.corpora.files import opened, sizes, source_files
from penstock.data.corpora.records import Record, Records
from penstock.policy import policy


@policy("data.corpus", "json")
class JsonFiles(Records):
    """The string in ``field`` of each object in the list that a ``.json`` file holds, or of its one object; or of all
    such files below a folder. A document is named after its file and its place in the list, counted from 0.

    A file is read as a whole: large data sets are better kept as JSON lines.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".json",)

    path: Path = Field(examples=["texts"])

    def records(self, only: str | None = None) -> Iterator[Record | DataError]:
        for path in source_files(self.path, self.suffixes):
            name = path.name if path == self.path else path.relative_to(self.path).as_posix()
            try:
                with opened(path) as file:
                    contents = parsed(file.read(), path)
            except DataError as fault:
                yield fault
                continue
            records = contents if isinstance(contents, list) else [contents]
            for i, record in enumerate(records):
                yield Record(f"{name}:{i}", f"{path}, record {i}", record)

    def size(self) -> int | None:
        return sizes(source_files(self.path, self.suffixes))

    @classmethod
    def example(cls, folder: Path, texts: Sequence[str]) -> Self:
        half = len(texts) // 2
        for name, part in (("a", texts[:half]), ("b", texts[half:])):
            (folder / f"{name}.json").write_text(json.dumps([{"body": text, "text": "another"} for text in part]))
        return cls(path=folder, field="body")


def parsed(payload: bytes, path: Path) -> Any:
    """The contents of a JSON file."""
    try:
        return json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def holds_records(payload: bytes) -> bool:
    """Whether a ``.json`` file is a list of objects, and so a data set; any other is a text like its neighbours."""
    if not payload.lstrip().startswith(b"["):
        return False
    try:
        contents = json.loads(payload)
    except (ValueError, RecursionError):
        return False
    return isinstance(contents, list) and bool(contents) and all(isinstance(record, dict) for record in contents)
