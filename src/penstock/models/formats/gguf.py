"""Weights in GGUF files, llama.cpp's format; :mod:`~penstock.models.formats.gguf_folder` writes the index of them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple, cast, get_args

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from torch import Tensor

from penstock.core.errors import ModelError
from penstock.core.files import explain_os_errors, read_json, write_json
from penstock.models.formats.contract import GGUF_INDEX, Stored
from penstock.ops.quantized.contract import Packed
from penstock.ops.quantized.ggml import Ggml, Kind

#: The types of tensors that are read, by their names in ggml: those that are plain numbers, and all.
PLAIN = ("F32", "F16", "BF16")
TYPES = (*PLAIN, *get_args(Kind))

#: Bytes of numbers that a tensor becomes at a time.
PIECE = 1 << 26


class Place(NamedTuple):
    """Where a weight lies: ``file`` is the index of its file, ``offset`` where it begins there in bytes, and ``kind``
    its type in ggml. ``turned`` is 0, or the number of heads whose rows stand in the order of pairs that rotate
    together, as llama.cpp wants them, and not in the order of Hugging Face, all first ones and then all second ones.
    ``raised`` is what was added to each number."""

    file: int
    offset: int
    shape: tuple[int, ...]
    kind: str
    turned: int = 0
    raised: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the weight."""
        numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return self.shape[-1] // numbers * size

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1


def write_index(folder: Path, files: list[Path], places: dict[str, Place]) -> None:
    """Writes the index of ``folder``: in which ``files`` its weights lie, and where."""
    described = {name: [*place] for name, place in places.items()}
    write_json(folder / GGUF_INDEX, {"files": [str(file.absolute()) for file in files], "places": described})


class Gguf:
    """The weights that the index of a folder names; see :class:`~penstock.models.formats.contract.Weights`.

    Raises:
        ModelError: a file is not there any more, or has become shorter.
    """

    dtypes = TYPES

    def __init__(self, folder: Path) -> None:
        index = read_json(folder / GGUF_INDEX)
        self.files = [Path(name) for name in index["files"]]
        self.places = {name: Place(*place)._replace(shape=tuple(place[2])) for name, place in index["places"].items()}
        self.headers = {
            name: Stored(self.files[place.file], place.shape, place.kind) for name, place in self.places.items()
        }
        self.quantized = [
            name for name, place in self.places.items() if place.kind not in PLAIN and len(place.shape) > 1
        ]
        for number, file in enumerate(self.files):
            ends = [
                place.offset + place.rows * place.row_bytes for place in self.places.values() if place.file == number
            ]
            with explain_os_errors(f"cannot read {file}"):
                if file.stat().st_size < max(ends, default=0):
                    raise ModelError(f"{file} is truncated", hint="Download or copy it again.")

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = {name: self.places[name] for name in self.places if name in names}
        in_order = sorted(wanted.items(), key=lambda item: (item[1].file, item[1].offset))
        for _, group in itertools.groupby(in_order, key=lambda item: item[1].file):
            for name, place in group:
                yield name, _numbers(self.blocks(name), place)

    def packed(self, names: Collection[str]) -> Iterator[tuple[str, Packed]]:
        for name in self.quantized:
            if name in names:
                # A copy: who writes into the file changes no model that is open.
                yield name, Packed(Ggml(kind=cast(Kind, self.places[name].kind)), {"blocks": self.blocks(name).clone()})

    def blocks(self, name: str) -> Tensor:
        """The bytes of a weight, uint8 [rows, bytes of a row], with its rows in the order of Hugging Face. What the
        file holds in another order is copied; else it is the file itself, mapped into memory."""
        place = self.places[name]
        with explain_os_errors(f"cannot read {self.files[place.file]}"):
            shape = (place.rows, place.row_bytes)
            mapped = np.memmap(self.files[place.file], np.uint8, "c", place.offset, shape)
        raw = torch.from_numpy(mapped)
        if not place.turned:
            return raw
        if len(place.shape) == 1:  # a bias: one row of 4-byte numbers
            raw = raw.view(place.shape[0], -1)
        return raw.view(place.turned, -1, 2, raw.shape[-1]).transpose(1, 2).reshape(shape)


def _numbers(blocks: Tensor, place: Place) -> Tensor:
    """The weight that ``blocks`` stand for, float32."""
    out, kind = np.empty((place.rows, place.shape[-1]), np.float32), GGMLQuantizationType[place.kind]
    step = max(1, PIECE // (4 * place.shape[-1]))
    for start in range(0, place.rows, step):
        out[start : start + step] = dequantize(_typed(blocks[start : start + step], place.kind), kind)
    return torch.from_numpy(out).view(place.shape) - place.raised


def _typed(blocks: Tensor, kind: str) -> np.ndarray:
    raw = blocks.numpy()
    plain = {"F32": np.float32, "F16": np.float16}
    return raw.view(plain[kind]) if kind in plain else raw
