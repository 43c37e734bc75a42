"""The shape of a Decoder, as data."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from penstock.core.config import Config
from penstock.models.routers.contract import Router
from penstock.models.routers.softmax import SoftmaxRouter
from penstock.policy import Choice


class LinearScaling(Config):
    """Positions divided by ``factor`` (position interpolation)."""

    kind: Literal["linear"] = "linear"
    factor: PositiveFloat


class Llama3Scaling(Config):
    """Llama 3.1's scaling: long wavelengths divided by ``factor``, short ones kept, a ramp between."""

    kind: Literal["llama3"] = "llama3"
    factor: PositiveFloat
    low_frequency_factor: PositiveFloat
    high_frequency_factor: PositiveFloat
    original_context: PositiveInt


class YarnScaling(Config):
    """YaRN: interpolate slow dimensions, extrapolate fast ones, and scale the logits by ``attention_factor``.

    ``attention_factor`` None means 0.1 ln(factor) + 1, or the ratio of the ``mscale`` pair when both are given.
    """

    kind: Literal["yarn"] = "yarn"
    factor: PositiveFloat
    original_context: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


Scaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="kind")]


class RopeConfig(Config):
    """Rotary position embedding: base ``theta`` and an optional scaling."""

    theta: PositiveFloat = 10_000.0
    scaling: Scaling | None = None


class MoEConfig(Config):
    """A sparse feed-forward block: ``experts`` of width ``ffn``, of which the router picks some for each token.

    ``shared_ffn`` is the width of the expert that sees every token (0: none); ``shared_gate`` multiplies its output by
    a learned sigmoid. ``dense_layers`` keep an ordinary feed-forward block.
    """

    experts: PositiveInt
    ffn: PositiveInt
    router: Annotated[Router, Choice("moe.router", "softmax")] = SoftmaxRouter()
    shared_ffn: int = Field(0, ge=0)
    shared_gate: bool = False
    balance_weight: NonNegativeFloat = 0.01
    dense_layers: tuple[int, ...] = ()


class DecoderConfig(Config):
    """The shape of a Decoder.

    ``window`` is the sliding window in tokens (a token sees itself and the ``window - 1`` before it), applied in
    ``windowed_layers`` (None: in all layers). ``context`` is the longest sequence that the positions were made for.
    """

    vocabulary: PositiveInt
    hidden: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    ffn: PositiveInt
    context: PositiveInt = 2048
    norm_eps: PositiveFloat = 1e-6
    rope: RopeConfig = RopeConfig()
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    window: PositiveInt | None = None
    windowed_layers: tuple[int, ...] | None = None
    moe: MoEConfig | None = None
    init_std: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary embedding turns pairs")
        if self.moe and self.moe.router.top_k > self.moe.experts:
            raise ValueError(f"the router picks {self.moe.router.top_k} of only {self.moe.experts} experts")
        return self

    def window_of(self, layer: int) -> int | None:
        """The sliding window of a layer, or None where it sees everything before it."""
        windowed = self.windowed_layers is None or layer in self.windowed_layers
        return self.window if windowed else None

    def sparse(self, layer: int) -> bool:
        """Whether a layer's feed-forward block is a mixture of experts."""
        return self.moe is not None and layer not in self.moe.dense_layers

    def matmul_parameters(self) -> int:
        """Weights that multiply each token: all matrices, the head too, of the experts only those picked."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        total = self.vocabulary * self.hidden
        for layer in range(self.layers):
            width, router = self.ffn, 0
            if self.moe and self.sparse(layer):
                width = self.moe.router.top_k * self.moe.ffn + self.moe.shared_ffn
                router = self.hidden * self.moe.experts
                router += self.hidden if self.moe.shared_gate else 0
            total += attention + 3 * self.hidden * width + router
        return total

    def stored_parameters(self) -> int:
        """Weights of all matrices: those of every expert, and the embedding, which a tied head shares."""
        total = self.matmul_parameters() + (0 if self.tied else self.vocabulary * self.hidden)
        for layer in range(self.layers):
            if self.moe and self.sparse(layer):
                total += 3 * self.hidden * self.moe.ffn * (self.moe.experts - self.moe.router.top_k)
        return total

    def flops_per_token(self, length: int) -> float:
        """Forward FLOPs for a token, averaged over a causal sequence of ``length`` tokens.

        A matrix weight costs 2 (multiply and add); each visible key costs 4 per head and head dimension (scores and
        values). Masked keys are not counted, and neither are norms, RoPE and softmax. Backward costs twice as much.
        """
        attention = 0.0
        for layer in range(self.layers):
            window = min(self.window_of(layer) or length, length)
            visible = window * (window + 1) / 2 + (length - window) * window
            attention += 4 * self.heads * self.head_dim * visible / length
        return 2 * self.matmul_parameters() + attention
