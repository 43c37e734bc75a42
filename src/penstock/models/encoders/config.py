"""The shape of an encoder."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from penstock.core.config import Config


class EncoderConfig(Config):
    """What an encoder is made of.

    Attributes:
        vocabulary: how many tokens there are.
        hidden, layers, heads, ffn: its sizes.
        context: most tokens of a text.
        places: rows of the table of learned positions; 0 where positions are angles.
        first_place: the row of a text's first token.
        kinds: rows of the table of kinds of segments, of which the first is added to all tokens; 0 for none.
        norm_eps: added to variances.
        norm_bias: norms have a shift.
        pre_norm: norms stand before attention and feed-forward block, one behind the embedding takes the place of the
            first of them, and one is behind all layers; else they stand behind what each block adds to, and one behind
            the embedding.
        attention_bias, mlp_bias: the matrices of these blocks have a shift.
        activation: of the feed-forward block; ``gated``, its first half gates the second.
        thetas: bases of the angles of layers that see all, and of those that see a window; None without angles.
        window: tokens at a distance of up to so many see each other in the layers that see a window.
        windowed: numbers of those layers.
    """

    vocabulary: PositiveInt
    hidden: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    ffn: PositiveInt
    context: PositiveInt
    places: NonNegativeInt = 0
    first_place: NonNegativeInt = 0
    kinds: NonNegativeInt = 0
    norm_eps: PositiveFloat = 1e-12
    norm_bias: bool = True
    pre_norm: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    gated: bool = False
    thetas: tuple[PositiveFloat, PositiveFloat] | None = None
    window: NonNegativeInt = 0
    windowed: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _heads_divide(self) -> EncoderConfig:
        if self.hidden % self.heads:
            raise ValueError(f"hidden ({self.hidden}) is no multiple of heads ({self.heads})")
        return self
