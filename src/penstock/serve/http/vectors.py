"""From texts to vectors: what the endpoints for them have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from fastapi import Request

from penstock.serve.http.errors import ApiError
from penstock.serve.http.service import Service
from penstock.serve.http.streams import unless_gone
from penstock.serve.link.wire import VectorForm


class Made(NamedTuple):
    """Vectors float32 [n, size], and how many tokens they were made of."""

    vectors: np.ndarray
    tokens: int

    @property
    def usage(self) -> dict[str, int]:
        """In OpenAI's shape."""
        return {"prompt_tokens": self.tokens, "total_tokens": self.tokens}


def form_of(service: Service) -> VectorForm:
    """What the model's vectors are.

    Raises:
        ApiError: it makes none.
    """
    form = service.engine.ready.vectors
    if form is None:
        raise ApiError(
            400,
            "this server makes no vectors: it records its steps (--record), or its model is divided among ranks "
            "(--tensor-parallel)",
        )
    return form


async def made(
    request: Request,
    service: Service,
    id: str,
    texts: Sequence[str | list[int]],
    param: str,
    most: int | None,
    special: bool = True,
) -> Made:
    """The vectors of ``texts``, the field ``param`` of ``request``; its answer's name is ``id``.

    Args:
        most: tokens of a text that are read, the first ones; -1 for as many as fit, None where all have to fit.
        special: add the tokens that the model wants around a text.

    Raises:
        ApiError: a text does not fit or is empty, or the client went away, or the deadline passed.
    """
    service.admit(1)
    context = service.engine.ready.context
    longest = None if most is None else context if most == -1 else min(most, context)
    tokens = await asyncio.to_thread(lambda: [_encoded(service, text, longest, special) for text in texts])
    for each in tokens:
        _check(service, each, param)
    work = asyncio.wait_for(service.engine.embed(id, tokens), service.limits.deadline)
    try:
        vectors = await unless_gone(request, work)
    except TimeoutError as error:
        raise ApiError(504, f"the vectors took longer than {service.limits.deadline:g} seconds") from error
    return Made(vectors, sum(map(len, tokens)))


def _encoded(service: Service, text: str | list[int], longest: int | None, special: bool) -> list[int]:
    if isinstance(text, str):
        return service.tokens.encode_first(text, longest, special)
    return text[:longest]


def _check(service: Service, tokens: list[int], param: str) -> None:
    context = service.engine.ready.context
    if not tokens:
        raise ApiError(400, "a text is empty: there is nothing to make a vector of", param=param)
    if len(tokens) > context:
        raise ApiError(
            400,
            f"a text has {len(tokens)} tokens, and the model reads {context}: cut it into pieces, or have its "
            "beginning read alone, by truncate_prompt_tokens -1",
            param=param,
            code="context_length_exceeded",
        )
    service.check_tokens(tokens, param)


def shortened(vectors: np.ndarray, dimensions: int | None, form: VectorForm) -> np.ndarray:
    """The first ``dimensions`` numbers of ``vectors`` [n, size], where the model was trained for it; of length 1 again
    where they were.

    Raises:
        ApiError: it was not.
    """
    if dimensions in (None, form.size):
        return vectors
    if dimensions not in form.cuts:
        which = "they cannot be cut" if not form.cuts else f"they can be cut to {_listed(form.cuts)}"
        raise ApiError(
            400,
            f"the model's vectors have {form.size} numbers, and {which}, as its config.json says "
            "(matryoshka_dimensions or is_matryoshka)",
            param="dimensions",
        )
    cut = vectors[:, :dimensions]
    return of_length_1(cut) if form.normalized else cut


def of_length_1(vectors: np.ndarray) -> np.ndarray:
    """``vectors`` [n, D] with the length 1; what is 0 stays so."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: np.ndarray = vectors / np.maximum(lengths, np.float32(1e-12))
    return found


def _listed(cuts: Sequence[int]) -> str:
    if len(cuts) > 12:
        return f"{min(cuts)} to {max(cuts)}"
    return ", ".join(map(str, cuts))
