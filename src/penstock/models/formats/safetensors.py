"""Weights in safetensors files: one, or shards with an index."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from penstock.core.errors import ModelError
from penstock.core.files import explain_os_errors, read_json
from penstock.models.formats.contract import Stored
from penstock.ops.quantized.contract import Packed

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

#: dtypes that weights may have, by their names in safetensors.
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Safetensors:
    """The weights of a folder, see :class:`~penstock.models.formats.contract.Weights`; headers alone are read at first.

    Raises:
        ModelError: there are none, a file is missing or damaged, or a tensor is in two of them.
    """

    dtypes, quantized = tuple(STORED), ()

    def __init__(self, folder: Path) -> None:
        found: dict[str, Stored] = {}
        for path in _files(folder):
            with _open(path) as file:
                begins = _begins(path)
                for name in file.keys():  # noqa: SIM118
                    if name in found:
                        raise ModelError(f"{name} is in {found[name].path.name} and again in {path}")
                    header = file.get_slice(name)
                    found[name] = Stored(path, tuple(header.get_shape()), header.get_dtype(), begins[name])
        # Frequencies that old versions of transformers stored; they follow from config.json.
        self.headers = {name: stored for name, stored in found.items() if not name.endswith("rotary_emb.inv_freq")}
        self._order = {name: place for place, name in enumerate(self.headers)}

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = sorted((name for name in names if name in self.headers), key=self._order.__getitem__)
        for path, group in itertools.groupby(wanted, key=lambda name: self.headers[name].path):
            with _open(path) as file:
                for name in group:
                    yield name, file.get_tensor(name)

    def packed(self, names: Collection[str]) -> Iterator[tuple[str, Packed]]:
        yield from ()


def _files(folder: Path) -> list[Path]:
    """The single file of a folder, or those that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    path = folder / WEIGHTS_INDEX
    if path.is_file():
        contents = read_json(path)
        names = contents.get("weight_map") if isinstance(contents, dict) else None
        if not isinstance(names, dict) or not names:
            raise ModelError(f"{path} has no weight_map from tensors to files")
        files = [folder / str(name) for name in sorted(set(names.values()))]
        for file in files:
            if not file.is_file():
                raise ModelError(f"{path} names {file.name}, which is missing", hint="Download or copy it again.")
        return files
    pickled = [found for suffix in ("bin", "pt", "pth") for found in folder.glob(f"*.{suffix}")]
    if pickled:
        raise ModelError(
            f"{folder} has its weights in {pickled[0].name} only, a pickle, which is never read: it could run code",
            hint="Convert it once with transformers, whose save_pretrained() writes safetensors.",
        )
    raise ModelError(f"{folder} has no weights: neither {WEIGHTS} nor {WEIGHTS_INDEX}")


def _begins(path: Path) -> dict[str, int]:
    """At which byte of a whole safetensors file each tensor begins: behind the length of the header, in 8 bytes, and
    the header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + each["data_offsets"][0] for name, each in header.items() if name != "__metadata__"}


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """An open safetensors file, whose damage is explained."""
    try:
        with explain_os_errors(f"cannot read {path}"), safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ModelError(
            f"{path} is truncated or no safetensors file: {error}", hint="Download or copy it again."
        ) from error
