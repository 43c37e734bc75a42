"""Folders of routed adapters. They have the names of PEFT's files, which knows no such kind: ``adapter_config.json``,
with the type ``DYNMOLE``, and ``adapter_model.safetensors``, with three matrices for each that is added to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from penstock.core.errors import ModelError, PenstockError
from penstock.core.files import write_json
from penstock.models.adapters import low_rank, peft
from penstock.models.adapters.routed import Mixture, RoutedLinear, routed
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family
from penstock.models.linear import Linear

PARTS = ("router", "lora_A", "lora_B")


class RoutedAdapter(NamedTuple):
    """What experts and routers add to a base, without the base.

    Attributes:
        config: the contents of adapter_config.json.
        tensors: float32, by the name of the matrix on disk that they add to, and their own.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def copied(self) -> RoutedAdapter:
        """With tensors of its own, in main memory, which no update changes."""
        return RoutedAdapter(self.config, {name: each.cpu().clone() for name, each in self.tensors.items()})

    def write(self, folder: Path) -> None:
        """Writes it into a folder that exists.

        Raises:
            PenstockError: the disk is full.
        """
        tensors = {name: each.cpu().contiguous() for name, each in self.tensors.items()}
        try:
            save_file(tensors, folder / peft.WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise PenstockError(f"cannot write {folder / peft.WEIGHTS}: {error}", hint="Is the disk full?") from error
        write_json(folder / peft.CONFIG, self.config)


def taken_from(decoder: Decoder, base: str, alpha: float) -> RoutedAdapter:
    """What is added to ``base`` in ``decoder``, which has some.

    Args:
        decoder: with experts of one rank, and one mixture.
        base: a folder, or whatever else names a model.
        alpha: scale times rank.
    """
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {"peft_type": peft.ROUTED, "lora_alpha": alpha}
    for _, layer in routed(decoder):
        config |= {"r": layer.expert_rank, **layer.mixture._asdict()}
        for place, (a, b) in layer.additions().items():
            for part, own in zip(PARTS, (layer.router[str(place)], a, b), strict=True):
                tensors[f"{layer.pieces[place].module}.{part}.weight"] = own.detach().float()
    config["target_modules"] = sorted({name.split(".")[-3] for name in tensors})
    named = Path(base)
    config["base_model_name_or_path"] = str(named.resolve()) if named.is_dir() else base
    return RoutedAdapter(config, tensors)


def is_routed(folder: Path) -> bool:
    """Whether the adapter in ``folder`` is of this kind."""
    return bool(peft.described(folder)["peft_type"] == peft.ROUTED)


def wear(decoder: Decoder, family: Family, folder: Path) -> None:
    """Attaches the adapter in ``folder`` to a plain ``decoder`` of the ``family``, in its dtype and on its device.

    Raises:
        ModelError: the folder is damaged, or the adapter is of another base.
    """
    config, tensors = peft.described(folder), peft.tensors_in(folder / peft.WEIGHTS)
    try:
        mixture = Mixture(*(config[key] for key in Mixture._fields))
        rank, scale = int(config["r"]), config["lora_alpha"] / config["r"]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"{folder / peft.CONFIG} does not describe experts and how they are chosen, as Penstock writes it"
        ) from error
    for name, pieces in low_rank.linears(decoder, family).items():
        places = [i for i, piece in enumerate(pieces) if f"{piece.module}.router.weight" in tensors]
        if places:
            base = cast(Linear, decoder.get_submodule(name))
            layer = RoutedLinear(base, pieces, places, rank, scale, mixture)
            for place in places:
                _fill(layer, place, tensors, folder)
            low_rank.attach(decoder, name, layer)
    if tensors:
        raise ModelError(
            f"the adapter {folder} has {next(iter(tensors))}, and its base no matrix for it",
            hint="It is of another base.",
        )


@torch.no_grad()
def _fill(layer: RoutedLinear, place: int, tensors: dict[str, Tensor], folder: Path) -> None:
    """Takes the matrices of a piece out of ``tensors``."""
    for part, own in zip(PARTS, (layer.router, layer.a, layer.b), strict=True):
        name = f"{layer.pieces[place].module}.{part}.weight"
        found, wanted = tensors.pop(name, None), own[str(place)]
        if found is None or found.shape != wanted.shape:
            there = "is missing" if found is None else f"is {list(found.shape)}"
            raise ModelError(f"{name} in {folder / peft.WEIGHTS} {there}, and {list(wanted.shape)} is wanted")
        wanted.copy_(found)
