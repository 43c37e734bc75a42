"""Neighbouring layers share the directions of their keys and values."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from penstock.core.errors import UsageError
from penstock.models.config import DecoderConfig
from penstock.ops.paged.paired import PairedLayers, Shared
from penstock.policy import policy
from penstock.serve.kv.policies.contract import Cached, CachePolicy, Kept, Repeated


@policy("kv.policy", "minicache", papers=[210])
class MiniCache(Repeated):
    """Merges the keys, and the values, of two neighbouring layers, in the deeper part of the model, and evicts no
    token.

    From the paper [210]: the vectors of a token in two neighbouring layers are split into norm and direction; the
    directions become one, interpolated on the sphere, and each layer keeps its norms; tokens whose vectors are too far
    apart are retained in both layers; the shallow layers stay as they are. Our reading: a token is too far apart if it
    is among the share ``retained`` of the tokens whose directions differ the most, of keys or of values, in each head
    (the paper has a threshold between the least and the greatest distance), so that the bytes are known. Tokens since
    the last compression lie in all layers as they are. What is merged already merges to itself later on.

    Of L layers, 2 P of them in pairs, n tokens take (L - 2 P) n + P (n + retained n + 2 n / D) vectors of D numbers for
    each KV head, twice, in place of L n.

    Attributes:
        start: the share of the layers, from the first on, that stay as they are.
        retained: the share of the tokens that are kept in both layers of a pair.
        interpolate: how far the shared direction lies on the way from the first layer's to the second's.
    """

    start: Annotated[float, Field(ge=0, lt=1)] = 0.5
    retained: Annotated[float, Field(ge=0, le=1)] = 0.05
    interpolate: Annotated[float, Field(ge=0, le=1)] = 0.6
    _paired: PairedLayers | None = PrivateAttr(None)

    @property
    def compresses(self) -> bool:
        return self.retained < 1

    @property
    def view(self) -> PairedLayers | None:
        return self._paired

    def limit(self) -> CachePolicy:
        return self.model_copy(update={"retained": 1.0})

    def fitted(self, model: DecoderConfig) -> CachePolicy:
        if not self.compresses:
            return self
        layers, head_dim = model.layers, model.head_dim
        paired = PairedLayers(layers, int(layers * (1 - self.start)) // 2, head_dim, self.retained)
        if not paired.pairs:
            raise UsageError(
                f"minicache merges no layers of a model with {layers}, starting behind {self.start:g} of them",
                hint="Take a lower kv.start, or another policy.",
            )
        if paired.vectors(1000 * head_dim) >= 1000 * head_dim * layers:
            raise UsageError(
                f"minicache saves nothing where {self.retained:g} of the tokens are retained and a head has {head_dim} "
                "numbers: norms take 2 of as many",
                hint="Take a lower kv.retained, or another policy.",
            )
        fitted = self.model_copy()
        fitted._paired = paired
        return fitted

    def keeps(self, computed: int) -> int:
        if not self.compresses:
            return computed
        assert self._paired is not None, "it is not fitted to a model"
        return self._paired.places(computed)

    def compress(self, cached: Cached, count: int) -> Kept:
        paired = self._paired
        assert paired is not None
        keys, values = cached.keys, cached.values
        single = paired.single
        pairs = [(each[single::2].float(), each[single + 1 :: 2].float()) for each in (keys, values)]
        far = torch.maximum(*(_distance(*each) for each in pairs))
        apart = paired.apart(keys.shape[-2])
        order = _first_those(far.sort(dim=-1, descending=True, stable=True).indices, apart).unsqueeze(-1)
        laid = []
        for whole, pair in zip((keys, values), pairs, strict=True):
            first, second = (each.take_along_dim(order, -2) for each in pair)
            shared = self.merged(first, second, apart)
            laid.append(paired.lay(whole[:single], Shared(*(each.to(whole.dtype) for each in shared))))
        return Kept(*laid)

    def merged(self, first: Tensor, second: Tensor, apart: int) -> Shared:
        """What two layers share of the tokens with vectors ``first`` and ``second`` [*, n, D], of which the first
        ``apart`` are retained in both."""
        norms = torch.stack([torch.linalg.vector_norm(each, dim=-1) for each in (first, second)], -2)
        norms[..., :apart] = 1
        directions = interpolated(_direction(first), _direction(second), self.interpolate)
        directions[..., :apart, :] = first[..., :apart, :]
        return Shared(directions, second[..., :apart, :], norms)


def interpolated(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Unit vectors [*, D] on the arc from ``first`` to ``second``, which are such or zero: the ``share`` of it away
    from ``first``. Where they are opposite, and there is no one arc, it is the nearer of the two."""
    # In float64: the last bit of a sine may depend on where in a vector of the processor it is computed.
    angle = 2 * torch.atan2(
        torch.linalg.vector_norm(first - second, dim=-1, keepdim=True).double(),
        torch.linalg.vector_norm(first + second, dim=-1, keepdim=True).double(),
    )
    before, behind, sine = (each.sin().to(first.dtype) for each in ((1 - share) * angle, share * angle, angle))
    arc = (before * first + behind * second) / sine
    straight = first if share < 0.5 else second
    # On the shortest arcs the sine says nothing any more, and the middle is the straight one.
    chord = torch.where(angle < 1, (1 - share) * first + share * second, straight)
    return _direction(torch.where(sine > 1e-4, arc, chord))


def _direction(vectors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norms.clamp(min=torch.finfo(torch.float32).tiny)


def _first_those(order: Tensor, count: int) -> Tensor:
    """The numbers in ``order`` [*, n], the first ``count`` of them before the others, and each of the two ascending."""
    return torch.cat([order[..., :count].sort(-1).values, order[..., count:].sort(-1).values], -1)


def _distance(first: Tensor, second: Tensor) -> Tensor:
    """How far apart the directions of vectors [*, D] are, on the straight line."""
    distance: Tensor = torch.linalg.vector_norm(_direction(first) - _direction(second), dim=-1)
    return distance
