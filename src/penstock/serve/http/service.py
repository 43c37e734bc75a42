"""From an API request to the engine and back: what every endpoint that generates has in common."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from penstock.core.config import Config, build
from penstock.core.errors import UsageError
from penstock.core.randomness import derive
from penstock.serve.choose.logprobs import TokenLogprobs
from penstock.serve.choose.sampling import SamplingParams, best
from penstock.serve.embed.judge import Judge
from penstock.serve.embed.pair_template import PairTemplate
from penstock.serve.http.conversations import Conversations
from penstock.serve.http.errors import ApiError
from penstock.serve.http.metrics import ServerMetrics
from penstock.serve.http.protocol.body import Body, unknown
from penstock.serve.http.protocol.completions import Completion
from penstock.serve.http.protocol.generate import Generate
from penstock.serve.http.text import Tokens
from penstock.serve.link.client import EngineClient
from penstock.serve.messages import Delta, Finish, Request
from penstock.serve.observe.history import Course, History
from penstock.serve.observe.log import EventLines
from penstock.serve.reader import Reader, Reading
from penstock.serve.replicas.replicas import Replicas

log = logging.getLogger(__name__)

#: How many fields that are not known are named, and how much of a name is said.
MOST_NAMED, LONGEST_NAME = 20, 50


class Limits(Config):
    """What a server takes on.

    Attributes:
        body: most MiB of a request's body.
        queue: most continuations that wait, besides those that the engine can run at a time.
        deadline: most seconds that a request may take; it ends then with what it has.
        drain: most seconds that requests under way may take once the server is told to end.
        reading: most seconds that a client may take for a request's head, or for a part of its body.
        patience: seconds after which an engine that has work, and says nothing, is taken for dead.
        search: most tokens that the budget of a search may be.
        scorers: by which clients may have texts of a search scored.
    """

    body: PositiveFloat = 4.0
    queue: NonNegativeInt = 1024
    deadline: PositiveFloat = 600.0
    drain: NonNegativeFloat = 30.0
    reading: PositiveFloat = 30.0
    patience: PositiveFloat = 300.0
    search: PositiveInt = 100_000
    scorers: tuple[str, ...] = ("exact_match", "majority", "self_certainty")


@dataclasses.dataclass(frozen=True)
class Piece:
    """News of one choice of a response: its new text and tokens, and why it ended, if it did. ``logprobs`` are there
    where they are needed: of ``tokens``, then of one that ended the text; those of the prompt in the first piece.
    ``offsets`` are with them: where in the choice's text each of the tokens begins, in characters. ``stop_reason`` is
    the stop string or the request's own stop token that ended it, and ``closing`` the token that did, which is no part
    of the text."""

    choice: int
    text: str
    tokens: list[int]
    logprobs: Sequence[TokenLogprobs] | None
    offsets: list[int] | None
    finish: str | None
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    stop_reason: str | int | None = None
    closing: Sequence[int] = ()

    def emptied(self) -> Piece:
        """The same of a choice that is to have no tokens."""
        return Piece(self.choice, "", [], self.logprobs and [], self.offsets and [], "length", self.prompt_logprobs)


@dataclasses.dataclass
class Usage:
    """Tokens of a response so far; ``cached`` of the prompt's were in the cache already, and ``accepted`` of the tokens
    that were ``drafted`` are among those of the completion."""

    prompt: int
    cached: int = 0
    completion: int = 0
    drafted: int = 0
    accepted: int = 0

    def record(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.drafted - self.accepted,
            },
        }


def _headed(name: str) -> str:
    """``name`` as a header can carry it."""
    written = ascii(name)
    return written[1:-1] if name and name == name.strip() else written


def _joined(pieces: list[Piece]) -> list[Piece]:
    """One piece for each choice, in order."""
    choices: dict[int, list[Piece]] = {}
    for piece in pieces:
        choices.setdefault(piece.choice, []).append(piece)
    return [
        Piece(
            place,
            "".join(piece.text for piece in own),
            [token for piece in own for token in piece.tokens],
            [position for piece in own for position in piece.logprobs or []],
            [offset for piece in own for offset in piece.offsets or []],
            own[-1].finish,
            next((piece.prompt_logprobs for piece in own if piece.prompt_logprobs is not None), None),
            own[-1].stop_reason,
            own[-1].closing,
        )
        for place, own in sorted(choices.items())
    ]


class PromptScores:
    """The engine tells a prompt's log-probabilities with the first of its continuations; the first piece of each other
    one needs them too, and waits for them.

    Args:
        wanted: whether they are; pieces stay as they are otherwise.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted, self._known = wanted, dict[str, Sequence[TokenLogprobs]]()
        self._waiting, self._begun = dict[str, list[Piece]](), set[int]()

    def told(self, id: str, piece: Piece) -> Iterator[Piece]:
        """The pieces of the request ``id`` that can be told now that there is ``piece``."""
        if piece.prompt_logprobs is not None:
            self._known[id] = piece.prompt_logprobs
        pieces = [*self._waiting.pop(id, []), piece]
        if self._wanted and id not in self._known:
            self._waiting[id] = pieces
            return
        for each in pieces:
            first = self._wanted and each.choice not in self._begun
            self._begun.add(each.choice)
            yield dataclasses.replace(each, prompt_logprobs=self._known[id]) if first else each

    def rest(self) -> Iterator[Piece]:
        """The pieces of requests that ended before that."""
        return itertools.chain.from_iterable(self._waiting.values())


