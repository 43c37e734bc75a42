"""Records with a text in one of their fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from penstock.core.errors import DataError, nearest
from penstock.data.corpora.contract import Document


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


def documents_of(records: Iterable[tuple[str, str, Any]], field: str) -> Iterator[Document | DataError]:
    """Documents from records with their names and with where they stand; what is none is given as an error."""
    for name, where, record in records:
        try:
            text = text_of(record, field, where)
            if text:
                yield Document(name, text)
        except DataError as fault:
            yield fault
