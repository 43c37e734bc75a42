"""Text in and out of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from penstock.models.decoder import Decoder
from penstock.models.generate import generate
from penstock.models.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stream_text(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    stop: frozenset[int] | None = None,
) -> Iterator[str]:
    """What follows ``prompt``, in pieces of whole characters, until the model ends its text.

    Together the pieces are the decoded text; only its last can hold a character that the model left unfinished.

    Args:
        stop: the tokens that end a text; the tokenizer's own if not given.

    Raises:
        UsageError: the prompt is empty, or does not fit the model's context.
    """
    tokens = tokenizer(prompt)["input_ids"]
    if stop is None:
        stop = frozenset({tokenizer.eos_token_id} - {None})
    return _pieces(TextStream(tokenizer.backend_tokenizer, tokens), generate(model, tokens, sampling, stop))


def _pieces(text: TextStream, following: Iterator[int]) -> Iterator[str]:
    for token in following:
        piece = text.push([token])
        if piece:
            yield piece
    rest = text.end()
    if rest:
        yield rest


class TextStream:
    """The text of tokens that come one after another, in pieces of whole characters, up to a stop string.

    Args:
        tokenizer: of the model.
        prompt: the tokens before: the left context that some tokenizers need for the first character.
        stop: strings that end the text; none of them is part of it.
        least: tokens that come before a stop string may end the text: one that is there with them is text like any.

    Attributes:
        stopped: the stop string that ended the text, None before.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = (), least: int = 0) -> None:
        # The stream holds back a token until its bytes make whole characters.
        self._tokenizer, self._stream = tokenizer, DecodeStream(ids=list(prompt), skip_special_tokens=True)
        self._tokens, self._length = list(prompt), len(tokenizer.decode(list(prompt)))
        self._stop, self._early = tuple(stop), least
        self._held = ""
        self.stopped: str | None = None

    def push(self, tokens: Iterable[int]) -> str:
        """The text that ``tokens`` add. What could be the beginning of a stop string is held back."""
        shown = []
        for token in tokens:
            self._tokens.append(token)
            self._early -= 1
            piece = self._stream.step(self._tokenizer, token)
            if piece:
                self._length += len(piece)
                shown.append(self._show(piece))
        return "".join(shown)

    def end(self) -> str:
        """The rest of the text; its last character may be one that the model left unfinished."""
        if self.stopped is not None:
            return ""
        shown = self._show(self._tokenizer.decode(self._tokens)[self._length :])
        rest, self._held = self._held, ""
        return shown + rest

    def _show(self, fresh: str) -> str:
        if self.stopped is not None:
            return ""
        text, before = self._held + fresh, len(self._held)
        # One that is whole in what was held came too early.
        places = {stop: text.find(stop, max(before - len(stop) + 1, 0)) for stop in self._stop}
        found = [(place, stop) for stop, place in places.items() if place >= 0]
        if found and self._early < 0:
            place, self.stopped = min(found)
            self._held = ""
            return text[:place]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
