"""A decoder on the meta device gets its memory, and its memory the weights of a folder."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import nn

from penstock.core.errors import ModelError
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family
from penstock.models.families.mapping import general, placed, views_on
from penstock.models.formats.contract import Weights
from penstock.models.hub.folders import CONFIG
from penstock.models.hub.weights import require_shape, tied_head
from penstock.models.linear import Linear
from penstock.models.quantized import QuantizedLinear
from penstock.ops.quantized.contract import Packed, WeightFormat


class Kept(NamedTuple):
    """Which quantized matrices stay as they are stored.

    Attributes:
        prefix: how the names of their layers begin.
        stays: whether those of a format do, on a device, beside activations of a dtype.
        read_as: the format that they are read in, which stores them in the same way.
        apart: where adapters are not merged into them, but computed beside them: the types of devices.
    """

    prefix: str
    stays: Callable[[WeightFormat, torch.device, torch.dtype], bool]
    read_as: Callable[[WeightFormat], WeightFormat]
    apart: Collection[str]


#: For inference: where products on the device read them.
TO_INFER = Kept("", lambda format, device, dtype: format.computes(device, dtype), lambda format: format, ("cpu",))

#: For training what is added to them: where they can be dequantized on the device, with products that round nothing.
TO_ADD = Kept("layers.", lambda format, device, _: format.dequantizes(device), lambda format: format.exact(), ())


def allocate(decoder: Decoder, device: torch.device, dtype: torch.dtype) -> None:
    """Gives a decoder on the meta device memory, uninitialized."""
    blank = {
        name: nn.Parameter(torch.empty(meta.shape, dtype=dtype, device=device), requires_grad=meta.requires_grad)
        for name, meta in decoder.named_parameters()
    }
    if decoder.config.shares_head and isinstance(getattr(decoder, "head", None), Linear):
        blank["head.weight"] = blank["embedding.weight"]
    decoder.load_state_dict(blank, assign=True)
    decoder.rotary.to(device)


def keep_packed(
    decoder: Decoder, family: Family, weights: Weights, device: torch.device, dtype: torch.dtype, kept: Kept
) -> None:
    """Replaces those linear layers of a decoder on the meta device whose quantized matrices are ``kept`` on ``device``
    beside activations of ``dtype``, and a tied head."""
    stacks: dict[str, list[str]] = {}
    shapes: dict[str, torch.Size] = {}
    for ours, hub, view in placed(decoder, family):
        stacks.setdefault(ours.removesuffix(".weight"), []).append(hub)
        shapes[hub] = view.shape
    if decoder.config.shares_head and "embedding" in stacks:  # a stage may have neither
        stacks["head"] = stacks["embedding"]
    for name, module in list(decoder.named_modules()):
        stack = stacks.get(name, [])
        whole = type(module) is Linear and general(f"{name}.weight") not in family.transposed
        if whole and stack and name.startswith(kept.prefix) and all(hub in weights.quantized for hub in stack):
            packed = dict(weights.packed(stack))
            for hub in stack:
                require_shape(hub, weights, packed[hub].shape, shapes[hub])
            if all(kept.stays(each.format, device, dtype) for each in packed.values()):
                pieces = [Packed(kept.read_as(packed[hub].format), packed[hub].parts) for hub in stack]
                layer = QuantizedLinear(pieces, None).to(device)
                layer.bias = module.bias  # on the meta device still
                decoder.set_submodule(name, layer)


def fill(decoder: Decoder, family: Family, weights: Weights) -> None:
    """Copies stored weights into the decoder, which they have been checked against."""
    views = views_on(decoder, family)
    for name, tensor in weights.read(views.keys()):
        require_shape(name, weights, tensor.shape, views[name].shape)
        views[name].copy_(tensor)
    tied = tied_head(decoder.config, family) if hasattr(decoder, "embedding") else None
    for name, head in weights.read([] if tied is None else [tied]):
        embedding = decoder.embedding.weight
        if not torch.equal(head.to(embedding), embedding):
            raise ModelError(
                f"{name} in {weights.headers[name].path} differs from the embedding, to which {CONFIG} ties it",
                hint=f"Set tie_word_embeddings to false in {CONFIG} to use it.",
            )
