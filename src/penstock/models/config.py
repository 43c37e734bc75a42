"""The shape of a Decoder, as data."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

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


class LongRopeScaling(Config):
    """LongRoPE: each frequency divided by a factor of its own, and cosines and sines times ``attention_factor``.

    The factors, one for each pair of dimensions, are ``short`` where the longest text is to have no more than
    ``original_context`` tokens, and ``long`` elsewhere; a text that grows does not change them, as the keys that are
    kept of it are rotated already.
    """

    kind: Literal["longrope"] = "longrope"
    short: tuple[PositiveFloat, ...]
    long: tuple[PositiveFloat, ...]
    original_context: PositiveInt
    attention_factor: PositiveFloat = 1.0


Scaling = Annotated[
    LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling,
    Field(discriminator="kind"),
]


class RopeConfig(Config):
    """Rotary position embedding: base ``theta`` and an optional scaling.

    ``fraction`` of the dimensions of a head are turned, the first ones (partial rotary embedding). Turned together are
    dimension i and i + half, or, where ``interleaved``, neighbours.
    """

    theta: PositiveFloat = 10_000.0
    scaling: Scaling | None = None
    fraction: float = Field(1.0, gt=0, le=1)
    interleaved: bool = False

    @model_validator(mode="after")
    def _require_wavelengths(self) -> Self:
        if isinstance(self.scaling, YarnScaling) and self.theta <= 1:
            raise ValueError(f"YaRN is for bases above 1, and theta is {self.theta:g}")
        return self


class Temperature(Config):
    """Queries grow with their position p: times 1 + ``scale`` ln(1 + floor((p + ``shift``) / ``span``))."""

    scale: float
    span: PositiveInt
    shift: int = 0


class LatentConfig(Config):
    """Multi-head latent attention (DeepSeek-V2): keys and values of all heads come from one vector of ``rank`` numbers,
    and from ``rotated`` numbers more, which all heads share, and which alone know positions.

    A head's query and key have ``plain`` + ``rotated`` numbers, its value ``value``. Queries come through a vector of
    ``query_rank`` numbers, or straight from the hidden states where that is None.
    """

    rank: PositiveInt
    rotated: PositiveInt
    plain: PositiveInt
    value: PositiveInt
    query_rank: PositiveInt | None = None


class MoEConfig(Config):
    """A sparse feed-forward block: ``experts`` of width ``ffn``, of which the router picks some for each token.

    ``shared_ffn`` is the width of the expert that sees every token (0: none); ``shared_gate`` multiplies its output by
    a learned sigmoid. ``dense_layers`` keep an ordinary feed-forward block. ``router_bias`` and ``expert_bias`` add
    biases. ``clamp`` makes the experts' activation gpt-oss's: (up + 1) gate sigmoid(1.702 gate) of clamped values, with
    gate and up as neighbours. ``weigh_inputs`` multiplies what goes into an expert by its weight, not what comes out.
    """

    experts: PositiveInt
    ffn: PositiveInt
    router: Annotated[Router, Choice("moe.router", "softmax")] = SoftmaxRouter()
    shared_ffn: int = Field(0, ge=0)
    shared_gate: bool = False
    balance_weight: NonNegativeFloat = 0.01
    dense_layers: tuple[int, ...] = ()
    router_bias: bool = False
    expert_bias: bool = False
    clamp: PositiveFloat | None = None
    weigh_inputs: bool = False


def _named_norm(value: Any) -> Any:
    """True and False stood for the norms of each head and for none, when there were no others."""
    return {True: "head", False: None}[value] if isinstance(value, bool) else value


#: What norms queries and keys: each head by itself before it is turned, all heads together, or each after it is turned
#: and without a learned scale.
QueryKeyNorm = Annotated[Literal["head", "width", "turned"] | None, BeforeValidator(_named_norm)]


class DecoderConfig(Config):
    """The shape of a Decoder.

    ``context`` is the longest sequence that the positions were made for.

    Norms: ``norm`` is the root-mean-square norm ("rms"), the same with a scale that is stored less one ("rms_offset"),
    or the layer norm ("layer"), with ``norm_bias`` or without. They stand "before" the blocks of a layer, "after" them,
    in "both" places, or, where attention and feed-forward are "parallel", once before both. ``qk_norm`` norms queries
    and keys.

    Positions: ``rope`` turns queries and keys, ``local_rope`` in layers with a window (None: as elsewhere), and nothing
    does in ``unrotated_layers``; ``learned_positions`` adds a vector for each position to the embedding instead.

    Attention: ``window`` is the sliding window in tokens (a token sees itself and the ``window - 1`` before it), in the
    ``windowed_layers`` (None: in all layers); where ``chunked``, the text is in chunks of that size instead, and a
    token sees no other. Scores are multiplied by ``attention_scale`` (None: one by the root of the size of a head) and
    bounded by ``attention_cap``, c tanh(s / c). ``sinks`` gives each head a learned score that goes nowhere.
    ``temperature`` makes queries of unrotated layers, or of all where there are none, grow with their position.
    ``latent`` makes attention that of :class:`LatentConfig`, for which ``kv_heads`` and ``head_dim`` say nothing.

    Feed-forward: ``activation`` of the gate, which multiplies another product; not ``gated``, it is all there is.

    Scales: of the embedding, of what each block adds to the residual stream, and of the logits, which ``logits_cap``
    bounds.

    With ``scalar_head`` the head gives one number for a text, and no scores of tokens: it is a reward model's.
    """

    vocabulary: PositiveInt
    hidden: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    ffn: PositiveInt
    context: PositiveInt = 2048
    norm: Literal["rms", "rms_offset", "layer"] = "rms"
    norm_bias: bool = False
    norm_eps: PositiveFloat = 1e-6
    norm_place: Literal["before", "after", "both", "parallel"] = "before"
    qk_norm: QueryKeyNorm = None
    rope: RopeConfig = RopeConfig()
    local_rope: RopeConfig | None = None
    unrotated_layers: tuple[int, ...] = ()
    learned_positions: bool = False
    window: PositiveInt | None = None
    windowed_layers: tuple[int, ...] | None = None
    chunked: bool = False
    attention_scale: PositiveFloat | None = None
    attention_cap: PositiveFloat | None = None
    sinks: bool = False
    temperature: Temperature | None = None
    latent: LatentConfig | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    mlp_bias: bool = False
    tied: bool = False
    embedding_scale: PositiveFloat = 1.0
    residual_scale: PositiveFloat = 1.0
    logits_scale: PositiveFloat = 1.0
    logits_cap: PositiveFloat | None = None
    scalar_head: bool = False
    moe: MoEConfig | None = None
    init_std: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.qk_norm in ("head", "width") and self.norm == "layer":
            raise ValueError("queries and keys are normed by root-mean-square: qk_norm needs norm = rms or rms_offset")
        if self.moe and not self.gated:
            raise ValueError("experts are gated: moe needs gated = true")
        for rope in (self.rope, self.local_rope):
            if rope and self.rotated_of(rope) % 2:
                part = "head_dim" if rope.fraction == 1 else f"{rope.fraction} of head_dim"
                raise ValueError(f"{part} ({self.rotated_of(rope)}) must be even: rotary embedding turns pairs")
            if rope and isinstance(rope.scaling, LongRopeScaling):
                lengths = {len(rope.scaling.short), len(rope.scaling.long), self.rotated_of(rope) // 2}
                if len(lengths) > 1:
                    raise ValueError(f"longrope needs {self.rotated_of(rope) // 2} short factors and as many long ones")
        if self.moe and self.moe.router.top_k > self.moe.experts:
            raise ValueError(f"the router picks {self.moe.router.top_k} of only {self.moe.experts} experts")
        return self

    def window_of(self, layer: int) -> int | None:
        """The sliding window of a layer, or its chunk, or None where it sees everything before it."""
        windowed = self.windowed_layers is None or layer in self.windowed_layers
        return self.window if windowed else None

    def rope_of(self, layer: int) -> RopeConfig | None:
        """What turns queries and keys in a layer."""
        if layer in self.unrotated_layers:
            return None
        return self.local_rope if self.local_rope and self.window_of(layer) is not None else self.rope

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Those of all layers, each once."""
        found = (self.rope_of(layer) for layer in range(self.layers))
        return tuple(dict.fromkeys(rope for rope in found if rope is not None))

    def rotated_of(self, rope: RopeConfig) -> int:
        """How many numbers of a head ``rope`` turns."""
        return self.latent.rotated if self.latent else int(self.head_dim * rope.fraction)

    def sparse(self, layer: int) -> bool:
        """Whether a layer's feed-forward block is a mixture of experts."""
        return self.moe is not None and layer not in self.moe.dense_layers

    @property
    def shares_head(self) -> bool:
        """Whether the head is the embedding."""
        return self.tied and not self.scalar_head

    @property
    def scale(self) -> float:
        """What attention's scores are multiplied by."""
        size = self.latent.plain + self.latent.rotated if self.latent else self.head_dim
        return size**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def attended(self) -> int:
        """Numbers that attention finds for a token, before they are projected."""
        return self.heads * (self.latent.value if self.latent else self.head_dim)

    @property
    def kept(self) -> int:
        """Numbers that are kept of a token in each layer, for those that come after it."""
        return self.latent.rank + self.latent.rotated if self.latent else 2 * self.kv_heads * self.head_dim

    def _attention_parameters(self) -> int:
        """Weights of the matrices of one layer's attention."""
        output = self.attended * self.hidden
        if self.latent is None:
            return self.hidden * self.head_dim * (self.heads + 2 * self.kv_heads) + output
        latent, heads = self.latent, self.heads
        query = heads * (latent.plain + latent.rotated)
        queries = latent.query_rank * (self.hidden + query) if latent.query_rank else self.hidden * query
        expanded = latent.rank * heads * (latent.plain + latent.value)
        return queries + self.hidden * (latent.rank + latent.rotated) + expanded + output

    def matmul_parameters(self) -> int:
        """Weights that multiply each token: all matrices, the head too, of the experts only those picked."""
        attention = self._attention_parameters()
        total = (1 if self.scalar_head else self.vocabulary) * self.hidden
        for layer in range(self.layers):
            width, router, matrices = self.ffn, 0, 3 if self.gated else 2
            if self.moe and self.sparse(layer):
                width = self.moe.router.top_k * self.moe.ffn + self.moe.shared_ffn
                router = self.hidden * self.moe.experts
                router += self.hidden if self.moe.shared_gate else 0
            total += attention + matrices * self.hidden * width + router
        return total

    def stored_parameters(self) -> int:
        """Weights of all matrices: those of every expert, and the embedding, which a tied head shares."""
        total = self.read_parameters() + (0 if self.shares_head else self.vocabulary * self.hidden)
        return total + (self.context * self.hidden if self.learned_positions else 0)

    def read_parameters(self) -> int:
        """Weights of the matrices that multiply the tokens of a large batch: the head too, and those of every
        expert."""
        total = self.matmul_parameters()
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
            attention += self.pair_flops * visible / length
        return 2 * self.matmul_parameters() + attention

    @property
    def pair_flops(self) -> int:
        """FLOPs of a token and one that it sees, in a layer: of the scores and of the values of all heads."""
        if self.latent is None:
            return 4 * self.heads * self.head_dim
        return 2 * self.heads * (self.latent.plain + self.latent.rotated + self.latent.value)
