"""A decoder on the meta device gets its memory, and its memory the weights of a folder."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from penstock.core.errors import ModelError
from penstock.models.decoder import Decoder, MixtureOfExperts
from penstock.models.families.contract import Family
from penstock.models.families.mapping import general, placed, views_on
from penstock.models.formats.contract import Weights
from penstock.models.hub.folders import CONFIG
from penstock.models.hub.uploads import uploads
from penstock.models.hub.weights import require_shape, tied_head
from penstock.models.linear import Linear
from penstock.models.quantized import QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from penstock.ops.quantized.contract import Packed, WeightFormat

#: Rows of a tied head that are compared with the embedding's at a time.
COMPARED = 4096


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
    decoder: Decoder,
    family: Family,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype,
    kept: Kept,
    beside: Weights | None = None,
) -> None:
    """Replaces what has its quantized matrices ``kept`` on ``device`` beside activations of ``dtype``, in a decoder on
    the meta device: linear layers, the experts of mixtures, the embedding, and a head that is tied to it. ``beside``
    has the matrices of those linear layers of the blocks to which something is added apart."""
    for name, stack, source in kept_stacks(decoder, family, weights, kept, beside):
        owner, _, part = name.rpartition(".")
        module = decoder.get_submodule(owner)
        pieces = _pieces(stack, source, device, lambda format: kept.stays(format, device, dtype))
        mixed = isinstance(module, MixtureOfExperts) and device.type != "cpu" and pieces is not None and len(pieces) > 1
        if pieces is None or mixed:  # kernels read the matrices of all experts in one format
            continue
        matrix = QuantizedLinear([Packed(kept.read_as(each.format), each.parts) for each in pieces], None).to(device)
        if isinstance(module, MixtureOfExperts):
            delattr(module, part)
            setattr(module, part, QuantizedExperts(matrix, module.experts))
        elif isinstance(module, Linear):
            matrix.bias = module.bias  # on the meta device still
            decoder.set_submodule(owner, matrix)
        else:
            decoder.set_submodule(owner, QuantizedEmbedding(matrix, dtype).to(device))
            if decoder.config.shares_head and hasattr(decoder, "head"):  # which a stage may lack
                decoder.set_submodule("head", matrix)


def kept_stacks(
    decoder: Decoder, family: Family, weights: Weights, kept: Kept, beside: Weights | None = None
) -> Iterator[tuple[str, dict[str, torch.Size], Weights]]:
    """The parameters whose matrices are quantized and may stay so, by :func:`keep_packed`: the names and shapes of
    these matrices, and where they are."""
    for name, stack in _stacks(decoder, family).items():
        module, source = decoder.get_submodule(name.rpartition(".")[0]), weights
        if beside is not None and type(module) is Linear and name.startswith("layers."):
            source = beside
        turned = type(module) is Linear and general(name) in family.transposed
        known = type(module) is Linear or name == "embedding.weight" or isinstance(module, MixtureOfExperts)
        if known and not turned and name.startswith(kept.prefix) and stack.keys() <= {*source.quantized}:
            yield name, stack, source


def _stacks(decoder: Decoder, family: Family) -> dict[str, dict[str, torch.Size]]:
    """Of each parameter the weights that are its rows, in their order, with the shapes of their matrices; one that
    holds the matrices of all experts counts as one of all their rows."""
    found: dict[str, dict[str, torch.Size]] = {}
    for name, hub, view in placed(decoder, family):
        shape = view.shape
        if len(shape) == 3:
            experts, rows, columns = decoder.get_parameter(name).shape
            shape = torch.Size((experts * rows, columns))
        found.setdefault(name, {})[hub] = shape
    return found


def _pieces(
    stack: Mapping[str, torch.Size],
    weights: Weights,
    device: torch.device,
    stays: Callable[[WeightFormat], bool],
) -> list[Packed] | None:
    """The matrices of a ``stack`` as one below the other, on ``device``; None where the format of one does not stay.
    Where all are in one format, no more than one of them is in memory twice."""
    ends = list(itertools.accumulate(shape[0] for shape in stack.values()))
    places = {hub: slice(end - shape[0], end) for (hub, shape), end in zip(stack.items(), ends, strict=True)}
    format: WeightFormat | None = None
    joined, others = dict[str, Tensor](), dict[str, Packed]()
    for hub, packed in weights.packed(stack):
        require_shape(hub, weights, packed.shape, stack[hub])
        if not stays(packed.format):
            return None
        if len(stack) == 1:
            return [packed]
        if format is None:
            format = packed.format
            joined = {
                name: part.new_empty(ends[-1], *part.shape[1:], device=device) for name, part in packed.parts.items()
            }
        if packed.format == format and packed.parts.keys() == joined.keys():
            for name, part in packed.parts.items():
                joined[name][places[hub]].copy_(part)
        else:
            others[hub] = packed
    assert format is not None
    if not others:
        return [Packed(format, joined)]
    return [
        others.get(hub) or Packed(format, {name: part[place] for name, part in joined.items()})
        for hub, place in places.items()
    ]


def fill(decoder: Decoder, family: Family, weights: Weights) -> None:
    """Copies stored weights into the decoder, which they have been checked against."""
    views = views_on(decoder, family)
    with uploads(decoder.like.device) as copy:
        for name, tensor in weights.read(views.keys()):
            require_shape(name, weights, tensor.shape, views[name].shape)
            copy(views[name], tensor)
    tied = tied_head(decoder.config, family) if hasattr(decoder, "embedding") else None
    for name, head in weights.read([] if tied is None else [tied]):
        for first in range(0, len(head), COMPARED):
            rows = head[first : first + COMPARED].to(decoder.like)
            if not torch.equal(rows, decoder.embedding(torch.arange(first, first + len(rows), device=rows.device))):
                raise ModelError(
                    f"{name} in {weights.headers[name].path} differs from the embedding, to which {CONFIG} ties it",
                    hint=f"Set tie_word_embeddings to false in {CONFIG} to use it.",
                )
