"""Muon: momentum whose matrix updates are made orthogonal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from penstock.core.processor import fast_dtype
from penstock.parallel.shard import of_matrices
from penstock.policy import policy
from penstock.train.optim.adamw import AdamW, Beta
from penstock.train.optim.contract import Limit, Optimizer, is_matrix

#: Coefficients of the quintic Newton-Schulz iteration (Jordan et al., 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)


@policy("optim.optimizer", "muon")
class Muon(Optimizer):
    """Muon for the layers' matrices, AdamW for embeddings, head, norms and biases (Jordan et al., 2024).

    The update of a matrix [m, n] is scaled by 0.2 sqrt(max(m, n)), so that its entries are as large as AdamW's usually
    are and one learning rate fits both (Liu et al., 2025). ``lr`` is the rate of the matrices; ``adam_lr`` that of the
    rest, which decay by ``adam_weight_decay``.

    bf16 is precise enough for the orthogonalisation; ``precision`` "auto" is the dtype in which the device multiplies
    fastest. Of a model in shards, each process orthogonalises its part of the matrices, whole.
    """

    lr: PositiveFloat = 3e-3
    momentum: float = Field(0.95, ge=0, lt=1)
    iterations: PositiveInt = 5
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    adam_lr: PositiveFloat = 3e-3
    adam_weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        hidden = [p for name, p in parameters.items() if name.startswith("layers.") and is_matrix(p)]
        chosen = {id(p) for p in hidden}
        rest = [p for p in parameters.values() if id(p) not in chosen]
        return MuonWithAdam(self, hidden, rest)

    @classmethod
    def limit(cls) -> Limit:
        # With AdamW's scale PyTorch's own Muon is the same, in bf16, for matrices that are not batched.
        def known(parameters: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
            matrices = {name: p for name, p in parameters.items() if name.startswith("layers.") and p.dim() == 2}
            rest = [p for name, p in parameters.items() if name not in matrices]
            return [
                torch.optim.Muon(matrices.values(), 0.02, 0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(rest, 0.003, (0.9, 0.95), weight_decay=0.0, fused=True),
            ]

        return Limit(cls(lr=0.02, momentum=0.9, weight_decay=0.1, adam_lr=0.003, precision="bf16"), known)


class MuonWithAdam(torch.optim.Optimizer):
    """The optimizer that :class:`Muon` builds. Matrices of one shape are orthogonalised as one batch."""

    def __init__(self, options: Muon, matrices: list[nn.Parameter], rest: list[nn.Parameter]) -> None:
        super().__init__([{"params": matrices}], {"lr": options.lr, "weight_decay": options.weight_decay})
        self.options = options
        adam = AdamW(lr=options.adam_lr, weight_decay=options.adam_weight_decay, betas=options.betas, eps=options.eps)
        self._adam = adam.build({str(i): parameter for i, parameter in enumerate(rest)})
        # One optimizer to the outside: the same group tables, so that a schedule reaches both, and one state.
        self.param_groups += self._adam.param_groups
        self._adam.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        group = self.param_groups[0]
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for members in by_shape.values():
            self._update(members, group["lr"], group["weight_decay"])
        self._adam.step()
        return loss

    def _update(self, members: list[Tensor], lr: float, weight_decay: float) -> None:
        """Moves matrices of one shape."""
        for parameter in members:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[p]["momentum"] for p in members]
        gradients = [p.grad for p in members if p.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - self.options.momentum)
        # In place on copies: PyTorch 2.11 does it for shards in no other way, and gradients stay for who settles later.
        nesterov = [gradient.clone() for gradient in gradients]
        torch._foreach_lerp_(nesterov, momenta, self.options.momentum)
        dtype, iterations = self._dtype(members[0].device), self.options.iterations
        updates = of_matrices(nesterov, lambda batch: orthogonalize(batch.to(dtype), iterations).to(batch.dtype))
        scale = 0.2 * max(members[0].shape[-2:]) ** 0.5
        torch._foreach_mul_(members, 1 - lr * weight_decay)
        torch._foreach_add_(members, updates, alpha=-lr * scale)

    def _dtype(self, device: torch.device) -> torch.dtype:
        named = {"fp32": torch.float32, "bf16": torch.bfloat16}
        return named.get(self.options.precision) or fast_dtype(device).choice


def orthogonalize(matrices: Tensor, iterations: int) -> Tensor:
    """Moves every singular value of a batch of matrices [n, rows, columns] near 1 (about 0.7 to 1.2).

    The quintic Newton-Schulz iteration X <- aX + (bA + cA^2)X with A = X X^T, on the smaller side, in the dtype of the
    matrices.
    """
    a, b, c = QUINTIC
    x = matrices
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
