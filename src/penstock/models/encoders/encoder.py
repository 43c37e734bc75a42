"""The Encoder: a transformer in which every token of a text sees the others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.models.config import RopeConfig
from penstock.models.encoders.config import EncoderConfig
from penstock.models.linear import Linear
from penstock.models.norms import LayerNorm
from penstock.models.rotary import Rotary
from penstock.ops.activations import ACTIVATIONS, gated
from penstock.ops.attention import attend_rows
from penstock.ops.rotary import rotate

#: Cosines and sines of the tokens, for layers that see all and for those that see a window.
Turns = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None


class Texts:
    """Several texts in a row, as flat tokens.

    Args:
        lengths: of each, at least one token.
        device: of the tokens.
        seconds: where texts are pairs, the number of the token with which the second part of each begins.

    Attributes:
        lengths: of each.
        positions: int64 [N], of each token in its text.
        kinds: int64 [N], 1 for the tokens of second parts; None where texts are no pairs.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, seconds: Sequence[int] | None = None) -> None:
        self.lengths = list(lengths)
        self.positions = torch.cat([torch.arange(length, device=device) for length in self.lengths])
        self.kinds: Tensor | None = None
        if seconds is not None:
            begins = torch.tensor(seconds, device=device).repeat_interleave(torch.tensor(self.lengths, device=device))
            self.kinds = (self.positions >= begins).long()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of tokens [N, H, D] within their texts; with a ``window``, up to this distance. Neighbours of one
        length are computed together."""
        found, start = [], 0
        for length, group in itertools.groupby(self.lengths):
            count = len(list(group))
            rows = slice(start, start := start + count * length)
            own = [each[rows].view(count, length, *each.shape[1:]) for each in (query, key, value)]
            places = torch.arange(length, device=query.device)
            near = None if window is None else (places - places.unsqueeze(-1)).abs() <= window
            found.append(attend_rows(*own, scale=scale, mask=near).flatten(0, 1))
        return torch.cat(found)


class EncoderLayer(nn.Module):
    """Attention and feed-forward block, each added to what came in."""

    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__()
        self._heads, self._pre_norm = config.heads, config.pre_norm
        self._window = config.window if layer in config.windowed else None
        self.qkv = Linear(config.hidden, 3 * config.hidden, bias=config.attention_bias)
        self.output = Linear(config.hidden, config.hidden, bias=config.attention_bias)
        self.gate_up = Linear(config.hidden, (2 if config.gated else 1) * config.ffn, bias=config.mlp_bias)
        self.down = Linear(config.ffn, config.hidden, bias=config.mlp_bias)
        # Where norms stand before the blocks, the first one is the embedding's.
        bare = config.pre_norm and layer == 0
        self.attention_norm = None if bare else LayerNorm(config.hidden, config.norm_eps, config.norm_bias)
        self.mlp_norm = LayerNorm(config.hidden, config.norm_eps, config.norm_bias)
        self._activation = gated(config.activation) if config.gated else ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, texts: Texts, turns: Turns) -> Tensor:
        """The hidden states [N, hidden] after the layer."""
        if self._pre_norm:
            x = x + self._attended(x if self.attention_norm is None else self.attention_norm(x), texts, turns)
            fed: Tensor = self.down(self._activation(self.gate_up(self.mlp_norm(x))))
            return x + fed
        assert self.attention_norm is not None
        x = self.attention_norm(x + self._attended(x, texts, turns))
        found: Tensor = self.mlp_norm(x + self.down(self._activation(self.gate_up(x))))
        return found

    def _attended(self, x: Tensor, texts: Texts, turns: Turns) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self._heads, -1)).unbind(-3)
        if turns is not None:
            cos, sin = turns[self._window is not None]
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        found = texts.attend(query, key, value, query.shape[-1] ** -0.5, self._window)
        projected: Tensor = self.output(found.flatten(-2))
        return projected


class Encoder(nn.Module):
    """An encoder-only transformer.

    Attributes:
        config: its shape.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.position_embedding = nn.Embedding(config.places, config.hidden) if config.places else None
        self.kind_embedding = nn.Embedding(config.kinds, config.hidden) if config.kinds else None
        self.embedding_norm = LayerNorm(config.hidden, config.norm_eps, config.norm_bias)
        self.layers = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.layers))
        self.norm = LayerNorm(config.hidden, config.norm_eps, config.norm_bias) if config.pre_norm else None
        head = config.hidden // config.heads
        self.rotary = nn.ModuleList(
            Rotary(RopeConfig(theta=theta), head, config.context) for theta in config.thetas or ()
        )

    def forward(self, tokens: Tensor, texts: Texts) -> Tensor:
        """The last hidden states [N, hidden] of ``tokens`` [N]."""
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(texts.positions + self.config.first_place)
        if self.kind_embedding is not None:
            kinds = self.kind_embedding.weight
            x = x + (kinds[0] if texts.kinds is None else kinds[texts.kinds.clamp(max=len(kinds) - 1)])
        x = self.embedding_norm(x)
        turns: Turns = None
        if len(self.rotary):
            everywhere, near = (rotary(texts.positions, x.dtype) for rotary in self.rotary)
            turns = everywhere, near
        for layer in self.layers:
            x = layer(x, texts, turns)
        last: Tensor = x if self.norm is None else self.norm(x)
        return last
