"""OpenAI's responses: whole, and in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from penstock.models.text import TextStream
from penstock.serve.choose.logprobs import TokenLogprobs
from penstock.serve.http.chats import AnswerReader, Form
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

    @property
    def shown(self) -> Mapping[int, str]:
        """Special tokens that are part of the text, and what they are written as: none."""
        return {}

    def deltas(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """A choice of each of the chunks that tell of ``piece``."""
        yield self._delta(piece)

    def _delta(self, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(_shown(piece), piece.offsets or []) if self._wanted else None
        return {"index": piece.choice, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A whole choice."""
        record = self._delta(piece)
        if self._echoes:
            echo = self._echo(piece.choice)
            record["text"] = echo + piece.text
            if self._wanted:
                record["logprobs"] = self._echoed_logprobs(piece, len(echo))
        return record

    def _echo(self, choice: int) -> str:
        return self._tokens.decode(self._echoes[choice], True)

    def _echoed_logprobs(self, piece: Piece, length: int) -> dict[str, Any]:
        """The same of prompt and text; ``length`` is that of the prompt, in characters."""
        stream, offsets = TextStream(self._tokens.backend, []), []
        for token in self._echoes[piece.choice]:
            offsets.append(stream.position)
            stream.push([token])
        offsets += [length + offset for offset in piece.offsets or []]
        first = self._echoes[piece.choice][0]
        prompt = piece.prompt_logprobs or []
        told = self._logprobs([*prompt, *_shown(piece)], offsets[1:], given=len(prompt))
        # Nothing predicts the first token.
        start = {"tokens": self._name(first), "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
        return {name: [value, *told[name]] for name, value in start.items()}

    def _logprobs(self, positions: Sequence[TokenLogprobs], offsets: list[int], given: int = 0) -> dict[str, Any]:
        """The first ``given`` of ``positions`` are the prompt's."""
        return {
            "tokens": [self._name(position.token) for position in positions],
            "token_logprobs": [max(position.logprob, LEAST) for position in positions],
            "top_logprobs": [self._top(position, place >= given) for place, position in enumerate(positions)],
            "text_offset": offsets[: len(positions)],
        }

    def _top(self, position: TokenLogprobs, sampled: bool) -> dict[str, float]:
        """The most probable tokens, and the one that was sampled. Where two have one name, the token that is there
        keeps it, and else the more probable one."""
        own = self._name(position.token)
        top: dict[str, float] = {}
        for token, logprob in position.top:
            name = self._name(token)
            taken = name in top or (name == own and token != position.token)
            top[f"token_id:{token}" if taken else name] = max(logprob, LEAST)
        return top | {own: max(position.logprob, LEAST)} if sampled else top

    def _name(self, token: int) -> str:
        said = self._tokens.vocabulary.name(token)
        try:
            return said.decode()
        except UnicodeDecodeError:  # a part of a character, written as OpenAI writes it
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in said)


class Chats:
    """The shapes of ``/v1/chat/completions``.

    Args:
        tokens: of the model.
        logprobs: whether log-probabilities were asked for.
        form: how an answer is read.
    """

    kind, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokens: Tokens, logprobs: bool, form: Form) -> None:
        self._tokens, self._wanted, self._form = tokens, logprobs, form
        self._readers: dict[int, AnswerReader] = {}

    @property
    def shown(self) -> Mapping[int, str]:
        """Special tokens that are part of an answer's text, and what they are written as."""
        return self._tokens.marks if self._form.marked else {}

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The first chunk of a choice: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}

    def deltas(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """A choice of each of the chunks that tell of ``piece``."""
        reader = self._readers.setdefault(piece.choice, AnswerReader(self._form))
        told = reader.read(piece.text, piece.finish is not None)
        logprobs = self._logprobs(_shown(piece)) if self._wanted else None
        if not told and piece.finish is None and self._wanted:
            told = [{"content": ""}]
        for delta in told:
            yield {"index": piece.choice, "delta": delta, "logprobs": logprobs, "finish_reason": None}
            logprobs = None
        if piece.finish is not None:
            reason = reader.reason(piece.finish)
            yield {"index": piece.choice, "delta": {}, "logprobs": logprobs, "finish_reason": reason}

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A whole choice."""
        reader = AnswerReader(self._form)
        return {
            "index": piece.choice,
            "message": reader.message(piece.text),
            "logprobs": self._logprobs(_shown(piece)) if self._wanted else None,
            "finish_reason": reader.reason(piece.finish),
        }

    def _logprobs(self, positions: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return {
            "content": [
                self._token(position.token, position.logprob)
                | {"top_logprobs": [self._token(token, logprob) for token, logprob in _with_own(position)]}
                for position in positions
            ]
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        said = self._tokens.vocabulary.name(token)
        # Of a part of a character, the name has the bytes as escapes: \\xf0.
        name = said.decode(errors="backslashreplace")
        return {"token": name, "logprob": max(logprob, LEAST), "bytes": list(said)}


def _with_own(position: TokenLogprobs) -> list[tuple[int, float]]:
    """The alternatives of ``position``; the token that is there takes the last place where it has none."""
    top = position.top
    if not top or any(token == position.token for token, _ in top):
        return top
    return [*top[:-1], (position.token, position.logprob)]


def _shown(piece: Piece) -> list[TokenLogprobs]:
    """Those of the tokens in the text: one that ended it is left out."""
    return list((piece.logprobs or [])[: len(piece.tokens)])


Shapes = Completions | Chats


def head(generation: Generation, object: str, model: str) -> dict[str, Any]:
    """What a response, or a chunk of one, begins with."""
    return {"id": generation.id, "object": object, "created": generation.created, "model": model}
