"""Budgets that fall from layer to layer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PrivateAttr

from penstock.models.config import DecoderConfig
from penstock.ops.paged.layered import LayeredTokens
from penstock.policy import policy
from penstock.serve.kv.policies.contract import Cached, CachePolicy, Kept
from penstock.serve.kv.policies.snapkv import SnapKV


@policy("kv.policy", "pyramidkv")
class PyramidKV(SnapKV):
    """Keeps what SnapKV keeps, more of it in the first layers and less in the last, which look at few tokens.

    The rule of PyramidKV (Cai et al., 2024): budgets fall in equal steps, the last layer's being the mean divided by
    ``beta`` beyond the window that all layers keep. Our reading: the budget is that of a layer in the mean, its window
    counted; where the first layer would not have so many tokens, it keeps all, and the last one more. Ours: the same
    rule again while the text grows.

    What the layers keep is laid end to end over the sequence's first places, so a cache takes the places that it takes
    with equal budgets, or one fewer.

    Attributes:
        beta: what the mean budget is divided by in the last layer; 1 is the same budget in all.
    """

    beta: Annotated[float, Field(ge=1)] = 20.0
    _layered: LayeredTokens | None = PrivateAttr(None)

    @property
    def view(self) -> LayeredTokens | None:
        return self._layered

    def fitted(self, model: DecoderConfig) -> CachePolicy:
        if not self.compresses:
            return self
        fitted = self.model_copy()
        fitted._layered = LayeredTokens(model.layers, self.budget, self.least, 2 - 1 / self.beta)
        return fitted

    def keeps(self, computed: int) -> int:
        if not self.compresses:
            return computed
        assert self._layered is not None, "it is not fitted to a model"
        return self._layered.places(computed)

    def compress(self, cached: Cached, count: int) -> Kept:
        assert self._layered is not None
        computed = cached.keys.shape[-2] if cached.computed is None else cached.computed
        keys, values = [], []
        for layer, wanted in enumerate(self._layered.counts(computed)):
            own = cached.of_layer(layer)
            places = self.select(own, wanted).unsqueeze(-1)
            keys.append(own.keys.take_along_dim(places, -2))
            values.append(own.values.take_along_dim(places, -2))
        return Kept(self._layered.lay(keys), self._layered.lay(values))
