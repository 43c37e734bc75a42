"""Models to folders: config.json and the weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file as write_safetensors
from torch import Tensor

from penstock.core.errors import PenstockError, UsageError
from penstock.core.files import atomic_folder, explain_os_errors, fsync_directory, fsync_file, write_json
from penstock.models.adapters.routed import routed
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family
from penstock.models.families.mapping import as_classifier, placed, views_on
from penstock.models.formats.safetensors import WEIGHTS, WEIGHTS_INDEX
from penstock.models.hub.family import TOKEN_IDS, family_of, origin_of
from penstock.models.hub.folders import CONFIG
from penstock.models.linear import Linear
from penstock.models.quantized import packed_layers

#: What weights become on disk.
Compress = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def save(
    decoder: Decoder,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
    family: str | None = None,
    scheme: str | None = None,
) -> None:
    """Writes config.json and the weights, in shards with an index where they exceed ``shard_bytes``.

    A new folder appears complete or not at all. Into a folder that exists, the files are moved once all are written,
    config.json last, so that a caller can add to them before or after.

    Args:
        decoder: the model.
        folder: where to; must not hold a model already.
        dtype: of the stored tensors; None leaves each as it is.
        shard_bytes: the most bytes of tensors in a file that holds more than one.
        family: see :func:`family_of`.
        scheme: in which the matrices of the layers are quantized, by its name in
            :data:`~penstock.models.formats.schemes.SCHEMES`; None stores them as they are.

    Raises:
        UsageError: the folder holds a model, there is no such family or scheme, the model has an adapter that cannot
            be merged, or matrices that stay as they are stored.
        ModelError: the family cannot express the model, or the scheme does not fit its matrices.
        PenstockError: the disk is full, or the folder cannot be written.
    """
    chosen = family_of(decoder, family)
    for name, _ in packed_layers(decoder):
        raise UsageError(
            f"{name} is in memory as it is stored, and is not written anew",
            hint="Copy the model's folder, or load the model with plain numbers: penstock.models.hub.load().",
        )
    for _, layer in routed(decoder):
        layer.merged(layer.weight)  # which is refused
    if not folder.exists():
        with atomic_folder(folder) as fresh:
            _write(decoder, chosen, fresh, dtype, shard_bytes, scheme)
        return
    for name in (CONFIG, WEIGHTS, WEIGHTS_INDEX):
        if (folder / name).exists():
            raise UsageError(f"{folder} already holds a model ({name})", hint="Name another folder, or remove it.")
    with (
        explain_os_errors(f"cannot write {folder}"),
        tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=folder) as staging,
    ):
        _write(decoder, chosen, Path(staging), dtype, shard_bytes, scheme)
        for path in sorted(Path(staging).iterdir(), key=lambda path: path.name == CONFIG):
            fsync_file(path)
            path.replace(folder / path.name)
        fsync_directory(folder)


def _write(
    decoder: Decoder, family: Family, folder: Path, dtype: torch.dtype | None, shard_bytes: int, scheme: str | None
) -> None:
    hub = config_of(decoder, family, dtype or decoder.like.dtype)
    compress: Compress = _as_they_are
    if scheme is not None:
        compress, hub["quantization_config"] = _quantizing(decoder, family, scheme)
    shards = _shards(views_on(decoder, family), dtype, shard_bytes)
    files = [part_name(i, len(shards)) for i in range(len(shards))] if len(shards) > 1 else [WEIGHTS]
    places: dict[str, str] = {}
    total = 0
    for file, shard in zip(files, shards, strict=True):
        plain = {name: tensor.to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in shard.items()}
        tensors = compress(plain)
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / file)
    if len(shards) > 1:
        write_json(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    write_json(folder / CONFIG, hub)


def config_of(decoder: Decoder, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of config.json."""
    origin = origin_of(decoder)
    hub = family.config_to_hub(decoder.config) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    # Unknown ids are written as null: where they are absent, transformers invents some.
    hub |= origin.token_ids if origin else dict.fromkeys(TOKEN_IDS)
    return as_classifier(hub) if decoder.config.scalar_head else hub


def part_name(part: int, parts: int) -> str:
    """The file of one of the ``parts`` of the weights, from 0."""
    return f"model-{part + 1:05}-of-{parts:05}.safetensors"


def save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes tensors, in the host's memory, to a file of safetensors.

    Raises:
        PenstockError: the disk is full.
    """
    try:
        write_safetensors(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise PenstockError(f"cannot write {path}: {error}", hint="Is the disk full?") from error


def _as_they_are(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def _quantizing(decoder: Decoder, family: Family, name: str) -> tuple[Compress, dict[str, Any]]:
    """What quantizes the matrices of the layers among some weights, and the ``quantization_config`` that says so. The
    embedding, the head and routers stay as they are."""
    from penstock.models.formats.schemes import described, scheme_of

    if family.transposed:
        raise UsageError(
            f"the matrices of {family.policy_name} stand on disk with inputs as rows, and compressed-tensors has no "
            "scales for such",
            hint="Serve the model as it is.",
        )
    linear = {
        f"{name}.weight" for name, module in decoder.layers.named_modules(prefix="layers") if type(module) is Linear
    }
    every = {hub: (ours, view) for ours, hub, view in placed(decoder, family) if view.dim() == 2}
    inside = {
        hub: view for hub, (ours, view) in every.items() if ours in linear or decoder.get_parameter(ours).dim() == 3
    }
    scheme = scheme_of(name, {view.shape[1] for view in inside.values()})

    def compress(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        written: dict[str, Tensor] = {}
        for weight, tensor in tensors.items():
            if weight in inside:
                module = weight.removesuffix("weight")
                written |= {f"{module}{part}": stored for part, stored in scheme.compress(tensor).items()}
            else:
                written[weight] = tensor
        return written

    embedding = family.tensors["embedding.weight"][0]
    kept = every.keys() - inside - {embedding} | {family.tensors["head.weight"][0]}
    return compress, described(scheme, {weight.removesuffix(".weight") for weight in kept})


def _shards(state: Mapping[str, Tensor], dtype: torch.dtype | None, limit: int) -> list[dict[str, Tensor]]:
    """``state`` in order, cut before each tensor that would take a shard above ``limit`` bytes."""
    shards: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in state.items():
        size = tensor.numel() * (dtype or tensor.dtype).itemsize
        if not shards or size > room:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= size
    return shards
