"""A model and the head that is trained for it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from penstock.models.beside import Beside
from penstock.models.decoder import Decoder
from penstock.models.heads.contract import Head, HeadModule


class Headed(Beside):
    """A head with its target.

    Attributes:
        target: the model, frozen.
        kind: which head it is.
        head: its weights.
        source: what the target is called.
        config: the target's.
    """

    target: Decoder

    def __init__(self, target: Decoder, kind: Head, head: HeadModule, source: str = "") -> None:
        super().__init__(target.config, target=target)
        self.kind, self.head, self.source = kind, head, source

    @classmethod
    def new(cls, target: Decoder, kind: Head, seed: int, source: str = "") -> Headed:
        """One to be trained.

        Raises:
            UsageError: there is no such head for the model.
        """
        weight = target.like
        head = kind.build(target.config).to(weight.device, weight.dtype)
        head.initialize(target, seed)
        return cls(target, kind, head, source)

    def holding(self, weights: Mapping[str, Tensor]) -> Headed:
        head = self.kind.build(self.config)
        head.load_state_dict({name.removeprefix("head."): each for name, each in weights.items()}, assign=True)
        return Headed(self.target, self.kind, head, self.source)
