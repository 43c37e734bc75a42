"""Weights by other names than they have on disk, and without those that a model has no use for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from torch import Tensor

from penstock.core.errors import ModelError
from penstock.models.formats.contract import Stored, Weights
from penstock.ops.quantized.contract import Packed


class Renamed:
    """See :class:`~penstock.models.formats.contract.Weights`.

    Args:
        weights: by their names on disk.
        named: what one is called here; None leaves it out.

    Raises:
        ModelError: two are called the same.
    """

    def __init__(self, weights: Weights, named: Callable[[str], str | None]) -> None:
        self._weights, self._names = weights, {name: named(name) for name in weights.headers}
        self.headers: dict[str, Stored] = {}
        self.dtypes = weights.dtypes
        for name, stored in weights.headers.items():
            here = self._names[name]
            if here in self.headers:
                raise ModelError(f"{here} is in {self.headers[here].path.name} and again in {stored.path}")
            if here is not None:
                self.headers[here] = stored
        self.quantized = {here for name in weights.quantized if (here := self._names[name]) is not None}

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._weights.read(self._there(names)):
            yield self._names[name] or name, tensor

    def packed(self, names: Collection[str]) -> Iterator[tuple[str, Packed]]:
        for name, packed in self._weights.packed(self._there(names)):
            yield self._names[name] or name, packed

    def _there(self, names: Collection[str]) -> list[str]:
        wanted = set(names)
        return [there for there, here in self._names.items() if here in wanted]
