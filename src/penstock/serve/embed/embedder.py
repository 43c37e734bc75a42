"""Texts in, vectors out, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.core.devices import pick
from penstock.core.errors import UsageError
from penstock.core.progress import Reporter, show
from penstock.models import hub
from penstock.models.encoders.folder import is_encoder
from penstock.models.encoders.pooling import Pooling, normalized, pooling_of
from penstock.serve.embed.pooled import LAST, PooledModel, pooled_decoder, pooled_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokens that are computed at a time, but for a text that has more alone.
TOKENS = 8192


class Embedder:
    """Makes vectors of texts::

        embedder = open_embedder("BAAI/bge-small-en-v1.5")
        vectors = embedder.embed(["a cat", "a dog"])  # float32 [2, 384]

    Args:
        model: makes vectors of tokens.
        tokenizer: of the model.
    """

    def __init__(self, model: PooledModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def encode(self, text: str | Sequence[int], truncate: bool = False) -> list[int]:
        """The tokens of a text, with those that the model wants around it; what is tokens already stays so.

        Raises:
            UsageError: it is empty, or has more tokens than the model reads, and is not to be truncated.
        """
        context = self.model.context
        if isinstance(text, str):
            longest = context if truncate else None
            tokens: list[int] = self.tokenizer(text, truncation=truncate, max_length=longest)["input_ids"]
        else:
            tokens = list(text[:context] if truncate else text)
            unknown = [token for token in tokens if not 0 <= token < self.model.vocabulary]
            if unknown:
                raise UsageError(f"token {unknown[0]} is outside of the vocabulary of {self.model.vocabulary}")
        if not tokens:
            raise UsageError("the text is empty: there is nothing to make a vector of")
        if len(tokens) > context:
            raise UsageError(
                f"the text has {len(tokens)} tokens, and the model reads {context}",
                hint="Cut it into pieces, or have it truncated.",
            )
        return tokens

    def embed(
        self,
        texts: str | Sequence[str | Sequence[int]],
        *,
        dimensions: int | None = None,
        truncate: bool = False,
        progress: Reporter = show,
    ) -> Tensor:
        """The vectors float32 [n, size] of ``texts``, on the CPU.

        Args:
            dimensions: so many of the first numbers of each vector alone, for models that were trained for it
                (Matryoshka); where vectors have the length 1, so have these.
            truncate: what a text has beyond the model's context is not read; else it is refused.
            progress: how to report; ``core.progress.silent`` is quiet.

        Raises:
            UsageError: a text is empty or too long, or ``dimensions`` out of range. Nothing is computed then.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        size, pooling = self.model.size, self.model.pooling
        if dimensions is not None and not 1 <= dimensions <= size:
            raise UsageError(f"the model's vectors have {size} numbers, so dimensions cannot be {dimensions}")
        tokens = [self.encode(text, truncate) for text in given]
        found = torch.zeros(len(tokens), size)
        order = sorted(range(len(tokens)), key=lambda place: -len(tokens[place]))
        with progress("embedding", len(order), "text") as bar:
            while order:
                # The longest come first; those of one length are neighbours.
                count, total = 1, len(tokens[order[0]])
                while count < len(order) and total + len(tokens[order[count]]) <= TOKENS:
                    total += len(tokens[order[count]])
                    count += 1
                own, order = order[:count], order[count:]
                found[own] = self.model([tokens[place] for place in own])
                for _ in own:
                    bar.advance()
        return found if dimensions is None else shortened(found, dimensions, pooling.normalize)

    def score(self, queries: str | Sequence[str], texts: str | Sequence[str], *, progress: Reporter = show) -> Tensor:
        """How near texts are to queries: the cosines float32 [queries, texts] of their vectors."""
        one, other = (normalized(self.embed(each, progress=progress)) for each in (queries, texts))
        return one @ other.T


def shortened(vectors: Tensor, dimensions: int, normalize: bool) -> Tensor:
    """The first ``dimensions`` numbers of ``vectors`` [N, D], which have the length 1 again where they are to."""
    return normalized(vectors[:, :dimensions]) if normalize else vectors[:, :dimensions].contiguous()


def open_embedder(model: str | Path, *, device: str = "auto", pooling: Pooling | None = None) -> Embedder:
    """An embedder for ``model``, whatever ``hub.resolve`` takes: an encoder or a decoder, in float32.

    Hidden states are pooled and normalised as ``pooling`` says, or as the folder does, in the manner of
    sentence-transformers; else an encoder gives the mean of a text's hidden states, a decoder the last one, and both
    the length 1.

    Raises:
        PenstockError: the model cannot be had, or is damaged.
    """
    folder, where = hub.resolve(model), pick(device)
    tokenizer = hub.load_tokenizer(folder)
    if is_encoder(folder):
        return Embedder(pooled_encoder(folder, where, torch.float32, pooling), tokenizer)
    decoder = hub.load_for_inference(folder, device=where, dtype=torch.float32).eval()
    return Embedder(pooled_decoder(decoder, pooling or pooling_of(folder, LAST)), tokenizer)
