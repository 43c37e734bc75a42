"""A GGUF file as a Hugging Face folder, whose weights stay where they are.

A GGUF file holds all of a model: shape, weights, tokenizer, chat template. What of it is not weights is written once,
in the form that Hugging Face folders have, into a folder of the user's cache; an index there says where in the file
each weight lies. From then on the file is opened like any folder: it is served and trained from.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np

from penstock.core.errors import ModelError
from penstock.core.files import atomic_folder, cache_folder, explain_os_errors, write_json
from penstock.models.blank import without_weights
from penstock.models.companions import GENERATION
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family
from penstock.models.families.mapping import views_on
from penstock.models.formats.contract import GGUF
from penstock.models.formats.gguf import TYPES, Place, write_index
from penstock.models.formats.gguf_architectures import ARCHITECTURES, COMMON, SPARSE, Architecture
from penstock.models.formats.gguf_tokenizer import save_tokenizer
from penstock.policy import create

#: Counts up when folders are written otherwise than before.
VERSION = 1

#: The files of a model that was split: ``name-00001-of-00003.gguf``.
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


TOKEN_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}


#: The factors of long rotations, for long texts and for short ones.
LONG_ROPE = ("rope_factors_long.weight", "rope_factors_short.weight")


def folder_of(file: Path) -> Path:
    """The folder that describes the model in ``file``, or in the parts that it is one of; made at the first time.

    Raises:
        ModelError: the file is damaged, or holds a model that is not supported.
        DataError: its tokenizer is of a kind that is not supported.
        PenstockError: the folder cannot be written.
    """
    with explain_os_errors(f"cannot read {file}"):
        files = _parts(file)
        stamps = [(str(part.resolve()), part.stat().st_size, part.stat().st_mtime_ns) for part in files]
    identity = hashlib.blake2b(repr((VERSION, stamps)).encode(), digest_size=8).hexdigest()
    folder = cache_folder("gguf") / f"{file.stem}-{identity}"
    if not folder.is_dir():
        with atomic_folder(folder) as fresh:
            _describe(files, fresh)
    return folder


def _parts(file: Path) -> list[Path]:
    """All files of the model of which ``file`` is one, in order."""
    found = _PART.fullmatch(file.name)
    if found is None:
        return [file]
    names = [f"{found['stem']}-{number:05}-of-{found['count']}{GGUF}" for number in range(1, int(found["count"]) + 1)]
    for name in names:
        if not (file.parent / name).is_file():
            raise ModelError(f"{file} is one part of a model, and {name} is missing beside it")
    return [file.parent / name for name in names]


class Contents:
    """What the headers of the files of a model say.

    Attributes:
        files: in order.
        tensors: by the names in them, with the number of the file of each.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        readers = [_reader(file) for file in files]
        self._fields = readers[0].fields
        self.tensors = {each.name: (number, each) for number, reader in enumerate(readers) for each in reader.tensors}
        self.architecture = str(self.get("general.architecture"))

    def get(self, key: str) -> Any:
        """A value of the metadata, None where it is not there."""
        return self._fields[key].contents() if key in self._fields else None

    def own(self, key: str) -> Any:
        """A value below the name of the architecture. One for each layer must be the same for all."""
        value = self.get(f"{self.architecture}.{key}")
        if isinstance(value, list) and value:
            if len(set(value)) > 1:
                raise ModelError(f"{self.files[0]}: {key} differs from layer to layer, which is not supported")
            return value[0]
        return value


class _Reader(gguf.GGUFReader):
    """A reader of headers whose map of the file is a plain array: of numpy's maps, each of its many small views takes
    several times as long."""

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = np.asarray(mapped)


def _reader(file: Path) -> _Reader:
    try:
        return _Reader(file)
    except OSError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, struct.error) as error:
        raise ModelError(f"{file} is truncated or no GGUF file: {error}", hint="Download or copy it again.") from error


def _describe(files: list[Path], folder: Path) -> None:
    contents = Contents(files)
    kind = _architecture(contents)
    config = _config(contents, kind)
    family = cast(Family, create("model.family", kind.model_type))
    try:
        with without_weights():
            decoder = Decoder(family.config_from_hub(config))
        names = list(views_on(decoder, family))
    except ModelError as error:
        raise ModelError(f"{files[0]}: {error.what}", hint=error.hint) from error
    write_index(folder, files, dict(_places(contents, kind, names, config)))
    save_tokenizer(files[0], contents.get, config["max_position_embeddings"], folder)
    ends = {key: config[key] for key in TOKEN_IDS if config.get(key) is not None}
    write_json(folder / GENERATION, ends)
    write_json(folder / "config.json", config)


def _architecture(contents: Contents) -> Architecture:
    name = contents.architecture
    table = SPARSE if contents.own("expert_count") and name in SPARSE else ARCHITECTURES
    if name not in table:
        raise ModelError(
            f"{contents.files[0]}: the architecture {name!r} is not supported as a GGUF file",
            hint=f"Architectures: {', '.join(ARCHITECTURES)}. A Hugging Face folder of the model may be.",
        )
    return table[name]


