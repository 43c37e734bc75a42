"""The Decoder: one definition of the transformer language model that trains, serves, drafts and searches.

Tokens are flat: every module takes any leading token dimensions, and only the :class:`AttentionContext` passed in knows
which tokens belong together. Nothing here knows about devices, caches, packing or parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.core.randomness import torch_generator
from penstock.models.attention import AttentionContext
from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.rotary import Rotary
from penstock.models.routers.contract import Routing
from penstock.ops.experts import mixed_experts
from penstock.ops.linear import linear
from penstock.ops.rotary import rotate_heads


class Output(NamedTuple):
    """What a forward pass gives: ``hidden`` [*T, hidden] after the last norm, and the ``balance`` loss of the sparse
    layers, summed over them and over the tokens (None where there are none)."""

    hidden: Tensor
    balance: Tensor | None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Linear(nn.Linear):
    """A linear layer that multiplies few rows at the rate at which its weights can be read."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, and optional norms on queries and keys."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window = config.window_of(layer)
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        width = config.heads * config.head_dim
        self.qkv = Linear(config.hidden, width + 2 * config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.output = Linear(width, config.hidden, bias=config.output_bias)
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], context: AttentionContext) -> Tensor:
        """What tokens [*T, hidden] take from each other, [*T, H * D]; ``output`` brings it back to [*T, hidden]."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), -2)
        query, key = self.rotate(query, key, rotary)
        out = context.attend(self.layer, query, key, value, scale=self.head_dim**-0.5, window=self.window)
        return out.flatten(-2)

    def rotate(self, query: Tensor, key: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries [*T, H, D] and keys [*T, K, D], normed if the model norms them, turned by their positions."""
        scales, eps = None, 0.0
        if self.query_norm is not None and self.key_norm is not None:
            scales, eps = (self.query_norm.weight, self.key_norm.weight), self.query_norm.eps
        return rotate_heads(query, key, *rotary, scales, eps)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up as one matrix."""

    def __init__(self, hidden: int, ffn: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * ffn, bias=bias)
        self.down = Linear(ffn, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class MixtureOfExperts(nn.Module):
    """A router, its experts as stacked matrices, and an optional expert that sees every token.

    The loss for balance is that of Switch Transformers (Fedus et al., 2021): each token adds E sum_e f_e p_e, where p_e
    is how probable it finds expert e, and f_e the share of all assignments that e has got; 1 a token when the load is
    even. With f taken from the tokens at hand the loss of a batch would not be the sum of those of its parts, so
    whoever computes a batch in parts gives f in ``load``.

    Attributes:
        load: [experts], the f of the loss for balance; None takes it from the tokens of each pass.
        counts: int64 [experts], to which each pass adds its assignments; None counts nothing.
    """

    load: Tensor | None = None
    counts: Tensor | None = None

    def __init__(self, config: DecoderConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.policy = moe.router
        self.experts = moe.experts
        self.router = Linear(config.hidden, moe.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(moe.experts, 2 * moe.ffn, config.hidden))
        self.down = nn.Parameter(torch.empty(moe.experts, config.hidden, moe.ffn))
        self.selection_bias = nn.Parameter(torch.zeros(moe.experts), requires_grad=False) if moe.router.biased else None
        self.shared = FeedForward(config.hidden, moe.shared_ffn) if moe.shared_ffn else None
        self.shared_gate = Linear(config.hidden, 1, bias=False) if moe.shared_gate else None

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
        logits = self.router(flat)
        return self.policy.route(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.selection_bias)

    def mixed(self, flat: Tensor, routing: Routing) -> Tensor:
        """What their experts make of the tokens [N, hidden], added up."""
        return mixed_experts(flat, routing.experts, routing.weights, self.gate_up, self.down)

    def share(self, flat: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        """The weight of the shared expert for each token: [N, 1]."""
        return gate(flat).sigmoid()


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden, config.norm_eps)
        self.mlp: FeedForward | MixtureOfExperts
        if config.moe and config.sparse(layer):
            self.mlp = MixtureOfExperts(config, config.moe)
        else:
            self.mlp = FeedForward(config.hidden, config.ffn, config.mlp_bias)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], context: AttentionContext
    ) -> tuple[Tensor, Tensor | None]:
        """The hidden states after the layer, and its loss for balance if it is sparse."""
        return self.finish(x, self.attend(x, rotary, context))

    def attend(self, x: Tensor, rotary: tuple[Tensor, Tensor], context: AttentionContext) -> Tensor:
        """What the attention of the layer finds, before it is projected: [*T, H * D]."""
        found: Tensor = self.attention(self.attention_norm(x), rotary, context)
        return found

    def finish(self, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rest of the layer, in which each token is alone."""
        x = x + self.attention.output(attended)
        normed = self.mlp_norm(x)
        if isinstance(self.mlp, MixtureOfExperts):
            out, balance = self.mlp(normed)
            return x + out, balance
        return x + self.mlp(normed), None


class Decoder(nn.Module):
    """A decoder-only transformer.

    Attributes:
        config: its shape.
        embedding: [vocabulary, hidden].
        layers: the layers, in order.
        norm: the last norm.
        head: [vocabulary, hidden]; the embedding itself where ``config.tied``.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.head = Linear(config.hidden, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.rotary = Rotary(config)

    def forward(self, tokens: Tensor, context: AttentionContext) -> Output:
        """Hidden states of ``tokens`` (integers [*T]) under ``context``."""
        x, _, balance = self._through(self.layers, tokens, context)
        return Output(self.norm(x), balance)

    def trunk(self, tokens: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """The forward pass up to the attention of the last layer, where tokens look at each other for the last time.
        :meth:`tip` goes on from there, with those tokens alone whose hidden states are wanted.

        Returns:
            The hidden states before the last layer [*T, hidden], and what its attention found [*T, heads * head_dim].
        """
        x, rotary, _ = self._through(self.layers[:-1], tokens, context)
        return x, self._last.attend(x, rotary, context)

    def tip(self, x: Tensor, attended: Tensor) -> Tensor:
        """Hidden states [*T, hidden], as of the forward pass, from what :meth:`trunk` gave for the same tokens."""
        return self.norm(self._last.finish(x, attended)[0])  # type: ignore[no-any-return]

    @property
    def _last(self) -> Layer:
        return cast(Layer, self.layers[-1])

    def _through(
        self, layers: Iterable[nn.Module], tokens: Tensor, context: AttentionContext
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        x = self.embedding(tokens)
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
        return scores

    def parameter_count(self) -> int:
        """Number of parameters, a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def initialize(self, seed: int) -> Decoder:
        """Fills the weights: normal with ``config.init_std``, projections into the residual stream smaller by
        sqrt(2 layers) (GPT-2's rule), norms one and biases zero. Each tensor depends on the seed and its own name only.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif parameter.dim() == 1:
                parameter.zero_()
            else:
                parameter.copy_(self._drawn(name, parameter.shape, seed))
        return self

    def _drawn(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """The initial values of a matrix."""
        std = self.config.init_std
        if name.endswith(("attention.output.weight", "down.weight", "mlp.down")):
            std /= math.sqrt(2 * self.config.layers)
        return std * torch.randn(shape, generator=torch_generator(seed, f"init/{name}"))
