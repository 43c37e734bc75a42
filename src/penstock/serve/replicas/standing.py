"""What operators have told engines so far, as far as it matters to one that is started later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from penstock.serve.messages import Act, Control


class Standing:
    """What is to be told to an engine that was just opened, so that it is as the others are.

    Args:
        adapters: those that engines are opened with, folders by name.
        keys: what told these from others then.

    Attributes:
        keys: what tells the adapters from others that all engines have.
    """

    def __init__(self, adapters: Mapping[str, Path], keys: Mapping[str, str]) -> None:
        self.keys = dict(keys)
        self._opened = {name: str(folder) for name, folder in adapters.items()}
        self._adapters = dict(self._opened)
        self._weights: list[Control] = []
        self._stopped: dict[Act, Act] = {}

    def take(self, act: Act, folder: str, version: int | None, name: str, key: str = "") -> None:
        """All engines have done this; what they have loaded has the ``key``, if it is an adapter."""
        match act:
            case Act.LOAD:
                self._weights = [Control("", act, folder, version)]
            case Act.LOAD_ADAPTER:
                self._adapters[name], self.keys[name] = folder, key
            case Act.DROP_ADAPTER:
                self._adapters.pop(name, None)
                self.keys.pop(name, None)
            case Act.PAUSE | Act.SLEEP:
                self._stopped[Act.RESUME if act is Act.PAUSE else Act.WAKE] = act
            case Act.RESUME | Act.WAKE:
                self._stopped.pop(act, None)

    def acts(self) -> list[Control]:
        """What an engine that was just opened has to do, in this order."""
        return [
            *(Control("", Act.DROP_ADAPTER, name=name) for name in self._opened if not self._stays(name)),
            *self._weights,
            *(
                Control("", Act.LOAD_ADAPTER, folder, name=name)
                for name, folder in self._adapters.items()
                if not (name in self._opened and self._stays(name))
            ),
            *(Control("", act) for act in self._stopped.values()),
        ]

    def _stays(self, name: str) -> bool:
        return self._adapters.get(name) == self._opened[name]
