"""Folders of adapters as the library PEFT writes and reads them: ``adapter_config.json`` and
``adapter_model.safetensors``."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from penstock.core.errors import ModelError, PenstockError
from penstock.core.files import read_json, write_json
from penstock.models.adapters.low_rank import Base, LowRankLinear, attach, attached, linears
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family
from penstock.models.families.mapping import SCALAR_HEAD, general
from penstock.models.formats.contract import Stored, Weights
from penstock.models.quantized import QuantizedLinear
from penstock.ops.quantized.contract import Packed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

#: The type of adapters with experts and routers, which is none of PEFT's: see ``routed_folder.py``.
ROUTED = "DYNMOLE"

#: What PEFT calls the modules of sequence classifiers that are trained whole; decoders have the first.
HEADS = ("score", "classifier")

#: Keys of adapter_config.json that change what an adapter computes, and which are not read unless empty.
UNREAD = ("use_dora", "alpha_pattern", "modules_to_save", "use_qalora", "trainable_token_indices", "lora_bias")


class Adapter(NamedTuple):
    """What is added to a base, without the base: a folder of PEFT's, or of a kind that is written like those.

    Attributes:
        config: the contents of adapter_config.json.
        tensors: float32, by the name of the matrix on disk that they add to, and their own.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def on(cls, base: str, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Of ``base``: a folder or a file, which is found from anywhere then, or whatever else names a model."""
        named = str(Path(base).resolve()) if Path(base).exists() else base
        taken = {name: each.detach().float() for name, each in tensors.items()}
        return cls({**config, "base_model_name_or_path": named}, taken)

    def copied(self) -> Self:
        """With tensors of its own, in main memory, which no update changes."""
        return self._replace(tensors={name: each.cpu().clone() for name, each in self.tensors.items()})

    def write(self, folder: Path) -> None:
        """Writes it into a folder that exists.

        Raises:
            PenstockError: the disk is full.
        """
        tensors = {name: each.cpu().contiguous() for name, each in self.tensors.items()}
        try:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise PenstockError(f"cannot write {folder / WEIGHTS}: {error}", hint="Is the disk full?") from error
        write_json(folder / CONFIG, self.config)


def taken_from(decoder: Decoder, base: str, alpha: float, family: Family) -> Adapter:
    """The low-rank additions of ``decoder``, as PEFT names them.

    Args:
        decoder: with additions of one rank.
        base: what the model is called that they are added to.
        alpha: scale times rank.
        family: that of ``base``, which may have the matrices [in, out] on disk.
    """
    tensors: dict[str, Tensor] = {}
    rank, transposed = 0, False
    for name, layer in attached(decoder):
        rank, transposed = layer.rank, general(f"{name}.weight") in family.transposed
        for place, (a, b) in layer.additions().items():
            module = PREFIX + layer.pieces[place].module
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }
    if decoder.config.scalar_head:
        tensors[f"{PREFIX}{SCALAR_HEAD}"] = decoder.head.weight
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    return Adapter.on(base, config, tensors)


class Addition(NamedTuple):
    """What is added to a matrix: ``scale`` B A, with A [rank, in] and B [out, rank]; ``transposed`` where the matrix is
    [in, out]."""

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool

    def to(self, matrix: Tensor) -> Tensor:
        """The matrix with this added, float32."""
        added = self.scale * (self.b.float() @ self.a.float())
        return matrix.float() + (added.T if self.transposed else added)


class Whole(NamedTuple):
    """An adapter: what it adds, by the names of the weights, and the head [1, hidden] of a reward model that it has, or
    None."""

    additions: dict[str, Addition]
    head: Tensor | None


def read(folder: Path) -> dict[str, Addition]:
    """What an adapter adds, by the names of the weights, to a model that writes.

    Raises:
        ModelError: the folder is damaged, or the adapter is of a kind that is not supported.
    """
    found = read_whole(folder)
    if found.head is not None:
        raise ModelError(f"{folder} is the adapter of a reward model, which gives a text a number and writes none")
    return found.additions


def judges(folder: Path) -> bool:
    """Whether a folder's adapter makes a reward model of its base."""
    return described(folder).get("task_type") == "SEQ_CLS"


def read_whole(folder: Path) -> Whole:
    """An adapter, of a model that writes or of a reward model.

    Raises:
        ModelError: the folder is damaged, or the adapter is of a kind that is not supported.
    """
    config, heads = described(folder), judges(folder)
    for key in UNREAD:
        if config.get(key) and not (heads and key == "modules_to_save" and set(config[key]) <= set(HEADS)):
            raise ModelError(f"{folder / CONFIG}: adapters with {key} are not supported")
    if config["peft_type"] == ROUTED:
        raise ModelError(
            f"{folder / CONFIG}: the adapter adds something else for each token ({ROUTED}), and can neither be merged "
            "nor be one of several beside a model",
            hint="Name its folder in place of the model: it opens on the base that it names.",
        )
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise ModelError(
            f"{folder / CONFIG}: only adapters of the type LORA without biases are supported, "
            f"and this is {config.get('peft_type')!r}, bias {config.get('bias')!r}"
        )
    tensors = tensors_in(folder / WEIGHTS)
    head = tensors.pop(PREFIX + SCALAR_HEAD, None) if heads else None
    if heads and head is None:
        raise ModelError(f"{folder / WEIGHTS} lacks {SCALAR_HEAD}", hint="It is the adapter of no reward model.")
    found: dict[str, Addition] = {}
    for name, a in tensors.items():
        module, kind, _ = name.partition(".lora_A.weight")
        if not kind:
            if not name.endswith(".lora_B.weight"):
                raise ModelError(f"{name} in {folder / WEIGHTS} is no part of a LoRA")
            continue
        b = tensors.get(f"{module}.lora_B.weight")
        if b is None or a.dim() != 2 or b.dim() != 2 or b.shape[1] != a.shape[0]:
            raise ModelError(f"{name} in {folder / WEIGHTS} has no lora_B that fits it")
        root = math.sqrt(len(a)) if config.get("use_rslora") else len(a)
        scale = float(config["lora_alpha"]) / root
        found[f"{module.removeprefix(PREFIX)}.weight"] = Addition(a, b, scale, bool(config.get("fan_in_fan_out")))
    return Whole(found, head)


def described(folder: Path) -> dict[str, Any]:
    """The contents of a folder's adapter_config.json.

    Raises:
        ModelError: it is damaged.
    """
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("lora_alpha", 1), (int, float)):
        raise ModelError(f"{folder / CONFIG} does not describe an adapter")
    if not isinstance(config.get("base_model_name_or_path"), str):
        raise ModelError(f"{folder / CONFIG} does not name its base_model_name_or_path")
    return {"lora_alpha": 8, "peft_type": None, **config}


