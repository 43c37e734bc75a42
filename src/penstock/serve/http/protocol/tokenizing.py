"""Text to tokens and back."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from penstock.serve.http.protocol.body import Body, Token
from penstock.serve.http.protocol.chats import ChatMessage


class Tokenize(Body):
    """``POST /tokenize``: of a text, or of a chat as its template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True


class Detokenize(Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[Token]