class Choice:
    """One continuation on its way to a client."""

    def __init__(self, place: int, request: Request, tokens: Tokens, shown: Mapping[int, str]) -> None:
        self.place, self.reader = place, Reader(request, tokens.backend, shown)
        self.count = self.cached = 0
        self.first = 0.0

    @property
    def outcome(self) -> str | None:
        """How it ended; None before."""
        return None if self.reader.finish is None else self.reader.finish.value


class Generation:
    """A response in the making.

    Attributes:
        id: of the response.
        created: when, in seconds since 1970.
        sampling: how its tokens are chosen.
        usage: so far.
        key: whose it is.
        model: what computes it, as clients write it: the model, or one of its adapters.
        adapter: the latter's name; empty of the model itself.
        version: of the weights that its newest tokens come from.
        outcome: how the choices end that have not ended by themselves: ``disconnect`` unless something fails.
    """

    def __init__(
        self,
        service: Service,
        kind: str,
        prompts: list[list[int]],
        body: Generate,
        key: str,
        *,
        contexts: list[list[int]] | None = None,
        shared: int = 0,
        **extra: Any,
    ) -> None:
        self.id, self.created = f"{kind}{uuid.uuid4().hex}", int(time.time())
        self.key, self.version = key, 0
        self.adapter = service.check_model(body.model)
        self.model = self.adapter or service.name
        self.usage, self.outcome = Usage(sum(map(len, prompts))), "disconnect"
        self._service, self._nothing = service, body.wanted == 0
        self._begun = time.monotonic()
        for field, named in body.named_tokens().items():
            service.check_tokens(named, field)
        options = {"seed": service.fresh_seed()} | body.options() | extra
        self.sampling = build(SamplingParams, options, "the request").tokenized(
            service.tokens.encode, service.tokens.bare
        )
        given = (self.sampling, body.priority, key, service.limits.deadline)
        self.requests = [
            Request(
                *(f"{self.id}/{number}", prompt, *given),
                contexts=contexts or [],
                shared=shared,
                adapter=self.adapter,
                whole=not body.stream,
            )
            for number, prompt in enumerate(prompts)
        ]
        self.usage.prompt = sum(request.length for request in self.requests)

    async def pieces(self, shown: Mapping[int, str], over: Callable[[Piece], bool]) -> AsyncGenerator[Piece]:
        """The response's text as it comes, with the special tokens that are ``shown``. A piece with which a choice is
        ``over`` is its last. Closing the iterator before its end aborts the request."""
        service, each = self._service, self.sampling.continuations
        service.admit(each * len(self.requests))
        choices = {
            (request.id, index): Choice(number * each + index, request, service.tokens, shown)
            for number, request in enumerate(self.requests)
            for index in range(each)
        }
        service.live[self.id] = self
        prompts = PromptScores(each > 1 and self.sampling.prompt_logprobs is not None)
        try:
            async with aclosing(service.engine.stream(*self.requests)) as news:
                async for delta in news:
                    choice = choices[delta.id, delta.index]
                    if choice.outcome is None:
                        piece = self._piece(choice, delta)
                        for known in prompts.told(
                            delta.id, self._ended(choice, delta, piece) if over(piece) else piece
                        ):
                            yield known
            for known in prompts.rest():
                yield known
        except Exception:
            self.outcome = "error"
            raise
        finally:
            del service.live[self.id]
            for choice in choices.values():
                service.metrics.outcomes.labels(choice.outcome or self.outcome).inc()

    def chosen(self, pieces: list[Piece]) -> list[Piece]:
        """The choices of the whole response, a piece each: of ``best_of`` continuations of a prompt the best ``n``."""
        each, n = self.sampling.continuations, self.sampling.n
        whole = _joined(pieces)
        groups = [whole[start : start + each] for start in range(0, len(whole), each)]
        if each > n:
            orders = [best([[p.logprob for p in piece.logprobs or []] for piece in group], n) for group in groups]
            groups = [[group[place] for place in order] for group, order in zip(groups, orders, strict=True)]
        return [dataclasses.replace(p, choice=place) for place, p in enumerate(itertools.chain.from_iterable(groups))]

    def _piece(self, choice: Choice, delta: Delta) -> Piece:
        reading = choice.reader.read(delta)
        self.version = max(self.version, delta.version)
        self._count(choice, delta, reading)
        if reading.early:
            self._service.engine.abort(delta.id, delta.index)
        if reading.finish is not None:
            self._time(choice)
        # Clients know two ends of a text: it is complete, or it is cut off.
        reason = None if reading.finish is None else "stop" if reading.finish is Finish.STOP else "length"
        piece = Piece(
            choice.place,
            reading.text,
            reading.shown,
            reading.logprobs,
            reading.offsets,
            reason,
            reading.prompt_logprobs,
            reading.stopped,
            reading.tokens[len(reading.shown) :],
        )
        return piece.emptied() if self._nothing else piece

    def _ended(self, choice: Choice, delta: Delta, piece: Piece) -> Piece:
        """``piece`` as the last of its choice."""
        if choice.reader.finish is None:
            choice.reader.finish = Finish.STOP
            self._service.engine.abort(delta.id, delta.index)
            self._time(choice)
        return dataclasses.replace(piece, finish=piece.finish or "stop")

    def _count(self, choice: Choice, delta: Delta, reading: Reading) -> None:
        tokens = 0 if self._nothing else len(reading.tokens)
        if tokens and not choice.count:
            choice.first = time.monotonic()
            self._service.metrics.ttft.observe(choice.first - self._begun)
        choice.count += tokens
        self.usage.completion += tokens
        self.usage.drafted += delta.drafted
        self.usage.accepted += reading.accepted
        if delta.cached > choice.cached:
            self.usage.cached += (delta.cached - choice.cached) if delta.index == 0 else 0
            choice.cached = delta.cached

    def _time(self, choice: Choice) -> None:
        now = time.monotonic()
        self._service.metrics.duration.observe(now - self._begun)
        if choice.count > 1:
            self._service.metrics.tpot.observe((now - choice.first) / (choice.count - 1))


