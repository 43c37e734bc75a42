"""The answers of ``/v1/chat/completions``: whole, and in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from penstock.serve.choose.logprobs import TokenLogprobs
from penstock.serve.http.chats import AnswerReader, Form
from penstock.serve.http.protocol.chats import Chat
from penstock.serve.http.service import Piece
from penstock.serve.http.shapes.choices import of_prompt, shown, token_record, with_own
from penstock.serve.http.text import Tokens


class Chats:
    """The shapes of ``/v1/chat/completions``.

    Args:
        tokens: of the model.
        prompt: its tokens.
        body: of the request.
        form: how an answer is read.
    """

    kind, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokens: Tokens, prompt: list[int], body: Chat, form: Form) -> None:
        self._tokens, self._prompt, self._body, self._form = tokens, prompt, body, form
        self._wanted = bool(body.logprobs)
        self._readers: dict[int, AnswerReader] = {}
        self._watched: dict[int, AnswerReader] = {}

    @property
    def shown(self) -> Mapping[int, str]:
        """Special tokens that are part of an answer's text, and what they are written as."""
        if self._body.skip_special_tokens is False:
            return self._tokens.specials | self._tokens.marks
        return self._tokens.marks if self._form.marked else {}

    def about(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """What the response, or the first chunk of a stream, says of the prompt."""
        told: dict[str, Any] = {"prompt_token_ids": self._prompt} if self._body.return_token_ids else {}
        if self._body.prompt_logprobs is not None and pieces:
            told["prompt_logprobs"] = of_prompt(pieces[0], self._tokens, self._body.prompt_logprobs)
        return told

    def over(self, piece: Piece) -> bool:
        """Whether a choice is at its end with ``piece``, of which the model knows nothing: one call is wanted, and it
        begins another."""
        if not self._form.single:
            return False
        reader = self._watched.setdefault(piece.choice, AnswerReader(self._form))
        reader.read(piece.text, False)
        return reader.beyond

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The first chunk of a choice: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def deltas(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """A choice of each of the chunks that tell of ``piece``."""
        reader = self._readers.setdefault(piece.choice, AnswerReader(self._form))
        told = reader.read(piece.text, piece.finish is not None)
        logprobs = self._logprobs(shown(piece)) if self._wanted else None
        ids = self._ids(piece)
        if not told and piece.finish is None and (self._wanted or ids):
            told = [{"content": ""}]
        for delta in told:
            yield {"index": piece.choice, "delta": delta, "logprobs": logprobs, "finish_reason": None, **ids}
            logprobs, ids = None, {}
        if piece.finish is not None:
            end = {"finish_reason": reader.reason(piece.finish), "stop_reason": piece.stop_reason}
            yield {"index": piece.choice, "delta": {}, "logprobs": logprobs, **end, **ids}

    def _ids(self, piece: Piece) -> dict[str, list[int]]:
        return {"token_ids": [*piece.tokens, *piece.closing]} if self._body.return_token_ids else {}

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A whole choice."""
        reader = AnswerReader(self._form)
        return {
            "index": piece.choice,
            "message": reader.message(piece.text),
            "logprobs": self._logprobs(shown(piece)) if self._wanted else None,
            "finish_reason": reader.reason(piece.finish),
            "stop_reason": piece.stop_reason,
            **self._ids(piece),
        }

    def _logprobs(self, positions: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return {
            "content": [
                token_record(self._tokens, position.token, position.logprob)
                | {"top_logprobs": [token_record(self._tokens, *each) for each in with_own(position)]}
                for position in positions
            ]
        }
