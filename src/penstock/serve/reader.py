"""What an engine's deltas say, read in one way: text, tokens, log-probabilities, and why a continuation ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tokenizers import Tokenizer

from penstock.models.text import TextStream
from penstock.serve.choose.logprobs import LogprobRows
from penstock.serve.messages import Delta, Finish, Request


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a delta adds to its continuation.

    Attributes:
        text: what can be shown now; the beginning of what may become a stop string is held back.
        tokens: the new tokens, up to the one that ended the text, which is among them.
        offsets: where in the text each of ``tokens`` begins, in characters, where log-probabilities were asked for.
        shown: those of them that are in the text: all but a stop token, unless that is wanted too.
        logprobs: one for each of ``tokens``, where they were asked for.
        prompt_logprobs: once, where they were asked for.
        finish: why it ended; None while it goes on.
        stopped: the stop string or the request's own stop token that ended it; None where it was the model's own end of
            text, or something else.
        early: the text has ended, and the engine, which knows no strings, would go on: it must be told.
        accepted: how many of ``tokens`` were drafted.
    """

    text: str
    tokens: list[int]
    offsets: list[int] | None
    shown: list[int]
    logprobs: LogprobRows | None
    prompt_logprobs: LogprobRows | None
    finish: Finish | None
    stopped: str | int | None
    early: bool
    accepted: int


class Reader:
    """Reads the deltas of one continuation of ``request``, in order.

    A delta may hold several tokens, and a stop string may end in the midst of them: those behind it are dropped.

    Special tokens that are ``shown`` are part of the text, as they are written there; others are left out.

    Attributes:
        finish: why the continuation ended; None before. Deltas that come later say nothing.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, shown: Mapping[int, str] | None = None) -> None:
        sampling = request.sampling
        self._text = TextStream(tokenizer, request.prompt, sampling.stop, sampling.min_tokens, shown)
        self._include_stop = sampling.include_stop
        self._stop_tokens = frozenset(sampling.stop_tokens)
        self.finish: Finish | None = None

    def read(self, delta: Delta) -> Reading:
        """What ``delta`` adds."""
        text, tokens, finish = "", delta.tokens, delta.finish
        offsets: list[int] | None = None if delta.logprobs is None else []
        stop_token = tokens[-1] if tokens and finish is Finish.STOP else None
        stopped: str | int | None = stop_token if stop_token in self._stop_tokens else None
        shown = tokens if stop_token is None or (self._include_stop and stopped is not None) else tokens[:-1]
        for count, token in enumerate(shown, start=1):
            if offsets is not None:
                offsets.append(self._text.position)
            text += self._text.push([token])
            if self._text.stopped is not None:
                tokens = shown = shown[:count]
                break
        if finish is not None:
            text += self._text.end()
        if offsets is not None and len(offsets) < len(tokens):  # a stop token has no text
            offsets.append(self._text.position)
        if self._text.stopped is not None:
            finish, stopped = Finish.STOP, self._text.stopped
            text += stopped if self._include_stop else ""
        self.finish = finish
        logprobs = delta.logprobs
        if logprobs is not None and len(logprobs) > len(tokens):
            logprobs = logprobs[: len(tokens)]
        early = finish is not None and delta.finish is None
        accepted = min(delta.accepted, len(tokens))
        return Reading(text, tokens, offsets, shown, logprobs, delta.prompt_logprobs, finish, stopped, early, accepted)
