"""Mixtures of low-rank additions to linear layers: a router says, for each token, how much of which expert is added."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.core.errors import UsageError
from penstock.core.randomness import torch_generator
from penstock.models.adapters.low_rank import LowRankLinear, Piece, attached
from penstock.models.decoder import Decoder
from penstock.models.linear import Linear


class Mixture(NamedTuple):
    """How tokens choose among experts.

    Attributes:
        experts: how many there are.
        entropy_index: q of the Tsallis entropy, 1 or more; 1 is Shannon's.
        threshold: tokens whose entropy is above it take all experts.
        top_p: others take the most probable experts that are no more probable than this together,
        top_k: but at least so many.
    """

    experts: int
    entropy_index: float
    threshold: float
    top_p: float
    top_k: int

    def weights(self, log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """By what each expert's addition is multiplied, [*T, experts]: its probability, or 0 where it is not taken; and
        the entropies [*T]. The weights of those that are taken are not scaled up to 1."""
        entropy = tsallis(log_probabilities, self.entropy_index)
        probabilities = log_probabilities.exp()
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        taken = ordered.cumsum(-1) <= self.top_p
        taken[..., : self.top_k] = True
        taken = torch.zeros_like(taken).scatter(-1, order, taken) | (entropy > self.threshold)[..., None]
        return probabilities * taken, entropy


def tsallis(log_probabilities: Tensor, index: float) -> Tensor:
    """The Tsallis entropy (1 - sum p^q) / (q - 1), [*T], of probabilities p by their logarithms [*T, n], with q the
    ``index``, 1 or more; at 1 it is its limit, Shannon's entropy in nats.

    It is computed as the sum of p (1 - p^(q - 1)) / (q - 1), which does not cancel where q is near 1.
    """
    if index == 1:
        parts = -log_probabilities
    else:
        parts = -torch.expm1((index - 1) * log_probabilities) / (index - 1)
    return (log_probabilities.exp() * parts).sum(-1)


class RoutedLinear(LowRankLinear):
    """y = W x + b + scale * sum_e g_e(x) B_e A_e x, for each piece of the rows of W that has experts e, with g the
    weights of a :class:`Mixture` by a router of that piece.

    Attributes:
        router: [experts, in], by the place of its piece.
        a, b: [experts * rank, in] and [rows, experts * rank], those of one expert after those of another.
        entropies: where this is a list, each pass adds the routers' entropies [*T].
    """

    entropies: list[Tensor] | None = None

    def __init__(
        self, base: Linear, pieces: Sequence[Piece], chosen: Sequence[int], rank: int, scale: float, mixture: Mixture
    ) -> None:
        super().__init__(base, pieces, chosen, mixture.experts * rank, scale)
        self.mixture, self.expert_rank = mixture, rank
        options: dict[str, Any] = {"dtype": base.weight.dtype, "device": base.weight.device}
        shape = (mixture.experts, base.in_features)
        self.router = nn.ParameterDict({str(i): torch.zeros(shape, **options) for i in chosen})

    @torch.no_grad()
    def initialize(self, seed: int, name: str) -> None:
        """Draws routers as the A's; the B's are zero, so that nothing is added at first."""
        super().initialize(seed, name)
        bound = 1 / math.sqrt(self.in_features)
        for place, router in self.router.items():
            drawn = torch.rand(router.shape, generator=torch_generator(seed, f"dynmole/{name}/{place}"))
            router.copy_((2 * drawn - 1) * bound)

    def merged(self, weight: Tensor) -> Tensor:
        raise UsageError(
            "the adapter adds something else for each token, as no plain model does: it cannot be merged",
            hint="Open the folder that the run leaves, which lies on its base; or train with tuner=lora to merge.",
        )

    def product(self, place: int, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        logits = F.linear(x, self.router[str(place)])
        exact = torch.promote_types(logits.dtype, torch.float32)
        weights, entropy = self.mixture.weights(logits.to(exact).log_softmax(-1))
        if self.entropies is not None:
            self.entropies.append(entropy)
        narrow = F.linear(x, a)
        return F.linear(narrow * weights.repeat_interleave(self.expert_rank, -1).to(narrow.dtype), b)


def routed(decoder: Decoder) -> Iterator[tuple[str, RoutedLinear]]:
    """The layers with experts, by their names."""
    for name, layer in attached(decoder):
        if isinstance(layer, RoutedLinear):
            yield name, layer