def _config(contents: Contents, kind: Architecture) -> dict[str, Any]:
    """The contents of a config.json."""
    values = {key: contents.own(theirs) for key, theirs in {**COMMON, **kind.keys}.items()}
    # Some converters write 0 for a window that there is not.
    config: dict[str, Any] = {key: value for key, value in values.items() if value not in (None, 0)}
    tensors = contents.tensors
    if "token_embd.weight" not in tensors:
        raise ModelError(f"{contents.files[0]} has no token_embd.weight: it holds no language model")
    config |= {
        "model_type": kind.model_type,
        "vocab_size": int(tensors["token_embd.weight"][1].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": bool(biases := {"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & tensors.keys()),
        "use_bias": bool(biases),
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "rope_theta": contents.own("rope.freq_base") or 10_000.0,
        "torch_dtype": "float32",
        # llama.cpp always weighs the chosen experts to one.
        "norm_topk_prob": True,
    }
    scaling = _scaling(contents)
    if scaling is not None:
        config["rope_scaling"] = scaling
    ids = {key: contents.get(f"tokenizer.ggml.{theirs}") for key, theirs in TOKEN_IDS.items()}
    try:
        return config | kind.more(contents.own, config) | ids
    except ModelError as error:
        raise ModelError(f"{contents.files[0]}: {error.what}", hint=error.hint) from error


def _scaling(contents: Contents) -> dict[str, Any] | None:
    """How positions are scaled, as config.json says it."""
    kind, factor = contents.own("rope.scaling.type"), contents.own("rope.scaling.factor")
    if "rope_freqs.weight" in contents.tensors:
        return _llama3(contents)
    if LONG_ROPE[0] in contents.tensors:
        long, short = (contents.tensors[name][1].data.astype(float).tolist() for name in LONG_ROPE)
        return {"type": "longrope", "long_factor": long, "short_factor": short}
    if kind in (None, "none") or factor in (None, 1):
        return None
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{contents.files[0]}: positions scaled by {kind!r} are not supported")
    original = contents.own("rope.scaling.original_context_length")
    return {"rope_type": kind, "factor": factor} | (
        {"original_max_position_embeddings": original} if kind == "yarn" and original else {}
    )


def _llama3(contents: Contents) -> dict[str, Any]:
    """Llama 3.1's scaling, of which the file holds what it makes of each frequency, and not its parameters: those that
    all its models have are tried."""
    theirs = np.asarray(contents.tensors["rope_freqs.weight"][1].data, np.float64)
    theta, original = contents.own("rope.freq_base") or 10_000.0, 8192
    factor, low, high = float(theirs.max()), 1.0, 4.0
    waves = 2 * np.pi * theta ** (np.arange(len(theirs)) / len(theirs))
    smooth = (original / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    ours = np.where(waves < original / high, 1.0, np.where(waves > original / low, factor, between))
    if not np.allclose(ours, theirs, rtol=1e-3):
        raise ModelError(f"{contents.files[0]}: its rope_freqs are no scaling that is known")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _places(
    contents: Contents, kind: Architecture, names: list[str], config: dict[str, Any]
) -> Iterator[tuple[str, Place]]:
    """Where the weights ``names`` lie; those that are not there, or are there and not asked for, are an error."""
    find, used = _finder(contents, config["num_hidden_layers"]), {"rope_freqs.weight", *LONG_ROPE}
    for name in names:
        plain = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        theirs = find(plain)
        if theirs is None or theirs not in contents.tensors:
            raise ModelError(f"{contents.files[0]} lacks {theirs or name}", hint="Is the file complete?")
        used.add(theirs)
        expert = re.search(r"\.experts\.(\d+)\.", name)
        heads = 0
        if kind.turned and (found := re.search(r"\.(q|k)_proj\.", name)):
            heads = config["num_attention_heads" if found[1] == "q" else "num_key_value_heads"]
        place = _place(contents, theirs, None if expert is None else int(expert[1]), heads)
        yield name, place._replace(raised=int(kind.raised and name.endswith("norm.weight")))
    if extra := contents.tensors.keys() - used:
        raise ModelError(
            f"{contents.files[0]} also has {', '.join(sorted(extra)[:3])}, which its model has no place for"
        )


def _finder(contents: Contents, layers: int) -> Callable[[str], str | None]:
    """Names in GGUF files by those in Hugging Face folders."""
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == contents.architecture)
    table = gguf.get_tensor_name_map(number, layers)
    return lambda name: table.get_name(name, (".weight", ".bias"))


def _place(contents: Contents, name: str, expert: int | None, turned: int) -> Place:
    number, tensor = contents.tensors[name]
    shape = tuple(int(size) for size in reversed(tensor.shape))
    offset, code = int(tensor.data_offset), tensor.tensor_type.name
    if code not in TYPES:
        raise ModelError(
            f"{contents.files[number]}: {name} is of the type {code}, which is not supported",
            hint=f"Types: {', '.join(TYPES)}.",
        )
    if expert is not None:
        offset, shape = offset + expert * (int(tensor.n_bytes) // shape[0]), shape[1:]
    return Place(number, offset, shape, code, turned)
