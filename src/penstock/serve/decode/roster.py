"""A roster of experts: each token is chosen by several copies of the model, which differ in the experts they ask."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from penstock.policy import policy
from penstock.serve.decode.contract import Copies, DecodeRule, Limit


@policy("decode.rule", "roster", papers=[173])
class Roster(DecodeRule):
    """Computes each new token's scores ``copies`` times, as they are and with Gumbel noise on the routers' logits, so
    that other experts are chosen, and takes the mean of the distributions (RoE, hyper-parallel scaling). A model with
    experts becomes an ensemble of itself, without training.

    From the paper: noise on the routers, copies of one token that are averaged, their batching, the cache of the pass
    without noise, which all of them read. From knowledge: that the noise is Gumbel's. Ours: the first copy has no
    noise; distributions are averaged, not logits; noise moves the experts' weights as well as their choice; one scale
    for all layers, and its default. Not built: tuning the scale of each layer.

    Attributes:
        copies: of each token; 1 is the model as it is. Tokens behind the prompt take so many times the arithmetic, and
            no more cache.
        noise: the scale of the noise, in units of the logits; 0 changes nothing.
    """

    copies: Annotated[int, Field(ge=1, le=64)] = 4
    noise: Annotated[float, Field(ge=0, le=100)] = 0.5

    @classmethod
    def limit(cls) -> Limit:
        return Limit(cls(noise=0.0), {"temperature": 0.9, "top_p": 0.95})

    @property
    def again(self) -> Copies | None:
        return Copies(self.copies - 1, self.noise) if self.copies > 1 and self.noise else None
