"""Requests in, whole results out: an engine in this process, for work that is not streamed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, overload

from penstock.models.vocabulary import Vocabulary
from penstock.serve.choose.logprobs import LogprobRows, TokenLogprobs
from penstock.serve.choose.sampling import best
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Delta, Finish, Request
from penstock.serve.reader import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Logprob:
    """A token's log-probability, its rank (1 is the most probable) and its text."""

    logprob: float
    rank: int
    decoded_token: str


class Logprobs(Sequence[dict[int, Logprob]]):
    """For each position, the token that stands there and the most probable ones. They are made when they are read: an
    engine is not kept waiting for them.

    Args:
        rows: what the engine said; more may be added.
        vocabulary: names tokens.
    """

    def __init__(self, rows: LogprobRows, vocabulary: Vocabulary) -> None:
        self._parts, self._vocabulary = [rows], vocabulary

    @property
    def rows(self) -> LogprobRows:
        """The same, as the engine said it."""
        self._parts = [LogprobRows.joined(self._parts)] if len(self._parts) > 1 else self._parts
        return self._parts[0]

    def add(self, rows: LogprobRows) -> None:
        """Those of more tokens."""
        self._parts.append(rows)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @overload
    def __getitem__(self, place: int) -> dict[int, Logprob]: ...
    @overload
    def __getitem__(self, place: slice) -> list[dict[int, Logprob]]: ...
    def __getitem__(self, place: int | slice) -> dict[int, Logprob] | list[dict[int, Logprob]]:
        if isinstance(place, slice):
            return [self._named(each) for each in self.rows[place]]
        return self._named(self.rows[place])

    def __iter__(self) -> Iterator[dict[int, Logprob]]:
        return map(self._named, self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def _named(self, scores: TokenLogprobs) -> dict[int, Logprob]:
        found = {token: (logprob, rank) for rank, (token, logprob) in enumerate(scores.top, start=1)}
        found[scores.token] = (scores.logprob, scores.rank)
        name = self._vocabulary.name
        return {token: Logprob(*told, name(token).decode(errors="replace")) for token, told in found.items()}


@dataclasses.dataclass
class CompletionOutput:
    """One continuation.

    Attributes:
        index: which of the request's continuations.
        text: without the stop string or token that ended it.
        token_ids: all tokens, with a stop token.
        finish_reason: ``stop``, ``length``, ``abort``, ``deadline`` or ``error``; None while it goes on.
        stop_reason: the stop string or token that ended it, None where it was the model's own end of text or none.
        logprobs: for each of ``token_ids``, where they were asked for.
        text_offsets: where in the text each of ``token_ids`` begins, in characters, where log-probabilities were.
        weights_version: of the weights that its newest tokens come from.
    """

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: Logprobs | None = None
    text_offsets: list[int] | None = None
    weights_version: int = 0


@dataclasses.dataclass
class RequestOutput:
    """What came of a request.

    Attributes:
        request_id: its id.
        prompt: its text, None where tokens were given.
        prompt_token_ids: its tokens.
        outputs: its continuations, by index.
        prompt_logprobs: for each prompt token but the first, where they were asked for.
        num_context_tokens: tokens of the contexts that it named beside its prompt.
        num_cached_tokens: tokens of the prompt and of contexts that were in the cache already.
        num_drafted_tokens, num_accepted_tokens: tokens that were drafted, and those of them that were accepted.
        error: what failed where a continuation's ``finish_reason`` is ``error``; other requests go on.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: Logprobs | None = None
    num_context_tokens: int = 0
    num_cached_tokens: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether all continuations have ended."""
        return all(output.finish_reason is not None for output in self.outputs)


class Gatherer:
    """Submits requests to ``engine``, steps it, and gathers what it says into whole results.

    Stop strings are found here: the engine knows tokens only.
    """

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
        self.engine, self._tokenizer = engine, tokenizer
        self._vocabulary = Vocabulary(tokenizer.backend_tokenizer)
        self._open: dict[str, _Open] = {}

    @property
    def pending(self) -> int:
        """Requests that have not finished."""
        return len(self._open)

    def submit(self, request: Request, prompt: str | None = None, shown: Mapping[int, str] | None = None) -> None:
        """Adds a request; ``prompt`` is its text where it has one. Special tokens that are ``shown`` are part of the
        text, as they are written there.

        Raises:
            UsageError: the engine refuses it.
        """
        self.engine.add(request)
        outputs = [CompletionOutput(index) for index in range(request.sampling.continuations)]
        readers = [Reader(request, self._tokenizer.backend_tokenizer, shown) for _ in outputs]
        contexts = request.length - len(request.prompt)
        result = RequestOutput(request.id, prompt, request.prompt, outputs, num_context_tokens=contexts)
        self._open[request.id] = _Open(request, result, readers)

    def step(self) -> list[RequestOutput]:
        """Does one step of the engine; returns the requests that finished in it. One that cannot be read, whatever the
        reason, is finished too, with its ``error``."""
        ended = []
        for delta in self.engine.step():
            found = self._open.get(delta.id)
            # Of what was ended from here, the engine's last word comes late.
            if found is not None and found.readers[delta.index].finish is None:
                try:
                    self._take(found, delta)
                    finished = _chosen(found) if found.result.finished else None
                except Exception as error:  # whatever it is, it is this request's alone
                    finished = self._failed(found, error)
                if finished is not None:
                    ended.append(finished)
                    del self._open[delta.id]
        return ended

    def cancel(self, id: str) -> None:
        """Ends a request, of which nothing more is heard."""
        self.engine.abort(id)
        del self._open[id]

    def abandon(self) -> None:
        """Ends all requests, and leaves the engine idle with nothing held for them."""
        for id in list(self._open):
            self.cancel(id)
        while self.engine.busy:
            self.engine.step()

    def _failed(self, found: _Open, error: Exception) -> RequestOutput:
        """The result of a request that fails with ``error``: with what it has."""
        result = found.result
        log.error("the request %s failed", result.request_id, exc_info=error)
        self.engine.abort(result.request_id)
        result.error = f"{type(error).__name__}: {error}"
        result.outputs = result.outputs[: found.request.sampling.n]
        for output in result.outputs:
            output.finish_reason = Finish.ERROR.value
        return result

    def _take(self, found: _Open, delta: Delta) -> None:
        """Adds what ``delta`` says to the result."""
        result, output, reading = (
            found.result,
            found.result.outputs[delta.index],
            found.readers[delta.index].read(delta),
        )
        result.num_cached_tokens = max(result.num_cached_tokens, delta.cached)
        result.num_drafted_tokens += delta.drafted
        result.num_accepted_tokens += reading.accepted
        if reading.prompt_logprobs is not None:
            result.prompt_logprobs = Logprobs(reading.prompt_logprobs, self._vocabulary)
        output.text += reading.text
        output.token_ids += reading.tokens
        if reading.logprobs is not None:
            if output.logprobs is None:
                output.logprobs = Logprobs(reading.logprobs, self._vocabulary)
            else:
                output.logprobs.add(reading.logprobs)
            output.text_offsets = (output.text_offsets or []) + (reading.offsets or [])
        output.weights_version = max(output.weights_version, delta.version)
        output.stop_reason = reading.stopped
        output.finish_reason = None if reading.finish is None else reading.finish.value
        if reading.early:
            self.engine.abort(delta.id, delta.index)


@dataclasses.dataclass
class _Open:
    """A request under way: what is known of its result, and who reads the news of each continuation."""

    request: Request
    result: RequestOutput
    readers: list[Reader]


def _chosen(found: _Open) -> RequestOutput:
    """The result with the best ``n`` of its continuations, where more were drawn than are wanted."""
    result, sampling = found.result, found.request.sampling
    if sampling.continuations > sampling.n:
        scores = [[] if output.logprobs is None else output.logprobs.rows.logprobs for output in result.outputs]
        result.outputs = [result.outputs[index] for index in best(scores, sampling.n)]
        for index, output in enumerate(result.outputs):
            output.index = index
            output.logprobs = output.logprobs if sampling.logprobs is not None else None
    return result
