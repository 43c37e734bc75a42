"""OpenAI's responses: whole, and in chunks."""

from __future__ import annotations

import itertools
from typing import Any

from penstock.serve.choose.logprobs import TokenLogprobs
from penstock.serve.http.service import Generation, Piece
from penstock.serve.http.text import Tokens

#: What JSON, which has no infinities, says instead of minus infinity.
LEAST = -9999.0


class Completions:
    """The shapes of ``/v1/completions``.

    Args:
        tokens: of the model.
        echoes: for each choice, the prompt's tokens that its text begins with.
        logprobs: whether log-probabilities were asked for.
    """

    kind, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokens: Tokens, echoes: list[list[int]], logprobs: bool) -> None:
        self._tokens, self._echoes, self._wanted = tokens, echoes, logprobs

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The first chunk of a choice, where there is one before its text."""
        if not self._echoes:
            return None
        return {"index": choice, "text": self._echo(choice), "logprobs": None, "finish_reason": None}

    def delta(self, piece: Piece) -> dict[str, Any]:
        """A choice of a chunk."""
        logprobs = self._logprobs(_shown(piece)) if self._wanted else None
        return {"index": piece.choice, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A whole choice."""
        record = self.delta(piece)
        if self._echoes:
            record["text"] = self._echo(piece.choice) + piece.text
            if self._wanted:
                first = self._echoes[piece.choice][0]
                record["logprobs"] = self._logprobs([*(piece.prompt_logprobs or []), *_shown(piece)], first)
        return record

    def _echo(self, choice: int) -> str:
        return self._tokens.decode(self._echoes[choice], True)

    def _logprobs(self, positions: list[TokenLogprobs], first: int | None = None) -> dict[str, Any]:
        """Of ``positions``, and before them of a ``first`` token, which nothing predicts."""
        start = [] if first is None else [first]
        nothing: list[None] = [None] * len(start)
        names = [self._tokens.decode([token]) for token in start + [position.token for position in positions]]
        top = [{self._tokens.decode([t]): max(p, LEAST) for t, p in position.top} for position in positions]
        return {
            "tokens": names,
            "token_logprobs": [*nothing, *(max(position.logprob, LEAST) for position in positions)],
            "top_logprobs": [*nothing, *top],
            "text_offset": [0, *itertools.accumulate(map(len, names))][: len(names)],
        }


class Chats:
    """The shapes of ``/v1/chat/completions``; the arguments are as above."""

    kind, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokens: Tokens, logprobs: bool) -> None:
        self._tokens, self._wanted = tokens, logprobs

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The first chunk of a choice: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, piece: Piece) -> dict[str, Any]:
        """A choice of a chunk."""
        return {
            "index": piece.choice,
            "delta": {"content": piece.text} if piece.text or piece.finish is None else {},
            "logprobs": self._logprobs(_shown(piece)) if self._wanted else None,
            "finish_reason": piece.finish,
        }

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A whole choice."""
        return {
            "index": piece.choice,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(_shown(piece)) if self._wanted else None,
            "finish_reason": piece.finish,
        }

    def _logprobs(self, positions: list[TokenLogprobs]) -> dict[str, Any]:
        return {
            "content": [
                self._token(position.token, position.logprob)
                | {"top_logprobs": [self._token(token, logprob) for token, logprob in position.top]}
                for position in positions
            ]
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        name = self._tokens.decode([token])
        # A token may be a part of a character: then its own text does not say which bytes it is.
        return {
            "token": name,
            "logprob": max(logprob, LEAST),
            "bytes": None if "\ufffd" in name else list(name.encode()),
        }


def _shown(piece: Piece) -> list[TokenLogprobs]:
    """Those of the tokens in the text: one that ended it is left out."""
    return (piece.logprobs or [])[: len(piece.tokens)]


Shapes = Completions | Chats


def head(generation: Generation, object: str, model: str) -> dict[str, Any]:
    """What a response, or a chunk of one, begins with."""
    return {"id": generation.id, "object": object, "created": generation.created, "model": model}
