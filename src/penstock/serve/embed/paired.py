"""Models that read a pair of texts at once, cross-encoders and decoders with a scalar head: tokens in, a number out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from penstock.core.errors import ModelError
from penstock.core.files import read_json
from penstock.models import hub
from penstock.models.encoders.encoder import Texts
from penstock.models.encoders.folder import CONFIG, load_classifier
from penstock.serve.embed.pooled import decoder_states, longest

#: The numbers [n] of texts of these lengths, whose flat tokens [N] are given, and where the second of each begins.
Numbers = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]


@dataclasses.dataclass(frozen=True)
class PairModel:
    """A model that says of a pair of texts how near they are.

    Attributes:
        numbers: the model itself.
        context: most tokens of a pair.
        vocabulary: how many tokens there are.
        sigmoid: its numbers are the logits of scores.
        device: where the model computes.
        weights: bytes of its weights.
        size: numbers of a pair.
    """

    numbers: Numbers
    context: int
    vocabulary: int
    sigmoid: bool
    device: torch.device
    weights: int
    size: int = 1

    @torch.inference_mode()
    def __call__(self, texts: Sequence[Sequence[int]], seconds: Sequence[int]) -> Tensor:
        """A number float32 [n, 1] for each of the pairs ``texts``, on the CPU, computed at once; the second text of
        each begins with its token number ``seconds``."""
        flat = torch.tensor([token for text in texts for token in text], device=self.device)
        found = self.numbers(flat, [len(text) for text in texts], seconds)
        return found.unsqueeze(-1).float().cpu()


def paired_encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> PairModel:
    """The cross-encoder in ``folder``.

    Raises:
        ModelError: the folder is damaged, or asks for what is not supported.
    """
    classifier = load_classifier(folder, device, dtype)
    shape = classifier.encoder.config
    context = min(shape.context, longest(folder))
    weights = sum(each.nbytes for each in classifier.parameters())

    def numbers(flat: Tensor, lengths: Sequence[int], seconds: Sequence[int]) -> Tensor:
        found: Tensor = classifier(flat, Texts(lengths, device, seconds))
        return found

    return PairModel(numbers, context, shape.vocabulary, _sigmoid(folder), device, weights)


def paired_decoder(folder: Path, device: torch.device, dtype: torch.dtype) -> PairModel:
    """The decoder in ``folder`` with a head of one row (``...ForSequenceClassification`` with one label), which reads
    the last token of a pair.

    Raises:
        ModelError: the folder is damaged, or asks for what is not supported.
    """
    decoder = hub.load_for_inference(folder, device=device, dtype=dtype).eval()
    shape, states = decoder.config, decoder_states(decoder)
    weights = sum(each.nbytes for each in decoder.parameters())

    def numbers(flat: Tensor, lengths: Sequence[int], _: Sequence[int]) -> Tensor:
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        found: Tensor = decoder.head(states(flat, lengths)[ends]).squeeze(-1)
        return found

    context = min(shape.context, longest(folder))
    return PairModel(numbers, context, shape.vocabulary, _sigmoid(folder), device, weights)


def _sigmoid(folder: Path) -> bool:
    """Whether scores are sigmoids of the model's numbers, as sentence-transformers has them unless the folder names
    another function: the numbers as they are.

    Raises:
        ModelError: it names a third one.
    """
    told = read_json(folder / CONFIG)
    own = told.get("sentence_transformers")
    named = own.get("activation_fn") if isinstance(own, dict) else None
    named = str(named or told.get("sbert_ce_default_activation_function") or "Sigmoid").rpartition(".")[2]
    if named not in ("Sigmoid", "Identity"):
        raise ModelError(f"{folder / CONFIG} asks for the activation {named!r}", hint="Sigmoid and Identity are known.")
    return named == "Sigmoid"
