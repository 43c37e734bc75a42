"""Mixtures of low-rank additions to linear layers: a router says, for each token, how much of which expert is added."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.core.errors import UsageError
from penstock.core.randomness import torch_generator
from penstock.models.adapters.low_rank import Base, LowRankLinear, Piece, attached
from penstock.models.decoder import Decoder


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

    def choose(self, log_probabilities: Tensor) -> Chosen:
        """What tokens choose, by their logarithms of the experts' probabilities [*T, experts]."""
        entropy = tsallis(log_probabilities, self.entropy_index)
        probabilities = log_probabilities.exp()
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        taken = ordered.cumsum(-1) <= self.top_p
        taken[..., : self.top_k] = True
        taken = torch.zeros_like(taken).scatter(-1, order, taken) | (entropy > self.threshold)[..., None]
        return Chosen(probabilities * taken, probabilities, entropy)


class Chosen(NamedTuple):
    """How tokens have chosen among experts.

    Attributes:
        weights: by what each expert's addition is multiplied, [*T, experts]: its probability, or 0 where it is not
            taken. Those of a part are not scaled up to 1.
        probabilities: of the experts, [*T, experts].
        entropy: of the probabilities, [*T].
    """

    weights: Tensor
    probabilities: Tensor
    entropy: Tensor


def unevenness(weights: Tensor, probabilities: Tensor) -> Tensor:
    """n sum_e f_e p_e for n experts, with f and p the means of ``weights`` and ``probabilities`` [N, n] over tokens: 1
    where all experts are taken evenly, and n where all tokens take the same one alone. A scalar."""
    return probabilities.shape[-1] * (weights.mean(0) * probabilities.mean(0)).sum()


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
        choices: where this is a list, each pass adds what tokens have chosen, a router at a time.
    """

    choices: list[Chosen] | None = None

    def __init__(
        self,
        base: Base,
        pieces: Sequence[Piece],
        chosen: Sequence[int],
        rank: int,
        scale: float,
        like: Tensor,
        mixture: Mixture,
    ) -> None:
        super().__init__(base, pieces, chosen, mixture.experts * rank, scale, like)
        self.mixture, self.expert_rank = mixture, rank
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
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

    def narrow(self, x: Tensor, a: Mapping[int, Tensor]) -> Tensor:
        weights = []
        for place in a:
            logits = F.linear(x, self.router[str(place)])
            exact = torch.promote_types(logits.dtype, torch.float32)
            chosen = self.mixture.choose(logits.to(exact).log_softmax(-1))
            if self.choices is not None:
                self.choices.append(chosen)
            weights.append(chosen.weights)
        narrow = super().narrow(x, a)
        return narrow * torch.cat(weights, -1).repeat_interleave(self.expert_rank, -1).to(narrow.dtype)


def routed(decoder: Decoder) -> Iterator[tuple[str, RoutedLinear]]:
    """The layers with experts, by their names."""
    for name, layer in attached(decoder):
        if isinstance(layer, RoutedLinear):
            yield name, layer