class Service:
    """A model at work behind the endpoints.

    Args:
        name: of the model, as clients write it.
        tokens: its tokenizer.
        engine: where it runs.
        limits: what is taken on.
        strict: whether requests with fields that are not known are refused.
        control: whether the engine is controlled over HTTP: paused, given other weights.
        judge: how the model judges pairs of texts, or how one that makes a number of a pair has it written; None where
            neither is.

    Attributes:
        history: what became of the newest requests.
        live: what is under way, by the id of the response.
        conversations: responses from which others can go on.
    """

    def __init__(
        self,
        name: str,
        tokens: Tokens,
        engine: EngineClient | Replicas,
        limits: Limits,
        strict: bool = False,
        control: bool = False,
        judge: Judge | PairTemplate | None = None,
    ) -> None:
        self.judge = judge if isinstance(judge, Judge) else None
        self.pairs = judge if isinstance(judge, PairTemplate) else None
        self.name, self.tokens, self.engine, self.limits = name, tokens, engine, limits
        self._strict, self.control = strict, control
        self.metrics, self.history = (
            ServerMetrics(lambda: engine.snapshot, engine.ready.memory, engine.ready.codec),
            History(),
        )
        self.conversations, self.live = Conversations(), dict[str, Generation]()
        engine.watchers += [self.history, self.metrics, EventLines()]
        self.created = int(time.time())
        self.draining = False
        self._seed, self._seeds = secrets.randbits(63), 0

    def fresh_seed(self) -> int:
        """For a request that brings none: 62 bits."""
        self._seeds += 1
        return derive(self._seed, "requests", self._seeds) >> 1

    def check_model(self, name: str | None) -> str:
        """The adapter that ``name`` is, the empty one for the model itself; a request for any other is refused."""
        if name is None or name == self.name:
            return ""
        adapters = self.engine.snapshot.adapters
        if name in adapters:
            return name
        also = f", with the adapters {', '.join(adapters)}" if adapters else ""
        raise ApiError(
            404, f"there is no model {name!r} here; this is {self.name!r}{also}", param="model", code="model_not_found"
        )

    def check_alone(self, name: str | None, what: str) -> None:
        """Refuses a request for another model, and for one of the adapters, with which there is no ``what``."""
        if self.check_model(name):
            raise ApiError(400, f"{what} are of the model itself, {self.name!r}, without adapters", param="model")

    def ignored(self, body: Body) -> dict[str, str]:
        """A header that names the fields of ``body`` that are not known, where there are any; the log has them too.

        Raises:
            ApiError: the server is strict.
        """
        found = list(itertools.islice(unknown(body), MOST_NAMED))
        if not found:
            return {}
        if self._strict:
            name, near = found[0]
            raise ApiError(400, f"unknown field {name[:LONGEST_NAME]!r}; {near}", param=name.partition(".")[0])
        names = ", ".join(_headed(name[:LONGEST_NAME]) for name, _ in found)
        log.warning("fields of a request are not known, and ignored: %s", names)
        return {"Penstock-Ignored": names}

    def courses(self, id: str) -> list[Course]:
        """What became of the continuations of the response ``id``."""
        found = self.history.of(id)
        if not found:
            raise ApiError(
                404,
                f"nothing is known of a request {id[:80]!r}: give the id of a response, such as cmpl-... or "
                "chatcmpl-...; GET /v1/requests has the newest, and the oldest are forgotten",
                code="request_not_found",
            )
        return found

    def abort(self, id: str, key: str) -> None:
        """Ends the response ``id``, which whoever has the ``key`` asked for, with what it has.

        Raises:
            ApiError: there is none under way.
        """
        generation = self.live.get(id)
        if generation is None or generation.key != key:
            what = f"no request {id[:80]!r} of yours is under way: give the id of its response, such as chatcmpl-..."
            raise ApiError(404, what, code="request_not_found")
        for request in generation.requests:
            self.engine.abort(request.id)

    def admit(self, continuations: int) -> None:
        """Refuses so many more continuations where they would not fit the queue."""
        most = self.engine.ready.sequences + self.limits.queue
        if continuations > most:
            raise UsageError(f"the request wants {continuations} continuations, and this server takes {most} at a time")
        if self.engine.outstanding + continuations > most:
            self.metrics.refused.inc()
            raise ApiError(
                429,
                "the server is busy and its queue is full; try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    async def encoded(self, prompt: str | list[int], body: Completion) -> list[int]:
        """The tokens of ``prompt``, one of those of ``body``, checked against the model's limits."""
        if isinstance(prompt, str):
            # In a thread: a long text takes a while, and others' tokens go on meanwhile.
            prompt = await asyncio.to_thread(self.tokens.encode, prompt, body.special)
        return self.checked(body.truncated(prompt, self.engine.ready.context), "prompt")

    async def contexts(self, body: Generate) -> list[list[int]]:
        """The tokens of the contexts that ``body`` names."""
        found = await asyncio.to_thread(self.tokens.contexts, body.contexts)
        for each in found:
            self.check_tokens(each, "contexts")
        return found

    def checked(self, prompt: list[int], param: str) -> list[int]:
        """``prompt``, if the engine will take it; ``param`` is the field that it comes from."""
        ready = self.engine.ready
        if not prompt:
            raise ApiError(400, "the prompt is empty: give at least one token to continue", param=param)
        if len(prompt) >= ready.context:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens, and a sequence can have {ready.context} with what follows",
                param=param,
                code="context_length_exceeded",
            )
        self.check_tokens(prompt, param)
        return prompt

    def check_tokens(self, tokens: Collection[int], param: str) -> None:
        """Refuses tokens of the field ``param`` that the model does not know."""
        vocabulary = self.engine.ready.vocabulary
        if tokens and max(tokens) >= vocabulary:
            raise ApiError(400, f"token {max(tokens)} is outside of the vocabulary of {vocabulary}", param=param)
