"""What OpenAI's answers that have choices have in common."""

from __future__ import annotations

from typing import Any

from penstock.serve.choose.logprobs import TokenLogprobs
from penstock.serve.http.service import Generation, Piece
from penstock.serve.http.text import Tokens

#: What JSON, which has no infinities, says instead of minus infinity.
LEAST = -9999.0


def head(generation: Generation, object: str) -> dict[str, Any]:
    """What a response, or a chunk of one, begins with."""
    return {
        "id": generation.id,
        "object": object,
        "created": generation.created,
        "model": generation.model,
        "weights_version": generation.version,
    }


def of_prompt(piece: Piece, tokens: Tokens, most: int, first: int = 1) -> list[dict[int, dict[str, Any]] | None]:
    """For each token of the prompt, its log-probability and those of the ``most`` most probable, as vLLM tells them:
    none of those before the ``first`` that is asked for, nor of the first of all, which nothing predicts."""
    told: list[dict[int, dict[str, Any]] | None] = [None] * max(1, first)
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


def shown(piece: Piece) -> list[TokenLogprobs]:
    """Those of the tokens in the text: one that ended it is left out."""
    return list((piece.logprobs or [])[: len(piece.tokens)])


def token_record(tokens: Tokens, token: int, logprob: float) -> dict[str, Any]:
    """A token and its log-probability, as chats tell them."""
    said = tokens.vocabulary.name(token)
    # Of a part of a character, the name has the bytes as escapes: \\xf0.
    name = said.decode(errors="backslashreplace")
    return {"token": name, "logprob": max(logprob, LEAST), "bytes": list(said)}


def with_own(position: TokenLogprobs) -> list[tuple[int, float]]:
    """The alternatives of ``position``; the token that is there takes the last place where it has none."""
    top = position.top
    if not top or any(token == position.token for token, _ in top):
        return top
    return [*top[:-1], (position.token, position.logprob)]
