"""Which adapters an engine has, and which of their slots are in use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol, runtime_checkable

from penstock.core.errors import UsageError, nearest


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that is loaded, or was when a sequence came.

    Attributes:
        name: by which requests choose it; empty of the model itself.
        slot: where it lies, counted from 1; 0 of the model itself.
        key: tells what it computes from what others do; empty of the model itself. Keys and values in the cache are
            known by it.
    """

    name: str = ""
    slot: int = 0
    key: bytes = b""


#: The model without any.
BASE = Adapter()


@runtime_checkable
class Adaptable(Protocol):
    """An executor that has slots for adapters."""

    @property
    def adapter_slots(self) -> int:
        """How many."""
        ...

    def load_adapter(self, slot: int, folder: Path) -> bytes:
        """Puts the adapter of ``folder`` into ``slot``, which nothing that will be launched uses; returns its key.

        Raises:
            PenstockError: it does not fit. Nothing has changed then.
        """
        ...


class Adapters:
    """The adapters of an engine, by name.

    Args:
        executor: computes with them.
        used: tells those of sequences that are not done, whose slots stay as they are.
    """

    def __init__(self, executor: object, used: Callable[[], Collection[Adapter]]) -> None:
        self._executor, self._used = executor, used
        self._known: dict[str, Adapter] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of those that requests can choose."""
        return tuple(self._known)

    @property
    def keys(self) -> tuple[str, ...]:
        """What tells each of them from others, as text."""
        return tuple(each.key.hex() for each in self._known.values())

    def named(self, name: str) -> Adapter:
        """The adapter of this name; the model itself for the empty one.

        Raises:
            UsageError: there is no such.
        """
        if not name:
            return BASE
        if name not in self._known:
            raise UsageError(f"there is no adapter {name!r} here: {nearest(name, self._known)}")
        return self._known[name]

    def load(self, name: str, folder: str | Path) -> None:
        """Loads the adapter of ``folder``, between steps: requests choose it by ``name`` from now on.

        Raises:
            PenstockError: it cannot be had, or does not fit the model, or there is no slot, or the name is taken.
                Nothing has changed then.
        """
        executor = self._executor
        if not isinstance(executor, Adaptable) or not executor.adapter_slots:
            raise UsageError(
                "this engine has no slots for adapters", hint="Start it with adapters, or with adapter_slots=N."
            )
        if not name or not name.isprintable() or name != name.strip():
            raise UsageError(f"{name!r} is no name for an adapter", hint="Take letters, digits, dots, dashes, slashes.")
        if name in self._known:
            raise UsageError(f"there is an adapter {name!r} already", hint="Drop it first, or choose another name.")
        taken = {each.slot for each in (*self._known.values(), *self._used())}
        free = [slot for slot in range(1, executor.adapter_slots + 1) if slot not in taken]
        if not free:
            raise UsageError(
                f"all {executor.adapter_slots} slots for adapters are in use",
                hint="Drop an adapter and let its requests end, or start the engine with more adapter_slots.",
            )
        self._known[name] = Adapter(name, free[0], executor.load_adapter(free[0], Path(folder)))

    def drop(self, name: str) -> None:
        """No request can choose the adapter ``name`` any more. Those that have it go on with it to their end, and what
        is forked from them has it too; then its slot is free.

        Raises:
            UsageError: there is no such.
        """
        if self.named(name) is BASE:
            raise UsageError("the model itself is no adapter")
        del self._known[name]
