"""A model and the head that is trained for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from penstock.models.decoder import Decoder
from penstock.models.heads.contract import Head, HeadModule


class Headed(nn.Module):
    """A head with its target, whose weights do not count as its own: they are neither trained nor saved.

    Attributes:
        target: the model, frozen. It goes along to other devices and dtypes.
        kind: which head it is.
        head: its weights.
        source: what the target is called.
        config: the target's.
        layers: none.
    """

    target: Decoder

    def __init__(self, target: Decoder, kind: Head, head: HeadModule, source: str = "") -> None:
        super().__init__()
        # Not as a submodule, whose parameters would be among this one's.
        vars(self)["target"] = target.requires_grad_(False)
        self.source = source
        self.kind, self.head, self.config, self.layers = kind, head, target.config, nn.ModuleList()

    @classmethod
    def new(cls, target: Decoder, kind: Head, seed: int, source: str = "") -> Headed:
        """One to be trained.

        Raises:
            UsageError: there is no such head for the model.
        """
        weight = target.embedding.weight
        head = kind.build(target.config).to(weight.device, weight.dtype)
        head.initialize(target, seed)
        return cls(target, kind, head, source)

    def holding(self, weights: Mapping[str, Tensor]) -> Headed:
        """The same with ``weights``, by the names of this one's parameters."""
        head = self.kind.build(self.config)
        head.load_state_dict({name.removeprefix("head."): each for name, each in weights.items()}, assign=True)
        return Headed(self.target, self.kind, head, self.source)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.target._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def parameter_count(self) -> int:
        """Number of parameters of the head."""
        return sum(p.numel() for p in self.parameters())
