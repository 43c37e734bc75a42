"""Responses that are kept, so that others can go on from them."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from penstock.serve.http.errors import ApiError

#: The most responses that are kept, and the most characters of all of them together.
MOST, LARGEST = 4096, 1 << 26


@dataclasses.dataclass(frozen=True)
class Kept:
    """A response.

    Attributes:
        key: whose it is.
        record: the response, as its client had it.
        before: the messages that its conversation had before, without instructions.
        added: those that its request added, and the answer.
        size: characters of the record and of what was added.
    """

    key: str
    record: dict[str, Any]
    before: Sequence[dict[str, Any]]
    added: Sequence[dict[str, Any]]
    size: int

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far."""
        return [*self.before, *self.added]


class Conversations:
    """The newest responses, in memory: the oldest are forgotten, and all when the server ends."""

    def __init__(self, most: int = MOST, largest: int = LARGEST) -> None:
        self._most, self._largest, self._size = most, largest, 0
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def keep(
        self, key: str, record: dict[str, Any], before: Sequence[dict[str, Any]], added: Sequence[dict[str, Any]]
    ) -> None:
        """Keeps a response of whoever has the ``key``."""
        # Of a conversation, each response counts what is new; the older messages are those of the ones before.
        size = len(json.dumps([record, list(added)]))
        self._kept[record["id"]] = Kept(key, record, before, added, size)
        self._size += size
        while len(self._kept) > self._most or (self._size > self._largest and len(self._kept) > 1):
            self._size -= self._kept.popitem(last=False)[1].size

    def find(self, key: str, id: str, param: str | None = None) -> Kept:
        """The response ``id``, if whoever has the ``key`` made it.

        Raises:
            ApiError: there is none; ``param`` is the field that named it.
        """
        found = self._kept.get(id)
        if found is None or found.key != key:
            what = (
                f"there is no response {id[:80]!r} here: it was not stored, is of another key, or was forgotten, as "
                "the oldest are"
            )
            raise ApiError(404, what, param=param, code="response_not_found")
        return found

    def forget(self, key: str, id: str) -> None:
        """Forgets the response ``id``.

        Raises:
            ApiError: there is none.
        """
        self._size -= self.find(key, id).size
        del self._kept[id]
