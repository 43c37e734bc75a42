"""Low-rank keys, landmarks, and values on the host."""

from __future__ import annotations

import bisect
import math
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, PrivateAttr, model_validator
from torch import Tensor
from torch.nn.functional import cosine_similarity

from penstock.core.errors import UsageError
from penstock.models.config import DecoderConfig
from penstock.models.rotary import rotations
from penstock.ops.paged.shadow import Shadow, ShadowKeys
from penstock.policy import policy
from penstock.serve.kv.policies.contract import Budget, Cached, CachePolicy, Kept, Repeated


@policy("kv.policy", "shadow", papers=[299])
class ShadowKV(Repeated):
    """Keeps low-rank keys and landmarks of chunks, moves values to the host's memory, and lets each step see the chunks
    whose landmarks it likes best.

    From the paper [299]: keys are of low rank before they are turned by their positions, and are kept as factors;
    values go to the host; landmarks say which chunks a step sees, whose keys are rebuilt and whose values are fetched;
    a few outlier chunks stay as they are. Of its code, from knowledge: one factorisation for all KV heads of a layer;
    the landmark of a chunk is the mean of its turned keys; the outliers are the chunks in which the least cosine
    similarity of a key to the landmark is the smallest, in each head; within a group of query heads, a chunk is worth
    what the head gives it that gives it the most, of the softmax over landmarks; the newest tokens stay whole. Ours:
    the factors come from the eigenvectors of the keys' Gram matrix; what is written stays whole, until packing all
    anew leaves ``every`` tokens fewer, by the keys that the cache has then (the paper packs the prompt alone).
    Not built: a kernel that rebuilds keys and attends to them at once, and fetching values while keys are rebuilt.

    What a layer takes is :meth:`~penstock.ops.paged.shadow.ShadowKeys.numbers`; nothing of it depends on the budget.

    Attributes:
        budget: what a step sees of the packed tokens: up to 1 a share, above it a number of tokens.
        rank: of the keys of a layer: up to 1 a share of the numbers of all its KV heads, above it a number.
        chunk: tokens of a chunk.
        outliers: chunks that stay as they are, in each KV head of each layer.
        recent: how many of the newest tokens are not packed.
    """

    every: PositiveInt = 1024
    budget: Budget = 0.1
    rank: Annotated[float, Field(gt=0)] = 0.16
    chunk: PositiveInt = 8
    outliers: NonNegativeInt = 8
    recent: PositiveInt = 32
    _view: ShadowKeys | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _whole(self) -> ShadowKV:
        if self.rank > 1 and self.rank != int(self.rank):
            raise ValueError(f"a rank of {self.rank} is neither a share nor a number")
        if self.every < self.chunk:
            raise ValueError(f"every is {self.every}, and a chunk has {self.chunk} tokens, which go at once")
        return self

    @property
    def view(self) -> ShadowKeys | None:
        return self._view

    def limit(self) -> CachePolicy:
        return self.model_copy(update={"budget": 1.0, "rank": 1.0})

    def fitted(self, model: DecoderConfig) -> CachePolicy:
        width = model.kv_heads * model.head_dim
        rank = min(math.ceil(self.rank * width) if self.rank <= 1 else int(self.rank), width)
        view = ShadowKeys(
            *(model.kv_heads, model.head_dim, rank, self.chunk, self.outliers, self.budget, rotations(model))
        )
        many = self.chunk * (self.outliers + 1)
        if view.numbers(many + self.chunk) - view.numbers(many) >= 2 * width * self.chunk:
            raise UsageError(
                f"shadow saves nothing with a rank of {rank} and a chunk of {self.chunk} tokens, where the keys of a "
                f"layer have {width} numbers",
                hint="Take a lower kv.rank, or a larger kv.chunk.",
            )
        fitted = self.model_copy()
        fitted._view = view
        return fitted

    def packed(self, computed: int) -> int:
        return max(0, computed - self.recent) // self.chunk * self.chunk

    def keeps(self, computed: int) -> int:
        packed = self.packed(computed)
        return self._fitted.places(packed) + computed - packed

    def due(self, prompt: int, computed: int, dropped: int) -> int | None:
        # A chunk more may free as many places at once: one too early, rather than beyond what is promised.
        wanted, view = self.every - self.chunk + 1 + dropped, self._fitted

        def saved(chunks: int) -> int:
            return chunks * self.chunk - view.places(chunks * self.chunk)

        chunks = bisect.bisect_left(range(1 << 32), wanted, key=saved)
        return max(computed + 1, prompt if self.whole_prompt else 0, self.recent + chunks * self.chunk)

    @property
    def _fitted(self) -> ShadowKeys:
        assert self._view is not None, "it is not fitted to a model"
        return self._view

    def compress(self, cached: Cached, count: int) -> Kept:
        view, packed = self._fitted, self.packed(cached.keys.shape[-2])
        laid = [
            view.lay(self.shadow(layer, keys[:, :packed], values[:, :packed]))
            for layer, (keys, values) in enumerate(zip(cached.keys, cached.values, strict=True))
        ]
        keys, values = (torch.stack(part) for part in zip(*laid, strict=True))
        rest = (each[..., packed:, :] for each in (cached.keys, cached.values))
        keys, values = (torch.cat(pair, -2) for pair in zip((keys, values), rest, strict=True))
        return Kept(keys, values, aside=cached.values[..., :packed, :])

    def shadow(self, layer: int, keys: Tensor, values: Tensor) -> Shadow:
        """What is left in ``layer`` of the first tokens of a text, whose ``keys`` and ``values`` are [K, n, D]."""
        view = self._fitted
        positions, rotation = torch.arange(keys.shape[1], device=keys.device), view.rotations[layer]
        plain = keys.float() if rotation is None else rotation.back(keys.float(), positions)
        factors, basis = factored(plain.transpose(0, 1).flatten(1), view.rank)
        landmarks, exact = self.marked(keys)
        heads, dim = len(keys), keys.shape[-1]
        odd_keys, odd_values = (self._chunks(each)[exact].view(heads, -1, dim) for each in (keys, values))
        others, basis = landmarks[~exact].view(heads, -1, dim), basis.view(view.rank, heads, dim)
        return Shadow(exact, others, odd_keys, odd_values, basis.to(keys.dtype), factors.to(keys.dtype))

    def marked(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The landmarks [K, C, D] of the chunks of ``keys`` [K, n, D], and which chunks stay as they are, bool [K, C].
        Of chunks with equal similarities, the earlier does."""
        chunks = self._chunks(keys.float())
        landmarks = chunks.mean(2)
        least = cosine_similarity(chunks, landmarks.unsqueeze(2), -1).amin(-1)
        odd = least.sort(dim=-1, stable=True).indices[:, : self.outliers]
        return landmarks.to(keys.dtype), torch.zeros_like(least, dtype=torch.bool).scatter(1, odd, True)

    def _chunks(self, vectors: Tensor) -> Tensor:
        """``vectors`` [K, n, D] of whole chunks as [K, C, chunk, D]."""
        return vectors.reshape(len(vectors), -1, self.chunk, vectors.shape[-1])


def factored(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product of rank ``rank`` to ``rows`` [n, d]: factors [n, rank] and an orthonormal basis [rank, d],
    float32. It is that of the singular value decomposition, by the eigenvectors of d times d numbers."""
    wide = rows.double()
    basis = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -rank:]
    return (wide @ basis).float(), basis.T.float()
