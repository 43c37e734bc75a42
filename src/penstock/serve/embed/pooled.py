"""Models whose hidden states are pooled: tokens in, vectors out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from penstock.core.files import read_json
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.models.encoders.encoder import Encoder, Texts
from penstock.models.encoders.folder import load_encoder
from penstock.models.encoders.pooling import Pooling, pooling_of

#: How decoders are pooled unless something else is said.
LAST = Pooling(way="last")

#: The file in which sentence-transformers says how long a text may be.
LENGTHS = "sentence_bert_config.json"

#: Texts that are shorter than this share of the longest beside them are computed apart, not filled up to its length.
ALIKE = 0.75

#: The hidden states [N, hidden] of texts of these lengths, whose flat tokens [N] are given.
States = Callable[[Tensor, Sequence[int]], Tensor]


@dataclasses.dataclass(frozen=True)
class PooledModel:
    """A model that makes vectors of texts.

    Attributes:
        states: the model itself.
        context: most tokens of a text.
        vocabulary: how many tokens there are.
        size: numbers of a vector.
        pooling: from hidden states to a vector.
        device: where the model computes.
        weights: bytes of its weights.
    """

    states: States
    context: int
    vocabulary: int
    size: int
    pooling: Pooling
    device: torch.device
    weights: int

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The vectors float32 [n, size] of ``texts``, on the CPU, computed at once."""
        lengths = [len(text) for text in texts]
        flat = torch.tensor([token for text in texts for token in text], device=self.device)
        hidden = torch.split(self.states(flat, lengths), lengths)
        return torch.stack([self.pooling(each) for each in hidden]).float().cpu()


def pooled_encoder(folder: Path, device: torch.device, dtype: torch.dtype, pooling: Pooling | None) -> PooledModel:
    """The encoder in ``folder``, which says how it is pooled unless that is given.

    Raises:
        ModelError: the folder is damaged, or asks for what is not supported.
    """
    encoder = load_encoder(folder, device, dtype)
    shape = encoder.config
    chosen = pooling or pooling_of(folder, Pooling())
    context = min(shape.context, longest(folder))
    weights = sum(each.nbytes for each in encoder.parameters())
    return PooledModel(encoder_states(encoder), context, shape.vocabulary, shape.hidden, chosen, device, weights)


def pooled_decoder(decoder: Decoder, pooling: Pooling) -> PooledModel:
    """A decoder that makes vectors of its hidden states after the last norm."""
    shape, device = decoder.config, decoder.like.device
    weights = sum(each.nbytes for each in decoder.parameters())
    return PooledModel(decoder_states(decoder), shape.context, shape.vocabulary, shape.hidden, pooling, device, weights)


def encoder_states(encoder: Encoder) -> States:
    """The hidden states of an encoder."""

    def states(flat: Tensor, lengths: Sequence[int]) -> Tensor:
        found: Tensor = encoder(flat, Texts(lengths, flat.device))
        return found

    return states


def decoder_states(decoder: Decoder) -> States:
    """The hidden states of a decoder after its last norm. Texts of about one length are rows of one pass, the shorter
    ones filled up at their ends, which their own tokens do not see."""

    def states(flat: Tensor, lengths: Sequence[int]) -> Tensor:
        texts, found = torch.split(flat, list(lengths)), dict[int, Tensor]()
        for group in _alike(lengths):
            rows = pad_sequence([texts[place] for place in group], batch_first=True)
            hidden = decoder(rows, CausalRows.of(rows.shape[1], rows.device)).hidden
            found |= {place: row[: lengths[place]] for place, row in zip(group, hidden, strict=True)}
        return torch.cat([found[place] for place in range(len(texts))])

    return states


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The places of texts in groups of about one length, the longest first."""
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if group and lengths[place] < ALIKE * lengths[group[0]]:
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def longest(folder: Path) -> int:
    """The most tokens of a text that sentence-transformers' settings allow."""
    path = folder / LENGTHS
    told = read_json(path) if path.is_file() else {}
    most = told.get("max_seq_length") if isinstance(told, dict) else None
    return most if isinstance(most, int) and most > 0 else 1 << 62
