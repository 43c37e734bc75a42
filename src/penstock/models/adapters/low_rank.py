"""Low-rank additions to linear layers: attached to a decoder, removed, and merged into its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.core.errors import ConfigError, nearest
from penstock.core.randomness import torch_generator
from penstock.models.blank import assembled, without_weights
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family
from penstock.models.families.mapping import general, placed
from penstock.models.linear import Linear
from penstock.models.quantized import QuantizedLinear, plain_weights

#: What can be added to.
Base = Linear | QuantizedLinear

#: What a decoder calls the numbers that its layers' additions share.
POOLS = "pools"


class Piece(NamedTuple):
    """A matrix on disk that is rows of one of ours: its module's name there, and how many rows it has."""

    module: str
    rows: int

    @property
    def end(self) -> str:
        """What the matrix is called in its layer, such as ``q_proj``."""
        return self.module.rpartition(".")[2]


class LowRankLinear(Linear):
    """y = W x + b + scale * B A x, for each piece of the rows of W that has an A and a B.

    Args:
        base: the layer that it stands for.
        pieces, scale: see the attributes.
        chosen: the places of the pieces that have an A and a B.
        rank: of B A.
        like: what has the dtype and the device of A and B.

    Attributes:
        weight, bias: those of the base, which stay as they are; None where its matrix stays quantized.
        packed: the base itself then, else None.
        pieces: of the rows of ``weight``, in their order.
        a, b: [rank, in] and [rows, rank], by the place of their piece.
        scale: what B A is multiplied by.
    """

    def __init__(
        self, base: Base, pieces: Sequence[Piece], chosen: Sequence[int], rank: int, scale: float, like: Tensor
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.packed = base if isinstance(base, QuantizedLinear) else None
        for part in ("weight", "bias"):
            self.register_parameter(part, None if self.packed is not None else getattr(base, part))
        self.pieces, self.rank, self.scale = list(pieces), rank, scale
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.a = nn.ParameterDict({str(i): torch.zeros(rank, base.in_features, **options) for i in chosen})
        self.b = nn.ParameterDict({str(i): torch.zeros(pieces[i].rows, rank, **options) for i in chosen})

    @torch.no_grad()
    def initialize(self, seed: int, name: str) -> None:
        """Draws each A uniformly from ±1 / sqrt(in), as ``nn.Linear`` and PEFT do, and makes each B zero, so that
        nothing is added at first."""
        bound = 1 / math.sqrt(self.in_features)
        for place, a in self.a.items():
            drawn = torch.rand(a.shape, generator=torch_generator(seed, f"lora/{name}/{place}"))
            a.copy_((2 * drawn - 1) * bound)
            self.b[place].zero_()

    def additions(self) -> dict[int, tuple[Tensor, Tensor]]:
        """A [rank, in] and B [rows, rank] of each piece that has them."""
        return {int(place): (self.a[place], self.b[place]) for place in self.a}

    def forward(self, x: Tensor) -> Tensor:
        # One product for all A's and one for all B's: each is small, and starting it takes longer than the product of
        # a B with the zeros beside it. The scale goes to the B's, which have fewer numbers than what A's give.
        additions, flat = self.additions(), x.flatten(0, -2)
        narrow = self.narrow(flat, {place: a for place, (a, _) in additions.items()})
        out, like, wide = self._base(flat), next(iter(additions.values()))[1], []
        for place, piece in enumerate(self.pieces):
            wide.append(additions[place][1] * self.scale if place in additions else like.new_zeros(piece.rows, 0))
        below: Tensor = torch.block_diag(*wide)  # type: ignore[no-untyped-call]
        return torch.addmm(out, narrow, below.T).view(*x.shape[:-1], -1)

    def _base(self, x: Tensor) -> Tensor:
        """W x + b."""
        found: Tensor = super().forward(x) if self.packed is None else self.packed(x)
        return found

    def narrow(self, x: Tensor, a: Mapping[int, Tensor]) -> Tensor:
        """What tokens x [N, in] give to the B's, from the A's ``a`` by the places of their pieces: [N, ranks], those of
        one piece after those of another."""
        return F.linear(x, _stacked(list(a.values())))

    def plain(self) -> Base:
        """The layer that this one stands for."""
        if self.packed is not None:
            return self.packed
        with without_weights():
            layer = Linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight, layer.bias = self.weight, self.bias
        return layer

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """``weight``, the layer's own, with what is added to it, in its dtype."""
        exact = torch.promote_types(weight.dtype, torch.float32)
        whole = weight.to(exact, copy=True)
        parts = torch.split(whole, [piece.rows for piece in self.pieces])
        for place, (a, b) in self.additions().items():
            parts[place].add_(b.to(exact) @ a.to(exact), alpha=self.scale)
        return whole.to(weight.dtype)


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    """The rows of all of the matrices; nothing is copied where there is one."""
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


def linears(decoder: Decoder, family: Family) -> dict[str, list[Piece]]:
    """The linear layers of the decoder's blocks by their names, each with the matrices that it is on disk."""
    found: dict[str, list[Piece]] = {}
    with without_weights():
        plain = Decoder(decoder.config)  # which has a name for the matrices that stay quantized, too
    for ours, there, view in placed(plain, family):
        name = ours.removesuffix(".weight")
        if (
            name != ours
            and name.startswith("layers.")
            and type(decoder.get_submodule(name)) in (Linear, QuantizedLinear)
        ):
            rows = view.shape[1] if general(ours) in family.transposed else view.shape[0]
            found.setdefault(name, []).append(Piece(there.removesuffix(".weight"), rows))
    return found


def chosen(decoder: Decoder, family: Family, targets: Sequence[str]) -> dict[str, tuple[list[Piece], list[int]]]:
    """Those of the :func:`linears` that have a matrix among the ``targets`` (none: all), and its places in each.

    Raises:
        ConfigError: the model has no matrix of such a name.
    """
    found = linears(decoder, family)
    ends = {piece.end for pieces in found.values() for piece in pieces}
    for target in targets:
        if target not in ends:
            raise ConfigError(f"tuner.targets names {target!r}, which the model does not have: {nearest(target, ends)}")
    places = {
        name: [place for place, piece in enumerate(pieces) if not targets or piece.end in targets]
        for name, pieces in found.items()
    }
    return {name: (found[name], own) for name, own in places.items() if own}


def attach(decoder: Decoder, name: str, layer: LowRankLinear) -> None:
    """Puts ``layer`` in the place of the linear layer ``name``."""
    decoder.set_submodule(name, layer)


def attached(decoder: Decoder) -> Iterator[tuple[str, LowRankLinear]]:
    """The layers with additions, by their names."""
    for name, module in decoder.named_modules():
        if isinstance(module, LowRankLinear):
            yield name, module


def initialize(decoder: Decoder, seed: int) -> None:
    """Gives all additions their initial values."""
    for name, module in decoder.named_modules():
        if isinstance(module, LowRankLinear):
            module.initialize(seed, name)
        elif name.startswith(f"{POOLS}."):
            module.initialize(seed, name.removeprefix(f"{POOLS}."))


def detach(decoder: Decoder) -> None:
    """Removes all additions: the decoder is what it was before they were attached."""
    for name, layer in list(attached(decoder)):
        decoder.set_submodule(name, layer.plain())
    if hasattr(decoder, POOLS):
        delattr(decoder, POOLS)


def merged(decoder: Decoder) -> Decoder:
    """A decoder of plain layers that computes the same; the decoder itself where it has no additions. Weights that
    nothing is added to are shared, but those that stay quantized, which are plain numbers in what is returned."""
    layers = dict(attached(decoder))
    if not layers:
        return decoder
    own = {f"{name}.{part}." for name in layers for part in ("a", "b")} | {f"{POOLS}."}
    weights: dict[str, Tensor] = {
        name.replace(".packed.", "."): parameter.detach()
        for name, parameter in decoder.named_parameters()
        if not any(name.startswith(prefix) for prefix in own)
    }
    weights |= plain_weights(decoder, decoder.like.dtype)
    weights |= {f"{name}.weight": layer.merged(weights[f"{name}.weight"]) for name, layer in layers.items()}
    return assembled(decoder, weights)
