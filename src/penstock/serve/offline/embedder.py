"""Vectors of texts, by encoders and by decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.core.devices import pick
from penstock.core.errors import UsageError
from penstock.core.files import read_json
from penstock.core.progress import Reporter, show
from penstock.models import hub
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.models.encoders.encoder import Encoder, Texts
from penstock.models.encoders.folder import is_encoder, load_encoder
from penstock.models.encoders.pooling import Pooling, normalized, pooling_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: How decoders are pooled unless something else is said.
LAST = Pooling(way="last")

#: Tokens that are computed at a time, but for a text that has more alone.
TOKENS = 8192

#: The file in which sentence-transformers says how long a text may be.
LENGTHS = "sentence_bert_config.json"

#: The hidden states [N, hidden] of texts of these lengths, whose flat tokens [N] are given.
States = Callable[[Tensor, Sequence[int]], Tensor]


class Embedder:
    """Makes vectors of texts::

        embedder = open_embedder("BAAI/bge-small-en-v1.5")
        vectors = embedder.embed(["a cat", "a dog"])  # float32 [2, 384]

    Args:
        states: the model.
        tokenizer: of the model.
        context: most tokens of a text.
        size: numbers of a vector.
        pooling: from hidden states to a vector.
        device: where the model computes.
    """

    def __init__(
        self,
        states: States,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        size: int,
        pooling: Pooling,
        device: torch.device,
    ) -> None:
        self._states, self._device = states, device
        self.tokenizer, self.context, self.size, self.pooling = tokenizer, context, size, pooling

    def encode(self, text: str | Sequence[int], truncate: bool = False) -> list[int]:
        """The tokens of a text, with those that the model wants around it; what is tokens already stays so.

        Raises:
            UsageError: it is empty, or has more tokens than the model reads, and is not to be truncated.
        """
        if isinstance(text, str):
            longest = self.context if truncate else None
            tokens: list[int] = self.tokenizer(text, truncation=truncate, max_length=longest)["input_ids"]
        else:
            tokens = list(text[: self.context] if truncate else text)
            unknown = [token for token in tokens if not 0 <= token < len(self.tokenizer)]
            if unknown:
                raise UsageError(f"token {unknown[0]} is outside of the vocabulary of {len(self.tokenizer)}")
        if not tokens:
            raise UsageError("the text is empty: there is nothing to make a vector of")
        if len(tokens) > self.context:
            raise UsageError(
                f"the text has {len(tokens)} tokens, and the model reads {self.context}",
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
        if dimensions is not None and not 1 <= dimensions <= self.size:
            raise UsageError(f"the model's vectors have {self.size} numbers, so dimensions cannot be {dimensions}")
        tokens = [self.encode(text, truncate) for text in given]
        found = torch.zeros(len(tokens), self.size)
        order = sorted(range(len(tokens)), key=lambda place: -len(tokens[place]))
        with progress("embedding", len(order), "text") as bar:
            while order:
                # The longest come first; those of one length are neighbours.
                count, total = 1, len(tokens[order[0]])
                while count < len(order) and total + len(tokens[order[count]]) <= TOKENS:
                    total += len(tokens[order[count]])
                    count += 1
                own, order = order[:count], order[count:]
                found[own] = self._pass([tokens[place] for place in own])
                for _ in own:
                    bar.advance()
        if dimensions is None:
            return found
        return normalized(found[:, :dimensions]) if self.pooling.normalize else found[:, :dimensions].contiguous()

    def score(self, queries: str | Sequence[str], texts: str | Sequence[str], *, progress: Reporter = show) -> Tensor:
        """How near texts are to queries: the cosines float32 [queries, texts] of their vectors."""
        one, other = (normalized(self.embed(each, progress=progress)) for each in (queries, texts))
        return one @ other.T

    @torch.inference_mode()
    def _pass(self, texts: Sequence[Sequence[int]]) -> Tensor:
        lengths = [len(text) for text in texts]
        flat = torch.tensor([token for text in texts for token in text], device=self._device)
        hidden = torch.split(self._states(flat, lengths), lengths)
        return torch.stack([self.pooling(each) for each in hidden]).float().cpu()


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
        encoder = load_encoder(folder, where, torch.float32)
        context, size = min(encoder.config.context, _longest(folder)), encoder.config.hidden
        chosen = pooling or pooling_of(folder, Pooling())
        return Embedder(encoder_states(encoder), tokenizer, context, size, chosen, where)
    decoder = hub.load_for_inference(folder, device=where, dtype=torch.float32).eval()
    return decoder_embedder(decoder, tokenizer, pooling or pooling_of(folder, LAST))


def decoder_embedder(decoder: Decoder, tokenizer: PreTrainedTokenizerBase, pooling: Pooling) -> Embedder:
    """An embedder around a decoder."""
    shape, where = decoder.config, decoder.embedding.weight.device
    return Embedder(decoder_states(decoder), tokenizer, shape.context, shape.hidden, pooling, where)


def encoder_states(encoder: Encoder) -> States:
    """The hidden states of an encoder."""

    def states(flat: Tensor, lengths: Sequence[int]) -> Tensor:
        found: Tensor = encoder(flat, Texts(lengths, flat.device))
        return found

    return states


def decoder_states(decoder: Decoder) -> States:
    """The hidden states of a decoder after its last norm."""

    def states(flat: Tensor, lengths: Sequence[int]) -> Tensor:
        rows = [
            decoder(text.unsqueeze(0), CausalRows.of(len(text), flat.device)).hidden[0]
            for text in torch.split(flat, list(lengths))
        ]
        return torch.cat(rows)

    return states


def _longest(folder: Path) -> int:
    """The most tokens of a text that sentence-transformers' settings allow."""
    path = folder / LENGTHS
    told = read_json(path) if path.is_file() else {}
    most = told.get("max_seq_length") if isinstance(told, dict) else None
    return most if isinstance(most, int) and most > 0 else 1 << 62
