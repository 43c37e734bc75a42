"""Text to tokens and back."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from penstock.core.config import build
from penstock.serve.http.protocol.body import Body, Token
from penstock.serve.http.protocol.chats import Chat, ChatMessage


class Tokenize(Body):
    """``POST /tokenize``: of a text, or of a chat as its template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    #: Whether the tokens that the model wants around a text are added; those of a chat are its template's to write.
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def chat(self) -> Chat:
        """The same as a chat that is to be answered.

        Raises:
            UsageError: its fields do not go together.
        """
        given = {name: getattr(self, name) for name in Tokenize.model_fields if name != "prompt"}
        return build(Chat, {name: value for name, value in given.items() if value is not None}, "the request")


class Detokenize(Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[Token]