def tensors_in(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file, by name.

    Raises:
        ModelError: it is missing or damaged.
    """
    if not path.is_file():
        raise ModelError(f"{path} is missing", hint="An adapter's weights must be safetensors.")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged: {error}") from error


class Adapted:
    """The weights of a base with what an adapter adds to them, in float32. See
    :class:`~penstock.models.formats.contract.Weights`.

    Args:
        weights: of the base, by their names in the model's family.
        additions: by the same names.
        source: of the adapter, for messages.

    Raises:
        ModelError: the base lacks a matrix that something is added to, or has it in another shape.
    """

    def __init__(self, weights: Weights, additions: Mapping[str, Addition], source: Path) -> None:
        self.base, self.additions, self.source = weights, additions, source
        self.headers: Mapping[str, Stored] = weights.headers
        self.dtypes = weights.dtypes
        self.quantized = {name for name in weights.quantized if name not in additions}
        for name, each in additions.items():
            stored = self.headers.get(name)
            shape = (each.b.shape[0], each.a.shape[1])
            wanted = shape[::-1] if each.transposed else shape
            if stored is None or any(size not in (-1, own) for size, own in zip(stored.shape, wanted, strict=False)):
                there = "has no such matrix" if stored is None else f"has it as {list(stored.shape)}"
                raise ModelError(f"the adapter {source} adds {list(wanted)} to {name}, and its base {there}")

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.base.read(names):
            added = self.additions.get(name)
            yield name, tensor if added is None else added.to(tensor)

    def packed(self, names: Collection[str]) -> Iterator[tuple[str, Packed]]:
        return self.base.packed(names)

    def apart(self, names: Collection[str]) -> tuple[Adapted, dict[str, Addition]]:
        """The weights without what is added to ``names``, and that."""
        taken = {name: each for name, each in self.additions.items() if name in names}
        others = {name: each for name, each in self.additions.items() if name not in names}
        return Adapted(self.base, others, self.source), taken


class Judging:
    """Weights with the head of a reward model in the place of the one over the vocabulary. See
    :class:`~penstock.models.formats.contract.Weights`.

    Args:
        weights: of the model without it.
        head: [1, hidden].
        instead: of which tensor it takes the place, where there is one.
        source: the file that it is from.
    """

    def __init__(self, weights: Weights, head: Tensor, instead: str, source: Path) -> None:
        self._weights, self._head = weights, head
        stored = Stored(source, tuple(head.shape), "F32")
        others = {name: each for name, each in weights.headers.items() if name != instead}
        self.headers: Mapping[str, Stored] = {**others, SCALAR_HEAD: stored}
        self.dtypes = {*weights.dtypes, "F32"}
        self.quantized = weights.quantized

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        yield from self._weights.read([name for name in names if name != SCALAR_HEAD])
        if SCALAR_HEAD in names:
            yield SCALAR_HEAD, self._head

    def packed(self, names: Collection[str]) -> Iterator[tuple[str, Packed]]:
        return self._weights.packed(names)


def named(additions: Mapping[str, Addition], name_of: Callable[[str], str | None]) -> dict[str, Addition]:
    """The additions by other names; those whose weights have none are kept under their own, to be refused."""
    return {name_of(name) or name: each for name, each in additions.items()}


def wear(decoder: Decoder, family: Family, additions: Mapping[str, Addition]) -> None:
    """Attaches ``additions``, by the names of ``family``, to layers of ``decoder`` that :func:`beside_packed` names, in
    its dtype and on its device."""
    like = decoder.like
    for name, pieces in linears(decoder, family).items():
        found = {place: additions.get(f"{piece.module}.weight") for place, piece in enumerate(pieces)}
        own = {place: each for place, each in found.items() if each is not None}
        if own:
            scale, rank = next(iter(own.values())).scale or 1.0, max(len(each.a) for each in own.values())
            layer = LowRankLinear(cast(Base, decoder.get_submodule(name)), pieces, [], rank, scale, like)
            for place, each in own.items():
                layer.a[str(place)] = each.a.to(like, copy=True)
                layer.b[str(place)] = (each.b * (each.scale / scale)).to(like)
            attach(decoder, name, layer)


def beside_packed(decoder: Decoder, family: Family) -> set[str]:
    """The names in ``family`` of the matrices that stay quantized in ``decoder``, and may be added to."""
    return {
        f"{piece.module}.weight"
        for name, pieces in linears(decoder, family).items()
        if isinstance(decoder.get_submodule(name), QuantizedLinear)
        for piece in pieces
    }
