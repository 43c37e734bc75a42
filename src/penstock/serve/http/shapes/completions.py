"""The answers of ``/v1/completions``: whole, and in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from penstock.models.text import TextStream
from penstock.serve.choose.logprobs import TokenLogprobs
from penstock.serve.http.protocol.completions import Completion
from penstock.serve.http.service import Piece
from penstock.serve.http.shapes.choices import LEAST, of_prompt, shown
from penstock.serve.http.text import Tokens


class Completions:
    """The shapes of ``/v1/completions``.

    Args:
        tokens: of the model.
        prompts: of the request, their tokens.
        body: of the request.
    """

    kind, whole, chunk = "cmpl-", "text_completion", "text_completion"

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
            asked = self._body.prompt_logprobs, self._body.prompt_logprobs_from or 0
            record["prompt_logprobs"] = of_prompt(piece, self._tokens, *asked)
        return record

    def _scored(self, piece: Piece, length: int, first: bool) -> dict[str, Any]:
        """Log-probabilities; ``length`` is that of the echoed prompt, in characters, whose own come ``first``."""
        offsets = [length + offset for offset in piece.offsets or []]
        if not (first and self._echoes):
            return self._logprobs(shown(piece), offsets)
        stream, places = TextStream(self._tokens.backend, []), []
        for token in self._echoes[piece.choice]:
            places.append(stream.position)
            stream.push([token])
        start = self._echoes[piece.choice][0]
        prompt = piece.prompt_logprobs or []
        told = self._logprobs([*prompt, *shown(piece)], [*places[1:], *offsets], given=len(prompt))
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
