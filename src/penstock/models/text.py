"""Text in and out of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from penstock.models.decoder import Decoder
from penstock.models.detokenizer import detokenizer
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
        shown: special tokens that are part of the text, and what they are written as; others are left out.

    Attributes:
        stopped: the stop string that ended the text, None before.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        least: int = 0,
        shown: Mapping[int, str] | None = None,
    ) -> None:
        self._detokenizer = detokenizer(tokenizer, prompt, shown)
        self._stop, self._early = tuple(stop), least
        self._settled = 0
        #: Text that is settled and not shown yet, and what was searched for stop strings, from the same place on.
        self._held = self._searched = ""
        self.stopped: str | None = None

    @property
    def position(self) -> int:
        """The length of the text so far, in characters: where that of the next token begins."""
        return self._settled + self._detokenizer.waiting

    def push(self, tokens: Iterable[int]) -> str:
        """The text that ``tokens`` add. What could be the beginning of a stop string is held back, and so is what a
        token to come may change (see :mod:`penstock.models.detokenizer`)."""
        shown = []
        for token in tokens:
            self._early -= 1
            shown.append(self._show(self._detokenizer.push(token), self._early < 0))
        return "".join(shown)

    def end(self) -> str:
        """The rest of the text; its last character may be one that the model left unfinished."""
        shown = self._show(self._detokenizer.end(), self._early < 0)
        rest, self._held = self._held, ""
        return shown + rest

    def _show(self, fresh: str, may_stop: bool) -> str:
        """What can be shown once ``fresh`` is settled."""
        self._settled += len(fresh)
        if self.stopped is not None:
            return ""
        settled = self._held + fresh
        if not self._stop:
            return settled
        text = settled + self._detokenizer.pending
        # A stop string that was there already came too early, unless what it was found in has changed.
        before = len(self._searched) if text.startswith(self._searched) else len(self._held)
        places = {stop: text.find(stop, max(before - len(stop) + 1, 0)) for stop in self._stop}
        found = [(place, stop) for stop, place in places.items() if place >= 0]
        if found and may_stop:
            place, self.stopped = min(found)
            self._held = ""
            return text[:place]
        kept = max(max(_overlap(settled, stop), _overlap(text, stop) - len(text) + len(settled)) for stop in self._stop)
        cut = len(settled) - max(kept, 0)
        self._held, self._searched = settled[cut:], text[cut:]
        return settled[:cut]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
