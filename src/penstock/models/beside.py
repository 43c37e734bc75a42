"""Weights that are trained beside models that stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder


class Beside(nn.Module):
    """Weights with the models that they are trained beside. Those do not count as its own: they are neither trained nor
    saved, and go along to other devices and dtypes.

    Args:
        config: of the model by whose size steps are reckoned.
        models: by the names under which they are attributes.

    Attributes:
        layers: none.
    """

    def __init__(self, config: DecoderConfig, **models: Decoder) -> None:
        super().__init__()
        self.config, self.layers, self._frozen = config, nn.ModuleList(), tuple(models.values())
        for name, model in models.items():
            # Not as a submodule, whose parameters would be among this one's.
            vars(self)[name] = model.requires_grad_(False)

    def holding(self, weights: Mapping[str, Tensor]) -> Beside:
        """The same with ``weights``, by the names of this one's parameters."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for model in self._frozen:
            model._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def parameter_count(self) -> int:
        """Number of parameters that are trained."""
        return sum(p.numel() for p in self.parameters())
