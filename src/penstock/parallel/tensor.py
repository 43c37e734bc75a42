"""Tensor parallelism: ranks that have a share of a model each compute together what the whole would.

What a token is stands on all ranks alike; what heads, feed-forward blocks and rows of the vocabulary make of it is
divided. So an attention and a feed-forward block end with one sum over the ranks, the embedding is such a sum, and the
scores of the tokens are gathered. All ranks have the same bits after each of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.library import Library, register_fake

from penstock.core.errors import PenstockError
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Attention, Decoder, Layer
from penstock.models.quantized import QuantizedEmbedding
from penstock.models.shares import Share

_library = Library("penstock", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("sum_of_ranks(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("gathered_from_ranks(Tensor x, int ranks) -> Tensor")  # type: ignore[no-untyped-call]


class ExchangeError(PenstockError):
    """An exchange with the other ranks failed: one of them is lost."""


@contextlib.contextmanager
def exchanging() -> Iterator[None]:
    """Within the block tensors are exchanged with other ranks.

    Raises:
        ExchangeError: a rank is lost.
    """
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL raise nothing narrower
        raise ExchangeError(f"an exchange with the other ranks failed: {str(error).splitlines()[0]}") from error


def sum_of_ranks(x: Tensor) -> Tensor:
    """The sum over all ranks of the process group, each of which gives an ``x`` of the same shape.

    To torch.compile it is one operator, and it can be captured in CUDA graphs. There are no gradients.

    Raises:
        ExchangeError: a rank is lost.
    """
    total: Tensor = torch.ops.penstock.sum_of_ranks(x)
    return total


def gathered_from_ranks(x: Tensor, ranks: int) -> Tensor:
    """What each of the ``ranks`` has given for ``x``, in their order: [ranks, *x.shape].

    Raises:
        ExchangeError: a rank is lost.
    """
    pieces: Tensor = torch.ops.penstock.gathered_from_ranks(x, ranks)
    return pieces


def _sum(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    with exchanging():
        dist.all_reduce(total)
    return total


def _gather(x: Tensor, ranks: int) -> Tensor:
    pieces = x.new_empty(ranks, *x.shape)
    with exchanging():
        dist.all_gather(list(pieces.unbind()), x.contiguous())
    return pieces


for _device in ("CPU", "CUDA"):
    _library.impl("sum_of_ranks", _sum, _device)  # type: ignore[no-untyped-call]
    _library.impl("gathered_from_ranks", _gather, _device)  # type: ignore[no-untyped-call]
register_fake("penstock::sum_of_ranks", lambda x: x.new_empty(x.shape), lib=_library)
register_fake("penstock::gathered_from_ranks", lambda x, ranks: x.new_empty(ranks, *x.shape), lib=_library)


class VocabularyEmbedding(nn.Embedding):
    """Rows of an embedding from ``first`` on; the other ranks have the others."""

    first: int

    def forward(self, tokens: Tensor) -> Tensor:
        return _looked_up(super().forward, tokens, self.first, self.num_embeddings)


class PackedVocabularyEmbedding(QuantizedEmbedding):
    """The same of an embedding that stays as it is stored."""

    first: int

    def forward(self, tokens: Tensor) -> Tensor:
        return _looked_up(super().forward, tokens, self.first, self.num_embeddings)


def _looked_up(rows: Callable[[Tensor], Tensor], tokens: Tensor, first: int, count: int) -> Tensor:
    """The rows of ``tokens``, of which this rank has ``count`` from its ``first`` on, looked up by ``rows``."""
    places = tokens - first
    elsewhere = (places < 0) | (places >= count)
    x = rows(places.masked_fill(elsewhere, 0))
    return sum_of_ranks(x.masked_fill(elsewhere.unsqueeze(-1), 0))


class WidelyNormedAttention(Attention):
    """Attention whose queries and keys are normed over the heads of all ``ranks``."""

    ranks: int

    def norm_widths(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(query.dtype, torch.float32)
        flat = [each.flatten(-2).to(wide) for each in (query, key)]
        sums = self.sum_of_squares(torch.stack([each.square().sum(-1) for each in flat], -1))
        normed = []
        for each, norm, total in zip(flat, (self.query_norm, self.key_norm), sums.unbind(-1), strict=True):
            # Key heads that several ranks have are in the sum as often as they are counted here.
            mean = total / (each.shape[-1] * self.ranks)
            scaled = each * torch.rsqrt(mean + norm.eps).unsqueeze(-1) * norm.scale.to(wide)
            normed.append(scaled.to(query.dtype).view(*each.shape[:-1], -1, self.head_dim))
        return normed[0], normed[1]

    def sum_of_squares(self, own: Tensor) -> Tensor:
        """The sum over all ranks of what each has of its ``own``."""
        return sum_of_ranks(own)


def join(model: Decoder, whole: DecoderConfig, share: Share) -> Decoder:
    """Makes ``model``, the ``share`` of one of the shape ``whole``, compute hidden states and logits together with the
    models of the other ranks, which are called with the same tokens at the same time. Returns the model itself, whose
    shape has the whole vocabulary from now on."""
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.attention.output.register_forward_hook(_summed)
        layer.mlp.register_forward_hook(_summed)
        if isinstance(layer.attention, Attention) and layer.attention.norms == "width":
            layer.attention.__class__ = WidelyNormedAttention
            vars(layer.attention)["ranks"] = share.size
    packed = isinstance(model.embedding, QuantizedEmbedding)
    kind: Any = PackedVocabularyEmbedding if packed else VocabularyEmbedding
    model.embedding.__class__ = kind
    vars(model.embedding)["first"], _ = share.of(whole.vocabulary, model.config.vocabulary)
    model.head.register_forward_hook(lambda _, __, scores: _all_scores(scores, share.size, whole.vocabulary))
    model.config = model.config.model_copy(update={"vocabulary": whole.vocabulary})
    return model


def _summed(block: nn.Module, inputs: Any, output: Any) -> Any:
    """The output of a ``block`` of all ranks; that of a mixture of experts has its loss for balance beside it."""
    if isinstance(output, tuple):
        return sum_of_ranks(output[0]), *output[1:]
    return sum_of_ranks(output)


def _all_scores(own: Tensor, ranks: int, vocabulary: int) -> Tensor:
    """The scores [*T, vocabulary], of which each rank has its ``own``."""
    size = own.shape[-1]
    pieces = gathered_from_ranks(own, ranks)
    return torch.cat([piece[..., : vocabulary - size * rank] for rank, piece in enumerate(pieces)], -1)
