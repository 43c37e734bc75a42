"""Records with a text in one of their fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from penstock.core.errors import DataError, nearest
from penstock.data.corpora.contract import Corpus, Document


def text_of(record: Any, field: str, where: str) -> str | None:
    """The text in ``field`` of a record; ``meta.text`` is the field ``text`` of the record in ``meta``.

    Raises:
        DataError: there is no such field, or no text in it; the message begins with ``where``.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where} is not a JSON object but a {type(record).__name__}")
    found: Any = record
    for name in [field] if field in record else field.split("."):
        if not isinstance(found, Mapping) or name not in found:
            raise DataError(f"{where} has no field {field!r}: {nearest(field, fields_of(record))}")
        found = found[name]
    if found is not None and not isinstance(found, str):
        raise DataError(f"{where}: {field!r} is not a string but a {type(found).__name__}")
    return found


def fields_of(record: Mapping[str, Any], inside: str = "") -> Iterator[str]:
    """The names of a record's fields that are no records themselves, those of inner ones as ``meta.text``."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from fields_of(value, f"{inside}{name}.")
        else:
            yield f"{inside}{name}"


class Record(NamedTuple):
    """A record of a data set: its ``name``, where it stands, in words, and its contents."""

    name: str
    where: str
    contents: Any


class Records(Corpus):
    """A corpus of records, each of which has a text in one of its fields. A policy gives :meth:`records`."""

    field: str = "text"

    def records(self, only: str | None = None) -> Iterator[Record | DataError]:
        """The records in their order, streamed; in the place of each that cannot be read, what is wrong with it.

        Args:
            only: a field that is all that is wanted of them, where reading less is faster; ``meta.text`` lies within
                another. None reads all fields.

        Raises:
            UsageError: a path is not there.
            DataError: nothing can be read.
        """
        raise NotImplementedError

    def items(self) -> Iterator[Document | DataError]:
        for record in self.records(self.field):
            if isinstance(record, DataError):
                yield record
                continue
            try:
                text = text_of(record.contents, self.field, record.where)
                if text:
                    yield Document(record.name, text)
            except DataError as fault:
                yield fault
