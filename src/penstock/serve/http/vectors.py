"""From texts to vectors: what the endpoints for them have in common."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from contextlib import aclosing
from typing import NamedTuple

import numpy as np
from fastapi import Request

from penstock.core.errors import UsageError
from penstock.serve.choose.logprobs import TokenLogprobs
from penstock.serve.embed.judge import Judge, Question
from penstock.serve.http.errors import ApiError
from penstock.serve.http.protocol.vectors import Compares
from penstock.serve.http.service import Service
from penstock.serve.http.streams import unless_gone
from penstock.serve.http.text import check_characters
from penstock.serve.link.wire import VectorForm
from penstock.serve.messages import Request as Asked


class Compared(NamedTuple):
    """How near texts are to others: float32 [n], and how many tokens were read."""

    scores: np.ndarray
    tokens: int


class Made(NamedTuple):
    """Vectors float32 [n, size], and how many tokens they were made of."""

    vectors: np.ndarray
    tokens: int


def usage(tokens: int) -> dict[str, int]:
    """The ``tokens`` that were read, in OpenAI's shape."""
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def written(vector: np.ndarray, form: str) -> list[float] | str:
    """A vector float32 [size] in OpenAI's ``form``: ``float``, or ``base64`` of its bytes."""
    return vector.tolist() if form == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()


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
            "(--tensor-parallel, --pipeline-parallel)",
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
    if form_of(service).pairs:
        raise ApiError(400, "this model compares pairs of texts, and makes no vectors: ask /v1/score or /v1/rerank")
    service.admit(1)
    longest = _longest(service, most)
    tokens = await asyncio.to_thread(lambda: [_encoded(service, text, longest, special) for text in texts])
    return await _computed(request, service, id, tokens, None, param)


async def compared(
    request: Request,
    service: Service,
    id: str,
    one: Sequence[str],
    other: Sequence[str],
    param: str,
    body: Compares,
) -> Compared:
    """How near texts are to the ``other`` ones, the field ``param`` of ``request``: pair by pair, or one to each of
    several. A model of pairs reads them together, and so does one that judges; else they are the cosines of their
    vectors.

    Raises:
        ApiError: a text does not fit or is empty, or the client went away, or the deadline passed.
        UsageError: there is an instruction, and the model takes none.
    """
    if service.judge is not None:
        return await _judged(request, service, service.judge, id, one, other, param, body)
    told = body.told()
    if told is not None and service.pairs is None:
        raise UsageError("this model takes no instruction: it compares texts as they are")
    form, most = form_of(service), body.truncate_prompt_tokens
    if not form.pairs:
        found = await made(request, service, id, [*one, *other], param, most)
        vectors = of_length_1(found.vectors)
        return Compared((vectors[: len(one)] * vectors[len(one) :]).sum(1), found.tokens)
    service.admit(1)
    pairs, longest = zip(one if len(one) > 1 else [*one] * len(other), other, strict=True), _longest(service, most)
    encoded = await asyncio.to_thread(lambda: [_pair(service, *pair, told, longest) for pair in pairs])
    seconds = [second for _, second in encoded]
    found = await _computed(request, service, id, [tokens for tokens, _ in encoded], seconds, param)
    numbers = found.vectors[:, 0]
    scores = 1 / (1 + np.exp(-numbers.astype(np.float64))) if form.sigmoid and body.use_activation else numbers
    return Compared(scores, found.tokens)


def _pair(service: Service, one: str, other: str, told: str | None, longest: int | None) -> tuple[list[int], int]:
    """The tokens of a pair, and where the second text begins if the model is told."""
    if service.pairs is None:
        return service.tokens.encode_pair(one, other, longest)
    for each in (one, other, told or ""):
        check_characters(each)
    tokens = service.pairs.prompt(one, other, told, longest)
    return tokens, len(tokens)


async def _judged(
    request: Request,
    service: Service,
    judge: Judge,
    id: str,
    one: Sequence[str],
    other: Sequence[str],
    param: str,
    body: Compares,
) -> Compared:
    pairs = list(zip(one if len(one) > 1 else [*one] * len(other), other, strict=True))
    service.admit(len(pairs))
    most, told = body.truncate_prompt_tokens, body.told()
    # A sequence has room for what follows.
    longest = None if most is None else min(service.engine.ready.context - 1, most if most > 0 else 1 << 62)

    def written() -> list[list[int]]:
        for each in (*one, *other, told or ""):
            check_characters(each)
        return [judge.template.prompt(*pair, told, longest) for pair in pairs]

    prompts = await asyncio.to_thread(written)
    for prompt in prompts:
        service.checked(prompt, param)
    work = asyncio.wait_for(_answered(service, judge, id, prompts), service.limits.deadline)
    try:
        logits = np.array(await unless_gone(request, work))
    except TimeoutError as error:
        raise ApiError(504, f"the texts took longer than {service.limits.deadline:g} seconds") from error
    return Compared(1 / (1 + np.exp(-logits)) if body.use_activation else logits, sum(map(len, prompts)))


async def _answered(service: Service, judge: Judge, id: str, prompts: list[list[int]]) -> list[float]:
    """The logits of the scores of ``prompts``."""
    rounds, count = judge.rounds(len(prompts)), 0
    questions = next(rounds)
    while True:
        told = await _said(service, f"{id}/{count}", prompts, questions)
        count += 1
        try:
            questions = rounds.send(told)
        except StopIteration as done:
            logits: list[float] = done.value
            return logits


async def _said(service: Service, id: str, prompts: list[list[int]], questions: list[Question]) -> list[TokenLogprobs]:
    """With what the model would continue ``prompts``."""
    asked = [Asked(f"{id}/{place}", prompts[place], sampling, whole=True) for place, sampling in questions]
    found: dict[str, TokenLogprobs] = {}
    async with aclosing(service.engine.stream(*asked)) as news:
        async for delta in news:
            if delta.logprobs:
                found[delta.id] = delta.logprobs[0]
    if len(found) < len(asked):
        raise ApiError(503, "the engine ended the work on the texts before it was done; try again")
    return [found[each.id] for each in asked]


def _longest(service: Service, most: int | None) -> int | None:
    context = service.engine.ready.context
    return None if most is None else context if most == -1 else min(most, context)


async def _computed(
    request: Request, service: Service, id: str, tokens: list[list[int]], seconds: list[int] | None, param: str
) -> Made:
    for each in tokens:
        _check(service, each, param)
    work = asyncio.wait_for(service.engine.embed(id, tokens, seconds), service.limits.deadline)
    try:
        vectors = await unless_gone(request, work)
    except TimeoutError as error:
        raise ApiError(504, f"the texts took longer than {service.limits.deadline:g} seconds") from error
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
