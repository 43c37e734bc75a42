"""Folders of routed adapters. They have the names of PEFT's files, which knows no such kind: ``adapter_config.json``,
with the type ``DYNMOLE``, and ``adapter_model.safetensors``, with three matrices for each that is added to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from penstock.core.errors import ModelError
from penstock.models.adapters import low_rank, peft
from penstock.models.adapters.peft import Adapter
from penstock.models.adapters.routed import Mixture, RoutedLinear, routed
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family

PARTS = ("router", "lora_A", "lora_B")


def taken_from(decoder: Decoder, base: str, alpha: float) -> Adapter:
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
                tensors[f"{layer.pieces[place].module}.{part}.weight"] = own
    config["target_modules"] = sorted({name.split(".")[-3] for name in tensors})
    return Adapter.on(base, config, tensors)


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
            base = cast(low_rank.Base, decoder.get_submodule(name))
            layer = RoutedLinear(base, pieces, places, rank, scale, decoder.like, mixture)
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
