"""What is asked of vectors: OpenAI's embeddings, and the scores and rankings that vLLM's, Jina's and Cohere's clients
want."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from penstock.core.errors import UsageError
from penstock.serve.http.protocol.body import LARGEST, Body, Count, Token

#: The most texts of a request.
MOST_TEXTS = 2048

Tokens = Annotated[list[Token], Field(min_length=1)]
Several = Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)]


class OfTexts(Body):
    """What all of these have in common."""

    model: str | None = None
    #: So many of a text's first tokens are read, those that the model wants around it included; -1 are as many as fit.
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=LARGEST)] | None = None
    #: Taken; it has no meaning here.
    user: str | None = None

    @model_validator(mode="after")
    def _something_is_left(self) -> OfTexts:
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens 0 would leave nothing of a text")
        return self


class Embeddings(OfTexts):
    """``POST /v1/embeddings``."""

    input: str | Several | Tokens | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_TEXTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    #: Whether the tokens that the model wants around a text are added.
    add_special_tokens: bool = True

    def texts(self) -> list[str | list[int]]:
        """Each text, as it is or as tokens."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)


class Document(Body):
    """A text in a table of its own: the only kind."""

    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "text" not in fields:
            kind = next((name for name in ("image", "image_url", "audio", "video", "content") if name in fields), None)
            if kind is not None:
                raise ValueError(f"a document is text, and {kind!r} is not supported")
        return fields


class Compares(OfTexts):
    """What scores and rankings have in common."""

    #: Whether scores of a model that reads pairs are between 0 and 1, where it has that; else they are its logits.
    use_activation: bool = True
    #: What makes a document an answer, for models whose template has a place for that.
    instruction: str | None = None
    #: The same by another name.
    instruct: str | None = None

    def told(self) -> str | None:
        """The instruction.

        Raises:
            UsageError: it is there twice.
        """
        if self.instruction is not None and self.instruct is not None:
            raise UsageError("give instruction or instruct, one of the two")
        return self.instruction if self.instruct is None else self.instruct


class Scores(Compares):
    """``POST /v1/score``: how near the texts of one side are to those of the other, which has one or as many."""

    text_1: str | Several | None = None
    text_2: str | Several | None = None
    #: The same by other names.
    queries: str | Several | None = None
    documents: str | Several | None = None

    def sides(self) -> tuple[list[str], list[str]]:
        """Both sides; of one length, or the first is one text.

        Raises:
            UsageError: they are not, or one is missing, or is there twice.
        """
        sides: list[list[str]] = []
        for names in (("text_1", "queries"), ("text_2", "documents")):
            given = [value for name in names if (value := getattr(self, name)) is not None]
            if len(given) != 1:
                raise UsageError(f"give {' or '.join(names)}, one of the two")
            sides.append([given[0]] if isinstance(given[0], str) else given[0])
        one, other = sides
        if len(one) not in (1, len(other)):
            raise UsageError(f"{len(one)} texts cannot be compared with {len(other)}: give one, or as many")
        return one, other


class Rerank(Compares):
    """``POST /v1/rerank``: the documents that are nearest to a query, the nearest first."""

    query: str
    documents: Annotated[list[str | Document], Field(min_length=1, max_length=MOST_TEXTS)]
    #: So many of them; all if not given.
    top_n: Count | None = None
    #: Whether the answer has the documents themselves.
    return_documents: bool = True

    def texts(self) -> list[str]:
        """The documents."""
        return [each if isinstance(each, str) else each.text for each in self.documents]
