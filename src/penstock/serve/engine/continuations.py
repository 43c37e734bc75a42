"""Makes the sequences that continue a request."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from collections.abc import Sequence as List
from typing import TYPE_CHECKING

from penstock.core.errors import UsageError
from penstock.serve.choose.grammar import Grammars, Matcher
from penstock.serve.choose.restriction import restriction_of
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.choose.superposed import SuperposedTexts
from penstock.serve.engine.adapters import Adapter
from penstock.serve.engine.sequence import Sequence, common
from penstock.serve.kv.chunks import chunks_of
from penstock.serve.messages import Request
from penstock.speculate.prediction import Prediction

if TYPE_CHECKING:
    from penstock.serve.config import EngineConfig
    from penstock.speculate.contract import Draft


class Continuations:
    """Makes a sequence of each continuation of a request, with its draft and its place in its grammar.

    Args:
        config: the settings.
        vocabulary: how many tokens the model knows.
        ends: the model's own end-of-text tokens.
        grammars: compiles grammars; without it, requests cannot have one.
    """

    def __init__(
        self, config: EngineConfig, vocabulary: int, ends: frozenset[int], grammars: Grammars | None = None
    ) -> None:
        self._config, self._vocabulary, self._ends, self._grammars = config, vocabulary, ends, grammars
        self._arrivals = itertools.count()
        self._drafts = None if config.draft is None else config.draft.opened()

    def begin(
        self,
        request: Request,
        limit: int,
        given: int,
        adapter: Adapter,
        parent: Sequence | None = None,
        bounds: List[int] = (),
        origins: List[Sequence | None] = (),
    ) -> list[Sequence]:
        """The sequences of ``request``, one for each of its continuations, or for all where they are superposed.

        Args:
            limit: most tokens of each.
            given: how many tokens of the prompt count as given, the others as generated.
            adapter: what is added to the model for them.
            parent: the sequence that they go on from; None where there is no such.
            bounds: where contexts begin and end in the prompt, where they stand in it.
            origins: the sequences whose texts the contexts are parts of, if there are such.

        Raises:
            UsageError: the request has a grammar that cannot be used.
        """
        count = 1 if request.sampling.superposes else request.sampling.continuations
        matchers = [self._matcher(request, parent) for _ in range(count)]
        return [
            self._begun(request, index, limit, given, matcher, adapter, parent, bounds, origins)
            for index, matcher in enumerate(matchers)
        ]

    def _begun(
        self,
        request: Request,
        index: int,
        limit: int,
        given: int,
        matcher: Matcher | None,
        adapter: Adapter,
        parent: Sequence | None,
        bounds: List[int],
        origins: List[Sequence | None],
    ) -> Sequence:
        arrival = next(self._arrivals)
        sampling = request.sampling.model_copy(update={"seed": request.sampling.seed + index})
        stop = self._ends if not sampling.ignore_eos or matcher is not None else frozenset()
        stop |= set(sampling.stop_tokens)
        tokens = list(request.prompt)
        companions = tuple(_companions(request, limit, given, arrival, adapter))
        contexts = tuple(_contexts(request, arrival, adapter, origins))
        chunks = chunks_of(tokens, bounds, adapter.key) if self._config.kv_reuse.moves else ()
        # What a group drafts would have to be checked for all of its members, and by all copies; nor does what sees
        # contexts, or has some that a model which drafts knows nothing of, draft anything.
        superposed = _superposed(request, stop)
        alone = not companions and not contexts and not chunks and sampling.again is None and superposed is None
        sequence = Sequence(
            request,
            index,
            sampling,
            tokens,
            limit,
            arrival,
            prompt=given,
            stop=stop,
            matcher=matcher,
            restriction=restriction_of(sampling, stop, self._vocabulary),
            superposed=superposed,
            draft=self.draft(sampling, given) if alone else None,
            companions=companions,
            contexts=contexts,
            weighing=self._config.kv_reuse.weighing if contexts else None,
            chunks=chunks,
            origin=parent or next(filter(None, origins), None),
            adapter=adapter,
        )
        # In a pipeline tokens are drawn where texts do not begin: they go from step to step by way of the host.
        sequence.waits |= self._config.pipeline_parallel > 1
        return sequence

    def draft(self, sampling: SamplingParams, given: int) -> Draft | None:
        """What drafts for a sequence whose first ``given`` tokens are given, and which it is to be told of; None where
        nothing does."""
        drafter = self._config.draft
        if drafter is None or self._drafts is None or not sampling.drafts:
            return None
        if not sampling.prediction or isinstance(sampling.prediction, str):
            return self._drafts([])
        return Prediction(sampling.prediction, drafter.most, given)

    def _matcher(self, request: Request, parent: Sequence | None) -> Matcher | None:
        """Where a continuation begins in the grammar: of a fork, where the ``parent`` was, and then on its own way."""
        sampling = request.sampling
        if sampling.grammar is None:
            return None
        if parent is not None and parent.matcher is not None and parent.sampling.grammar == sampling.grammar:
            matcher = parent.matcher.copy()
            both = common(parent.tokens, request.prompt)
            matcher.rollback(len(parent.tokens) - both)
            for token in request.prompt[both:]:
                matcher.consume(token)
            return matcher
        if self._grammars is None or not self._ends:
            raise UsageError("this model serves no grammars: it has no tokenizer here, or no end-of-text token")
        return self._grammars.start(sampling.grammar)


def _superposed(request: Request, stop: frozenset[int]) -> SuperposedTexts | None:
    """The continuations of ``request``, where they are computed in one row."""
    sampling = request.sampling
    judge = None if sampling.rule is None else sampling.rule.judge(request.prompt)
    return None if judge is None else SuperposedTexts(sampling.n, judge, stop)


def _companions(request: Request, limit: int, given: int, arrival: int, adapter: Adapter) -> Iterable[Sequence]:
    """Sequences with the rule's prompts, which go on with what the request's prompt has behind its ``given`` tokens."""
    generated = request.prompt[given:]
    for prompt in request.sampling.companions:
        plain = SamplingParams(temperature=0, kv=request.sampling.kv)
        own = dataclasses.replace(request, prompt=list(prompt), sampling=plain)
        most = limit - given + len(prompt)
        text = [*prompt, *generated]
        yield Sequence(own, -1, plain, text, most, arrival, prompt=len(prompt), adapter=adapter)


def _contexts(request: Request, arrival: int, adapter: Adapter, origins: List[Sequence | None]) -> Iterable[Sequence]:
    """Sequences of the request's contexts, each behind the shared tokens of its prompt."""
    for context, origin in itertools.zip_longest(request.contexts, origins):
        text, plain = [*request.prompt[: request.shared], *context], SamplingParams(temperature=0)
        own = dataclasses.replace(request, prompt=text, sampling=plain, contexts=[])
        yield Sequence(own, -1, plain, text, len(text), arrival, origin=origin, adapter=adapter)


def in_a_row(request: Request) -> Request:
    """The ``request`` with its contexts in its prompt."""
    before, behind = request.prompt[: request.shared], request.prompt[request.shared :]
    given = None if request.given is None else request.given + request.length - len(request.prompt)
    prompt = [*before, *(token for context in request.contexts for token in context), *behind]
    first = request.sampling.prompt_logprobs_from
    later = {"prompt_logprobs_from": first + request.length - len(request.prompt)} if first else {}
    sampling = request.sampling.model_copy(update=later)
    return dataclasses.replace(request, prompt=prompt, sampling=sampling, given=given, contexts=[], shared=0)
