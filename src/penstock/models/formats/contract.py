"""What a file format gives to whoever fills a model: headers first, then a tensor at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from penstock.ops.quantized.contract import Packed

#: The suffix of GGUF files, and the file in a folder that says where in them its weights lie.
GGUF, GGUF_INDEX = ".gguf", "gguf.json"


class Stored(NamedTuple):
    """A weight on disk, as the header of its file describes it: ``shape`` is that of the weight, however it is coded,
    and ``dtype`` what the format calls its numbers, which lie in a row from the byte ``begin`` of the file on (None:
    they do not)."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    begin: int | None = None


class Weights(Protocol):
    """The weights of a model folder, by their names in Hugging Face folders.

    Attributes:
        headers: every weight that is there.
        dtypes: what ``Stored.dtype`` may be.
        quantized: the names of those matrices that :meth:`packed` gives.
    """

    @property
    def headers(self) -> Mapping[str, Stored]: ...

    @property
    def dtypes(self) -> Collection[str]: ...

    @property
    def quantized(self) -> Collection[str]: ...

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """The weights ``names``, in the order of the files, a tensor in memory at a time; quantized ones as the numbers
        that they stand for.

        Raises:
            ModelError: a file is damaged.
        """
        ...

    def packed(self, names: Collection[str]) -> Iterator[tuple[str, Packed]]:
        """The ``quantized`` matrices among ``names``, as they are stored, in whichever order. A stack of them, one for
        each expert, is one matrix: the rows of an expert below those of the one before.

        Raises:
            ModelError: a file is damaged.
        """
        ...
