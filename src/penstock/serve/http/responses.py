"""OpenAI's responses: whole, and in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from penstock.models.text import TextStream
from penstock.serve.choose.logprobs import TokenLogprobs
from penstock.serve.http.chats import AnswerReader, Form
from penstock.serve.http.protocol import Chat, Completion
from penstock.serve.http.service import Generation, Piece
from penstock.serve.http.text import Tokens

#: What JSON, which has no infinities, says instead of minus infinity.
LEAST = -9999.0


class Completions:
    """The shapes of ``/v1/completions``.

    Args:
        tokens: of the model.
        prompts: of the request, their tokens.
        body: of the request.
    """

    kind, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokens: Tokens, prompts: list[list[int]], body: Completion) -> None:
        self._tokens, self._prompts, self._body = tokens, prompts, body
        self._echoes, self._wanted = body.echoes(prompts), body.logprobs is not None
        self._written = [tokens.decode(prompt, True) for prompt in self._echoes]
        self._begun: set[int] = set()

    def about(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """What the response, or the first chunk of a stream, says besides: nothing."""
        return {}

    def over(self, piece: Piece) -> bool:
        """Whether a choice is at its end with ``piece``, of which the model knows nothing: never."""
        return False

    def opening(self, choice: int) -> dict[str, Any] | None:
        """The first chunk of a choice, where there is one before its text: there is none."""
        return None

    @property
    def shown(self) -> Mapping[int, str]:
        """Special tokens that are part of the text, and what they are written as: none, if it is not asked for."""
        return self._tokens.specials if self._body.skip_special_tokens is False else {}

    def deltas(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """A choice of each of the chunks that tell of ``piece``."""
        first = piece.choice not in self._begun
        self._begun.add(piece.choice)
        yield self._record(piece, first)

    def choice(self, piece: Piece) -> dict[str, Any]:
        """A whole choice."""
        return self._record(piece, True)

    def _record(self, piece: Piece, first: bool) -> dict[str, Any]:
        """A choice, or a part of it; the ``first`` one has what is told of the prompt."""
        echo = self._written[piece.choice] if self._echoes else ""
        record: dict[str, Any] = {
            "index": piece.choice,
            "text": echo + piece.text if first else piece.text,
            "logprobs": self._scored(piece, len(echo), first) if self._wanted else None,
            "finish_reason": piece.finish,
        }
        if piece.finish is not None:
            record["stop_reason"] = piece.stop_reason
        if self._body.return_token_ids:
            record["token_ids"] = [*piece.tokens, *piece.closing]
            if first:
                record["prompt_token_ids"] = self._prompts[piece.choice // self._body.n]
        if first and self._body.prompt_logprobs is not None:
            record["prompt_logprobs"] = _of_prompt(piece, self._tokens, self._body.prompt_logprobs)
        return record

    def _scored(self, piece: Piece, length: int, first: bool) -> dict[str, Any]:
        """Log-probabilities; ``length`` is that of the echoed prompt, in characters, whose own come ``first``."""
        offsets = [length + offset for offset in piece.offsets or []]
        if not (first and self._echoes):
            return self._logprobs(_shown(piece), offsets)
        stream, places = TextStream(self._tokens.backend, []), []
        for token in self._echoes[piece.choice]:
            places.append(stream.position)
            stream.push([token])
        start = self._echoes[piece.choice][0]
        prompt = piece.prompt_logprobs or []
        told = self._logprobs([*prompt, *_shown(piece)], [*places[1:], *offsets], given=len(prompt))
        # Nothing predicts the first token.
        lead = {"tokens": self._name(start), "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
        return {name: [value, *told[name]] for name, value in lead.items()}

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
        prompt: its tokens.
        body: of the request.
        form: how an answer is read.
    """

    kind, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

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
            told["prompt_logprobs"] = _of_prompt(pieces[0], self._tokens, self._body.prompt_logprobs)
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
        logprobs = self._logprobs(_shown(piece)) if self._wanted else None
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
            "logprobs": self._logprobs(_shown(piece)) if self._wanted else None,
            "finish_reason": reader.reason(piece.finish),
            "stop_reason": piece.stop_reason,
            **self._ids(piece),
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


def _of_prompt(piece: Piece, tokens: Tokens, most: int) -> list[dict[int, dict[str, Any]] | None]:
    """For each token of the prompt, its log-probability and those of the ``most`` most probable, as vLLM tells them:
    of the first, which nothing predicts, none."""
    told: list[dict[int, dict[str, Any]] | None] = [None]
    for position in piece.prompt_logprobs or []:
        ranked = {token: (logprob, rank) for rank, (token, logprob) in enumerate(position.top[:most], start=1)}
        ranked[position.token] = (position.logprob, position.rank)
        told.append(
            {
                token: {
                    "logprob": max(logprob, LEAST),
                    "rank": rank,
                    "decoded_token": tokens.vocabulary.name(token).decode(errors="replace"),
                }
                for token, (logprob, rank) in ranked.items()
            }
        )
    return told


def _shown(piece: Piece) -> list[TokenLogprobs]:
    """Those of the tokens in the text: one that ended it is left out."""
    return list((piece.logprobs or [])[: len(piece.tokens)])


Shapes = Completions | Chats


def head(generation: Generation, object: str, model: str) -> dict[str, Any]:
    """What a response, or a chunk of one, begins with."""
    return {"id": generation.id, "object": object, "created": generation.created, "model": model}
