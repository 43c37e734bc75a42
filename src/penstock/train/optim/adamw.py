"""AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat
from torch import nn

from penstock.policy import policy
from penstock.train.optim.contract import Limit, Optimizer, is_matrix

Beta = Annotated[float, Field(ge=0, lt=1)]


@policy("optim.optimizer", "adamw")
class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter, 2019), PyTorch's fused kernel; matrices decay, norms and biases do not."""

    elementwise: ClassVar[bool] = True

    lr: PositiveFloat = 3e-4
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        matrices = [p for p in parameters.values() if is_matrix(p)]
        others = [p for p in parameters.values() if not is_matrix(p)]
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, self.lr, self.betas, self.eps, fused=True)

    @classmethod
    def limit(cls) -> Limit:
        def known(parameters: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
            groups = [
                {"params": [p], "weight_decay": 0.0 if name.endswith("norm.weight") else 0.2}
                for name, p in parameters.items()
            ]
            return [torch.optim.AdamW(groups, 0.01, (0.8, 0.9), 1e-6, fused=True)]

        return Limit(cls(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2), known)
