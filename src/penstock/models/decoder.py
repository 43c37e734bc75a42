"""The Decoder: one definition of the transformer language model that trains, serves, drafts and searches.

Tokens are flat: every module takes any leading token dimensions, and only the :class:`AttentionContext` passed in knows
which tokens belong together. Nothing here knows about devices, caches, packing or parallelism.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.core.randomness import torch_generator
from penstock.models.attention import AttentionContext
from penstock.models.config import DecoderConfig, LongRopeScaling, MoEConfig, Temperature
from penstock.models.latent import LatentAttention
from penstock.models.linear import Linear
from penstock.models.norms import RMSNorm, norm, rms_norm
from penstock.models.pieces import EAGER, Pieces
from penstock.models.quantized import QuantizedExperts, packed_layers
from penstock.models.rotary import Rotaries, Turns
from penstock.models.routers.contract import Routing
from penstock.models.superposed import SuperposedRows
from penstock.ops.activations import ACTIVATIONS, clamped_swiglu, gated
from penstock.ops.attention import Extras
from penstock.ops.experts import mixed_experts
from penstock.ops.linear import linear
from penstock.ops.quantized.contract import PackedStack
from penstock.ops.rotary import rotate_heads


class Output(NamedTuple):
    """What a forward pass gives: ``hidden`` [*T, hidden] after the last norm, and the ``balance`` loss of the sparse
    layers, summed over them and over the tokens (None where there are none)."""

    hidden: Tensor
    balance: Tensor | None


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, and optional norms on queries and keys.

    Attributes:
        stacked: rows of the matrices that ``qkv`` has one below the other.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.stacked = (width, kv_width, kv_width)
        self.qkv = Linear(config.hidden, width + 2 * kv_width, bias=config.qkv_bias)
        self.output = Linear(width, config.hidden, bias=config.output_bias)

        rope, self.norms, self.eps = config.rope_of(layer), config.qk_norm, config.norm_eps
        self.interleaved = rope is not None and rope.interleaved
        self.rope = None if rope is None else config.ropes.index(rope)
        self.query_norm: RMSNorm
        self.key_norm: RMSNorm
        if config.qk_norm in ("head", "width"):
            sizes = (width, kv_width) if config.qk_norm == "width" else (config.head_dim, config.head_dim)
            self.query_norm, self.key_norm = (rms_norm(config, size) for size in sizes)
        everywhere = not config.unrotated_layers
        self.temperature = config.temperature if everywhere or rope is None else None

        window = config.window_of(layer)
        self.scale, self.window = config.scale, None if config.chunked else window
        self.cap, self.chunk = config.attention_cap, window if config.chunked else None
        self.sinks = nn.Parameter(torch.zeros(config.heads)) if config.sinks else None

    def forward(self, x: Tensor, rotary: Turns, context: AttentionContext) -> Tensor:
        """What tokens [*T, hidden] take from each other, [*T, H * D]; ``output`` brings it back to [*T, hidden]."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), -2)
        if self.norms == "width":
            query, key = self.norm_widths(query, key)
        if self.rope is not None:
            query, key = self.rotate(query, key, rotary[self.rope])
        elif self.norms == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        if self.temperature is not None:
            query = query * heat(self.temperature, context.positions)[..., None, None].to(query.dtype)
        extras = Extras(self.cap, self.sinks, self.chunk)
        out = context.attend(self.layer, query, key, value, scale=self.scale, window=self.window, extras=extras)
        return out.flatten(-2)

    def norm_widths(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [*T, H, D] and keys [*T, K, D], each normed over all of their heads."""
        normed = self.query_norm(query.flatten(-2)), self.key_norm(key.flatten(-2))
        query, key = (each.unflatten(-1, (-1, self.head_dim)) for each in normed)
        return query, key

    def rotate(self, query: Tensor, key: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries [*T, H, D] and keys [*T, K, D] turned by their positions, and normed before that or after it if the
        model norms each head."""
        scales = (self.query_norm.scale, self.key_norm.scale) if self.norms == "head" else None
        query, key = rotate_heads(query, key, *turns, scales, self.eps, self.interleaved)
        if self.norms == "turned":
            query, key = (F.rms_norm(each, (self.head_dim,), eps=self.eps) for each in (query, key))
        return query, key


def heat(temperature: Temperature, positions: Tensor) -> Tensor:
    """What queries at ``positions`` are multiplied by, float32 in the same shape."""
    spans = torch.floor((positions.float() + temperature.shift) / temperature.span)
    return 1.0 + temperature.scale * torch.log1p(spans)


class FeedForward(nn.Module):
    """Gated: down(activation(gate(x)) * up(x)), gate and up as one matrix (SwiGLU, where that is silu); or
    down(activation(gate(x))).

    Attributes:
        stacked: rows of the matrices that ``gate_up`` has one below the other.
    """

    def __init__(self, config: DecoderConfig, ffn: int, bias: bool = False) -> None:
        super().__init__()
        self.activation = gated(config.activation) if config.gated else ACTIVATIONS[config.activation]
        self.stacked = (ffn, ffn) if config.gated else (ffn,)
        self.gate_up = Linear(config.hidden, sum(self.stacked), bias=bias)
        self.down = Linear(ffn, config.hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.activation(self.gate_up(x)))
        return out


class MixtureOfExperts(nn.Module):
    """A router, its experts as stacked matrices, and an optional expert that sees every token.

    The loss for balance is that of Switch Transformers (Fedus et al., 2021): each token adds E sum_e f_e p_e, where p_e
    is how probable it finds expert e, and f_e the share of all assignments that e has got; 1 a token when the load is
    even. With f taken from the tokens at hand the loss of a batch would not be the sum of those of its parts, so
    whoever computes a batch in parts gives f in ``load``.

    Attributes:
        stacked: rows of the matrices that ``gate_up`` has one below the other for an expert.
        load: [experts], the f of the loss for balance; None takes it from the tokens of each pass.
        counts: int64 [experts], to which each pass adds its assignments; None counts nothing.
        noise: [n, experts], which is added to the router's logits of the last n tokens of each pass; None adds nothing.
    """

    load: Tensor | None = None
    counts: Tensor | None = None
    noise: Tensor | None = None

    def __init__(self, config: DecoderConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.policy = moe.router
        self.experts = moe.experts
        clamp = moe.clamp
        self.activation = functools.partial(clamped_swiglu, limit=clamp) if clamp else gated(config.activation)
        self.weigh_inputs = moe.weigh_inputs
        self.stacked = (2 * moe.ffn,) if clamp else (moe.ffn, moe.ffn)  # where it is clamped, row by row in turns
        self.router = nn.Linear(config.hidden, moe.experts, bias=moe.router_bias)
        self.gate_up = nn.Parameter(torch.empty(moe.experts, 2 * moe.ffn, config.hidden))
        self.down = nn.Parameter(torch.empty(moe.experts, config.hidden, moe.ffn))
        self.gate_up_bias = nn.Parameter(torch.zeros(moe.experts, 2 * moe.ffn)) if moe.expert_bias else None
        self.down_bias = nn.Parameter(torch.zeros(moe.experts, config.hidden)) if moe.expert_bias else None
        self.selection_bias = nn.Parameter(torch.zeros(moe.experts), requires_grad=False) if moe.router.biased else None
        self.shared = FeedForward(config, moe.shared_ffn) if moe.shared_ffn else None
        self.shared_gate = nn.Linear(config.hidden, 1, bias=False) if moe.shared_gate else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output, shaped as ``x``, and its loss for balance, summed over the tokens."""
        flat = x.flatten(0, -2)
        routing = self.route(flat)
        out = self.mixed(flat, routing)
        if self.shared is not None:
            extra = self.shared(flat)
            out = out + (extra if self.shared_gate is None else extra * self.share(flat, self.shared_gate))
        assigned = F.one_hot(routing.experts.flatten(), self.experts).sum(0)
        if self.counts is not None:
            self.counts.add_(assigned)
        wanted = routing.probabilities.sum(0)
        load = assigned.to(wanted.dtype) / routing.experts.numel() if self.load is None else self.load
        return out.view_as(x), self.experts * (load * wanted).sum()

    def route(self, flat: Tensor) -> Routing:
        """Where the tokens [N, hidden] go."""
        logits = linear(flat, self.router.weight, self.router.bias)  # few rows at the rate of reading
        return self.policy.route(self.shaken(logits), self.selection_bias)

    def shaken(self, logits: Tensor) -> Tensor:
        """The router's ``logits`` [N, experts] in full precision, with the noise."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.noise is None:
            return logits
        own = len(logits) - len(self.noise)
        return torch.cat([logits[:own], logits[own:] + self.noise])

    def mixed(self, flat: Tensor, routing: Routing) -> Tensor:
        """What their experts make of the tokens [N, hidden], added up."""
        biases = None if self.gate_up_bias is None or self.down_bias is None else (self.gate_up_bias, self.down_bias)
        return mixed_experts(
            flat,
            routing.experts,
            routing.weights,
            _matrices(self.gate_up),
            _matrices(self.down),
            activation=self.activation,
            biases=biases,
            weigh_inputs=self.weigh_inputs,
        )

    def share(self, flat: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        """The weight of the shared expert for each token: [N, 1]."""
        return gate(flat).sigmoid()


def _matrices(experts: Tensor | QuantizedExperts) -> Tensor | PackedStack:
    """The matrices of experts: a parameter, or what stands in its place where they stay as they are stored."""
    return experts.stack() if isinstance(experts, QuantizedExperts) else experts


class Layer(nn.Module):
    """One transformer layer: attention and feed-forward, each added to what came in."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        before, after = config.norm_place != "after", config.norm_place in ("after", "both")
        self.parallel, self.residual_scale = config.norm_place == "parallel", config.residual_scale
        self.attention_norm = norm(config) if before else None
        self.attention = (
            Attention(config, layer) if config.latent is None else LatentAttention(config, config.latent, layer)
        )
        self.attended_norm = norm(config) if after else None
        self.mlp_norm = norm(config) if before and not self.parallel else None
        self.mlp: FeedForward | MixtureOfExperts
        if config.moe and config.sparse(layer):
            self.mlp = MixtureOfExperts(config, config.moe)
        else:
            self.mlp = FeedForward(config, config.ffn, config.mlp_bias)
        self.fed_norm = norm(config) if after else None

    def forward(self, x: Tensor, rotary: Turns, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        """The hidden states after the layer, and its loss for balance if it is sparse."""
        return self.finish(x, self.attend(x, rotary, context))

    def attend(self, x: Tensor, rotary: Turns, context: AttentionContext) -> Tensor:
        """What the attention of the layer finds, before it is projected: [*T, H * V]."""
        found: Tensor = self.attention(_normed(self.attention_norm, x), rotary, context)
        return found

    def finish(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rest of the layer, in which each token is alone."""
        found = self.scaled(_normed(self.attended_norm, self.attention.output(attended)))
        if self.parallel:
            # Computed once more, which is cheaper than to carry it along.
            fed = _normed(self.attention_norm, x)
            x = x + found
        else:
            x = x + found
            fed = _normed(self.mlp_norm, x)
        balance: Tensor | None = None
        if isinstance(self.mlp, MixtureOfExperts):
            out, balance = self.mlp(fed)
        else:
            out = self.mlp(fed)
        return x + self.scaled(_normed(self.fed_norm, out)), balance

    def scaled(self, block: Tensor) -> Tensor:
        """What a block adds to the residual stream."""
        return block if self.residual_scale == 1 else block * self.residual_scale


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


class Decoder(nn.Module):
    """A decoder-only transformer.

    Attributes:
        config: its shape.
        embedding: [vocabulary, hidden].
        layers: the layers, in order.
        norm: the last norm.
        head: [vocabulary, hidden]; the embedding itself where ``config.shares_head``; [1, hidden] of a reward model.
        superposed: rows of the pass that stand for several tokens, where there are some.
    """

    superposed: SuperposedRows | None = None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        if config.learned_positions:
            self.position_embedding = nn.Embedding(config.context, config.hidden)
        self.norm = norm(config)
        self.head = Linear(config.hidden, 1 if config.scalar_head else config.vocabulary, bias=False)
        if config.shares_head:
            self.head.weight = self.embedding.weight
        self.rotary = Rotaries(config, config.context)

    def forward(self, tokens: Tensor, context: AttentionContext) -> Output:
        """Hidden states of ``tokens`` (integers [*T]) under ``context``."""
        x, _, balance = self.through(self.layers, tokens, context)
        return Output(self.finish(x), balance)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the first layer takes in for ``tokens`` (integers [*T]) at ``positions``: [*T, hidden]."""
        x = self.embedded(tokens)
        if self.superposed is not None:
            x = self.superposed.put(x, self.embedded)
        if self.config.learned_positions:
            x = x + self.position_embedding(positions)
        return x

    def embedded(self, tokens: Tensor) -> Tensor:
        """What ``tokens`` (integers [*T]) are wherever they stand: [*T, hidden]."""
        x: Tensor = self.embedding(tokens)
        if self.config.embedding_scale != 1:
            # Rounded to the weights' dtype before it multiplies, as the models with such a scale were trained.
            x = x * x.new_full((), self.config.embedding_scale)
        return x

    def finish(self, x: Tensor) -> Tensor:
        """Hidden states [*T, hidden] after the last norm, scaled so that their products with the head's rows are the
        logits, from those after the last layer."""
        x = self.norm(x)
        return x if self.config.logits_scale == 1 or self.config.scalar_head else x * self.config.logits_scale

    def trunk(self, tokens: Tensor, context: AttentionContext, pieces: Pieces = EAGER) -> tuple[Tensor, ...]:
        """The forward pass up to the attention of the last layer, where tokens look at each other for the last time, in
        ``pieces``. :meth:`tip` goes on from there, with those tokens alone whose hidden states are wanted.

        Returns:
            The hidden states before the last layer [*T, hidden], and what its attention found [*T, config.attended].
        """
        return pieces.last(self, tokens, context)

    def tip(self, x: Tensor, attended: Tensor) -> Tensor:
        """Hidden states [*T, hidden], as of the forward pass, from what :meth:`trunk` gave for the same tokens."""
        return self.finish(cast(Layer, self.layers[-1]).finish(x, attended)[0])

    @property
    def present(self) -> list[Layer]:
        """The layers that are here, in their order: in a stage of a pipeline, not all of them are."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def through(
        self, layers: Iterable[nn.Module], tokens: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Turns, Tensor | None]:
        """Hidden states [*T, hidden] behind the ``layers``, which are the first ones, the turns of rotary positions,
        and the layers' loss for balance."""
        x = self.embed(tokens, context.positions)
        rotary = self.rotary(context.positions, x.dtype)
        balance: Tensor | None = None
        for layer in layers:
            x, extra = layer(x, rotary, context)
            if extra is not None:
                balance = extra if balance is None else balance + extra
        return x, rotary, balance

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token [*T, vocabulary] from hidden states [*T, hidden]."""
        scores: Tensor = self.head(hidden)
        cap = self.config.logits_cap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    @torch.no_grad()
    def give_scalar_head(self, seed: int) -> None:
        """Makes a reward model of this: in the place of its head comes one of one row, drawn as :meth:`initialize`
        does."""
        like = self.head.weight
        self.config = self.config.model_copy(update={"scalar_head": True})
        self.head = Linear(self.config.hidden, 1, bias=False, dtype=like.dtype, device=like.device)
        self.head.weight.copy_(self._drawn("head.weight", self.head.weight.shape, seed))

    @torch.no_grad()
    def enlarge(self, vocabulary: int) -> None:
        """Gives the model so many tokens, no fewer than it has: each new one begins with the mean of the vectors that
        are there, so that it is about as probable as the others are on average (Hewitt, 2021)."""
        self.config = self.config.model_copy(update={"vocabulary": vocabulary})
        self.embedding.weight, self.embedding.num_embeddings = _longer(self.embedding.weight, vocabulary), vocabulary
        if not self.config.scalar_head:
            shared = self.config.shares_head
            self.head.weight = self.embedding.weight if shared else _longer(self.head.weight, vocabulary)
            self.head.out_features = vocabulary

    def expect(self, context: int) -> None:
        """From now on texts have no more than ``context`` tokens, by which LongRoPE chooses its factors; other models
        do not change. What was kept of texts before is void."""
        if any(isinstance(rope.scaling, LongRopeScaling) for rope in self.config.ropes):
            self.rotary = Rotaries(self.config, context).to(next(self.parameters()).device)

    @property
    def like(self) -> Tensor:
        """A tensor on the model's device, in the dtype that it computes in, whatever its matrices are stored in."""
        return next(self.parameters())

    def parameter_count(self) -> int:
        """Number of parameters, a tied matrix counted once, and those of matrices that stay quantized."""
        stored = sum(each.in_features * each.out_features for _, each in packed_layers(self))
        return stored + sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def initialize(self, seed: int) -> Decoder:
        """Fills the weights: normal with ``config.init_std``, projections into the residual stream smaller by
        sqrt(2 layers) (GPT-2's rule), norms one and biases zero. Each tensor depends on the seed and its own name only.
        """
        for name, parameter in self.named_parameters():
            self.initialize_one(name, parameter, seed)
        return self

    @torch.no_grad()
    def initialize_one(self, name: str, weight: Tensor, seed: int) -> None:
        """Fills ``weight`` as :meth:`initialize` fills the parameter of that name."""
        if name.endswith("norm.weight"):
            weight.fill_(0.0 if self.config.norm == "rms_offset" else 1.0)
        elif weight.dim() == 1:
            weight.zero_()
        else:
            weight.copy_(self._drawn(name, weight.shape, seed))

    def _drawn(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """The initial values of a matrix."""
        std = self.config.init_std
        if name.endswith(("attention.output.weight", "down.weight", "mlp.down")):
            std /= math.sqrt(2 * self.config.layers)
        return std * torch.randn(shape, generator=torch_generator(seed, f"init/{name}"))


def _longer(matrix: Tensor, rows: int) -> nn.Parameter:
    """A matrix of so many rows, the new ones the mean of the others."""
    mean = matrix.to(torch.promote_types(matrix.dtype, torch.float32)).mean(0, keepdim=True)
    return nn.Parameter(torch.cat([matrix, mean.to(matrix).expand(rows - len(matrix), -1)]))
