"""The engine core: requests in, tokens out, a step at a time."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as List
from concurrent.futures import Future, wait
from heapq import heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.errors import UsageError
from penstock.core.events import EventLog
from penstock.serve.choose.grammar import Grammars, Matcher
from penstock.serve.choose.restriction import restriction_of
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.engine.adapters import Adapter, Adapters
from penstock.serve.engine.drafted import DraftExecutor
from penstock.serve.engine.executor import Changeable, Executor, Readable
from penstock.serve.engine.limits import Limits
from penstock.serve.engine.memory.memory import Memory
from penstock.serve.engine.sequence import Sequence, common
from penstock.serve.engine.speculation import Speculation
from penstock.serve.engine.steps import Counters, EngineSteps
from penstock.serve.kv.chunks import chunks_of
from penstock.serve.kv.tiers import Tiers
from penstock.serve.messages import Delta, Finish, Request, Snapshot
from penstock.speculate.prediction import Prediction

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.serve.config import EngineConfig
    from penstock.speculate.contract import Draft


#: Seconds that an engine without other work waits for the disk before it looks for messages again.
MOMENT = 0.02


class Engine:
    """Continuous batching over a paged cache whose prefixes are shared.

    Every step a batching policy picks pieces of sequences, the executor computes them, and the tokens that come out are
    published. One thread owns an engine; other processes talk to it through messages.

    Args:
        config: the settings.
        executor: the model with its cache.
        stop: the model's own end-of-text tokens.
        grammars: compiles grammars; without it, requests cannot have one.
        draft: the model or head that drafts, where the settings name one.
        tiers: where blocks go that leave the cache.

    Attributes:
        limits: what a step may hold, and for which model.
        context: most tokens of a sequence.
        memory: who runs, and in which blocks.
        events: what was decided about which request.
        executor: who computes.
        speculation: who drafts; None where nothing is drafted.
        steps: the parts of a step, with the batcher.
        adapters: that requests can choose.
        paused, asleep: whether it was told to be: requests wait then.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        stop: Iterable[int] = (),
        grammars: Grammars | None = None,
        draft: DraftExecutor | None = None,
        tiers: Tiers | None = None,
    ) -> None:
        shape, blocks, size = executor.shape, executor.blocks, executor.block_size
        self.context = min(config.context or shape.context, shape.context, blocks * size)
        self.limits = Limits(config.budget(executor.device), config.sequences, blocks, size, shape, config.kv.selection)
        kv = config.kv.fitted(shape)
        reuse, tentative = config.kv_reuse, config.rows - 1
        self.memory = Memory(config.sequences, blocks, size, self.context, kv, config.eviction, tiers, reuse, tentative)
        self.events = EventLog()
        self._config, self._stop, self._grammars = config, frozenset(stop), grammars
        self.executor, self._counters = executor, Counters()
        self.adapters = Adapters(executor)
        batcher, tokens = config.batching.start(self.limits), self.limits.tokens
        self.speculation = (
            Speculation(config.controller, config.draft.most, draft, config.draft.shaper()) if config.draft else None
        )
        self.steps = EngineSteps(
            *(self.memory, batcher, executor, tokens, self._counters, self.events, self._drop, self.speculation),
            config.draft_tree,
            config.pipeline_parallel,
        )
        self._loop = config.loop.start(self.steps)
        self._sequences: dict[str, list[Sequence]] = {}
        self._arrivals = 0
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._untold: list[Delta] = []
        self._kept: dict[str, Sequence] = {}
        self._tiers = tiers
        self._fetching: dict[Sequence, list[Future[bool]]] = {}
        self.paused = self.asleep = False
        #: A step failed, and whoever made it knows why.
        self._failed = False

    @property
    def ends(self) -> frozenset[int]:
        """The model's own end-of-text tokens."""
        return self._stop

    # Requests

    def add(self, request: Request) -> None:
        """Takes in a request.

        Raises:
            UsageError: its prompt is empty, too long or has unknown tokens, its sampling names unknown tokens or has a
                grammar that cannot be used, its contexts do not fit, its adapter is not there, or its id is in use.
        """
        if request.contexts:
            self._check_contexts(request)
        ends = [*itertools.accumulate(map(len, request.contexts), initial=request.shared)]
        if request.contexts and self._config.kv_reuse.weighing is None:
            request = _in_a_row(request)
        self._check(request)
        adapter = self.adapters.named(request.adapter)
        given = len(request.prompt) if request.given is None else request.given
        limit = self._limit(request, given)
        matchers = [self._matcher(request) for _ in range(request.sampling.continuations)]
        for index, matcher in enumerate(matchers):
            self._enter(request, index, limit, given, matcher, adapter, ends=ends)

    def fork(self, id: str, request: Request, index: int = 0) -> None:
        """Starts ``request``, whose prompt begins as the continuation ``index`` of the request ``id`` does, on the same
        blocks: of what they have in common nothing is computed twice but the last token, and a block is copied only
        when one of them writes to it. The request ``id`` is under way, or it has ended and was kept.

        What the parent generated counts as generated: for penalties, for ``min_tokens``, for the draws, and for a
        grammar that both have, which goes on where the parent is.

        Raises:
            UsageError: there is no such continuation; the new prompt does not begin with its prompt; it has another
                adapter; or what :meth:`add` refuses.
        """
        parent = self._kept.get(id) or self._living(id, index)
        if parent.contexts or parent.chunks or request.contexts:
            raise UsageError(
                f"{request.id!r} cannot go on from {id!r}: one of them has contexts that are encoded apart, or moved",
                hint="Ask anew, or serve with kv_reuse = prefix.",
            )
        if parent.tokens[: parent.prompt] != request.prompt[: parent.prompt]:
            raise UsageError(f"the prompt of {request.id!r} does not begin with that of {id!r}")
        if request.adapter != parent.adapter.name:
            raise UsageError(f"{request.id!r} names the adapter {request.adapter!r}, and {id!r} has another")
        self._check(request)
        limit = self._limit(request, parent.prompt)
        matchers = [self._matcher(request, parent) for _ in range(request.sampling.continuations)]
        self.events.add("forked", id, index, into=request.id)
        for number, matcher in enumerate(matchers):
            child = self._enter(request, number, limit, parent.prompt, matcher, parent.adapter, parent)
            if not child.companions and self.memory.fork(parent, child):
                self.steps.batcher.remove(child)
                child.cached = child.computed
                self._counters.cached_tokens += child.cached
                self.events.add(
                    "admitted", request.id, number, cached=child.cached, tokens=len(request.prompt), forked=id
                )

    def truncate(self, id: str, length: int, index: int = 0) -> None:
        """Takes back what the continuation ``index`` of the request ``id`` generated behind its first ``length``
        tokens, prompt included; it goes on from there. Tokens that were under way are told with the next step, and are
        taken back with the others.

        Raises:
            UsageError: there is no such continuation, or it does not have so many tokens, or fewer were its prompt.
        """
        self._settle()
        sequence = self._living(id, index)
        if not sequence.prompt <= length <= len(sequence.tokens):
            raise UsageError(f"{id!r} can be cut to {sequence.prompt} to {len(sequence.tokens)} tokens, not {length}")
        gone = len(sequence.tokens) - length
        if sequence.matcher is not None:
            sequence.matcher.rollback(gone)
        for member in sequence.lockstep:
            del member.tokens[len(member.tokens) - gone :]
            member.compressed = [place for place in member.compressed if place < len(member.tokens)]
            if member.held is not None:
                self.memory.truncate(member, len(member.tokens) - 1)
        self._changed(sequence)
        self.events.add("truncated", id, index, tokens=gone, left=length)

    def feed(self, id: str, tokens: List[int], index: int = 0) -> None:
        """Appends ``tokens`` to the continuation ``index`` of the request ``id``, as if it had generated them; it goes
        on behind them. They are not told as news.

        Raises:
            UsageError: there is no such continuation, they do not fit, one is unknown, or its grammar does not allow
                them.
        """
        self._settle()
        sequence = self._living(id, index)
        self._known(tokens, "a token that is fed")
        if len(sequence.tokens) + len(tokens) >= sequence.limit:
            raise UsageError(
                f"{id!r} can come to {sequence.limit} tokens, too few for {len(tokens)} more and a next one"
            )
        if sequence.matcher is not None:
            if sequence.matcher.allowed(tokens) < len(tokens):
                raise UsageError(f"the grammar of {id!r} does not allow these tokens")
            for token in tokens:
                sequence.matcher.consume(token)
        for member in sequence.lockstep:
            member.tokens.extend(tokens)
        self._changed(sequence)
        self.events.add("fed", id, index, tokens=len(tokens))

    def abort(self, id: str, index: int | None = None) -> None:
        """Ends a request, or only its continuation ``index``, and frees what it holds at once; an unknown one is
        ignored."""
        for sequence in list(self._sequences.get(id, ())):
            if index is None or sequence.index == index:
                self._end(sequence, Finish.ABORT)

    def kept_blocks(self, ids: Iterable[str]) -> int:
        """How many blocks the requests ``ids`` hold that were kept, each counted once."""
        found = (self._kept[id].held for id in ids if id in self._kept)
        return len({block for held in found if held is not None for block in held.blocks})

    def forget(self, id: str) -> None:
        """Nobody will go on from the request ``id``, which was kept; an unknown one is ignored."""
        sequence = self._kept.pop(id, None)
        if sequence is not None:
            self.memory.forget(sequence)

    def _living(self, id: str, index: int) -> Sequence:
        for sequence in self._sequences.get(id, ()):
            if sequence.index == index:
                return sequence
        raise UsageError(f"there is no continuation {index} of a request {id!r} under way")

    def _changed(self, sequence: Sequence) -> None:
        """The text of ``sequence`` was changed from outside."""
        if sequence.draft is not None:
            sequence.draft = self._draft(sequence.sampling, sequence.tokens, sequence.prompt)
        for member in sequence.members:
            if member.held is not None:
                self.memory.renew(member)

    def _settle(self) -> None:
        """Nothing is on its way: all tokens are known."""
        self._untold += self._loop.drain()

    # What a request must be

    def _check(self, request: Request) -> None:
        vocabulary, sampling = self.limits.model.vocabulary, request.sampling
        if request.id in self._sequences or request.id in self._kept:
            raise UsageError(f"a request {request.id!r} is under way already, or kept")
        if request.given is not None and not 0 < request.given <= len(request.prompt):
            raise UsageError(f"{request.given} tokens of a prompt of {len(request.prompt)} cannot count as given")
        if request.keep and (sampling.continuations > 1 or sampling.companions):
            raise UsageError("only a request with one continuation, whose rule has no prompts of its own, can be kept")
        if not request.prompt:
            raise UsageError("the prompt is empty", hint="Give at least one token to continue.")
        if len(request.prompt) >= self.context:
            raise UsageError(
                f"the prompt has {len(request.prompt)} tokens, and a sequence can have {self.context} with what follows"
            )
        self._known(request.prompt, "the prompt has a token that")
        for prompt in sampling.companions:
            self._known(prompt, "the rule's prompt has a token that")
        self._copied(sampling)
        self._known(
            () if isinstance(sampling.prediction, str) else sampling.prediction, "the prediction has a token that"
        )
        words = [token for word in sampling.bad_words if not isinstance(word, str) for token in word]
        allowed = sampling.allowed_tokens or ()
        named = max([*sampling.logit_bias, *sampling.stop_tokens, *allowed, *words], default=0)
        if named >= vocabulary:
            raise UsageError(
                f"logit_bias, stop_tokens, allowed_tokens or bad_words name the token {named}, which is outside of the "
                f"vocabulary of {vocabulary}"
            )
        restriction_of(sampling, (), vocabulary)
        if not sampling.prompt_logprobs_from < len(request.prompt) + (sampling.prompt_logprobs is None):
            first, length = sampling.prompt_logprobs_from, len(request.prompt)
            raise UsageError(f"prompt_logprobs_from is {first}, and the prompt has {length} tokens")

    def _copied(self, sampling: SamplingParams) -> None:
        """Refuses a rule that has tokens computed again where they cannot be."""
        if sampling.again is None:
            return
        if self.limits.model.moe is None:
            raise UsageError(
                "the rule has other experts chosen, and this model has no experts",
                hint="Leave out the rule, or serve a mixture of experts.",
            )
        if sampling.again.more >= self.limits.tokens:
            raise UsageError(
                f"a step computes {self.limits.tokens} tokens, too few for {sampling.again.more + 1} copies of one",
                hint="Ask for fewer copies, or raise engine.tokens.",
            )

    def _check_contexts(self, request: Request) -> None:
        if not 0 <= request.shared <= len(request.prompt) - 1:
            raise UsageError(
                f"contexts cannot stand behind {request.shared} of the prompt's {len(request.prompt)} tokens: at least "
                "one has to follow"
            )
        for number, context in enumerate(request.contexts):
            if not context:
                raise UsageError(f"context {number} is empty", hint="Leave it out.")
            self._known(context, f"context {number} has a token that")
        wanted = request.sampling.prompt_logprobs is not None
        if wanted and request.sampling.prompt_logprobs_from <= request.shared:
            raise UsageError(
                "a prompt's log-probabilities are told behind what follows its contexts alone",
                hint="Leave prompt_logprobs (or echo with logprobs) out, or give prompt_logprobs_from, "
                f"{request.shared + 1} or more.",
            )
        if self._config.kv_reuse.plain:
            return
        sampling = request.sampling
        if request.keep or request.given is not None or sampling.companions or sampling.again is not None:
            raise UsageError(
                "a request with contexts that are encoded apart, or moved, cannot be kept, nor go on from another, nor "
                "have a rule with prompts of its own, or one that has tokens computed again",
                hint="Serve with kv_reuse = prefix, which puts contexts into the prompt.",
            )

    def _known(self, tokens: List[int], what: str) -> None:
        vocabulary = self.limits.model.vocabulary
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise UsageError(f"{what} is outside of the vocabulary of {vocabulary}")

    def _limit(self, request: Request, given: int) -> int:
        """The most tokens of the request's sequences; those of its prompt behind the ``given`` ones are generated."""
        prompt, others = len(request.prompt), [len(each) for each in request.sampling.companions]
        if request.contexts:
            return self._limit_beside(request)
        others = [each + prompt - given for each in others]
        if not others:
            return min(self.context, prompt + request.sampling.max_tokens)
        # All have to fit, each with a last block that may be nearly empty.
        members, size = 1 + len(others), self.limits.block_size
        room = self.limits.blocks * size - members * (size - 1)
        left = min(self.context - max(prompt, *others), (room - prompt - sum(others)) // members)
        if left < 1 or self.limits.sequences < members:
            raise UsageError(
                f"there is no room for the prompt and, beside it, the rule's {sum(others)} tokens of prompts",
                hint="Shorten them, or raise engine.sequences, engine.context and engine.cache_tokens.",
            )
        return prompt + min(left, request.sampling.max_tokens)

    def _limit_beside(self, request: Request) -> int:
        """The same of a request that sees contexts: it stands behind the longest, and all of them have to fit."""
        prompt, size = len(request.prompt), self.limits.block_size
        lengths = [request.shared + len(context) for context in request.contexts]
        room = self.limits.blocks * size - sum(-(-length // size) * size for length in lengths)
        limit = min(self.context - max(map(len, request.contexts)), room, prompt + request.sampling.max_tokens)
        if limit <= prompt or self.limits.sequences <= len(lengths):
            raise UsageError(
                f"there is no room for the prompt's {prompt} tokens beside {len(lengths)} contexts with up to "
                f"{max(lengths) - request.shared} tokens and {request.length - prompt} in all",
                hint="Give fewer or shorter ones, or raise engine.sequences, engine.context and engine.cache_tokens.",
            )
        return limit

    def _matcher(self, request: Request, parent: Sequence | None = None) -> Matcher | None:
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
        if self._grammars is None or not self._stop:
            raise UsageError("this model serves no grammars: it has no tokenizer here, or no end-of-text token")
        return self._grammars.start(sampling.grammar)

    def _enter(
        self,
        request: Request,
        index: int,
        limit: int,
        prompt: int,
        matcher: Matcher | None,
        adapter: Adapter,
        origin: Sequence | None = None,
        ends: List[int] = (),
    ) -> Sequence:
        """A new sequence waits; its first ``prompt`` tokens count as given, and contexts stand between ``ends`` in
        them."""
        sampling = request.sampling.model_copy(update={"seed": request.sampling.seed + index})
        stop = self._stop if not sampling.ignore_eos or matcher is not None else frozenset()
        stop |= set(sampling.stop_tokens)
        tokens, companions = list(request.prompt), tuple(self._companions(request, limit, prompt, adapter))
        contexts = tuple(self._contexts(request, adapter))
        chunks = chunks_of(tokens, ends, adapter.key) if self._config.kv_reuse.moves else ()
        # What a group drafts would have to be checked for all of its members, and by all copies; nor does what sees
        # contexts, or has some that a model which drafts knows nothing of, draft anything.
        alone = not companions and not contexts and not chunks and sampling.again is None
        sequence = Sequence(
            request,
            index,
            sampling,
            tokens,
            limit,
            self._arrivals,
            prompt=prompt,
            stop=stop,
            matcher=matcher,
            restriction=restriction_of(sampling, stop, self.limits.model.vocabulary),
            draft=self._draft(sampling, tokens, prompt) if alone else None,
            companions=companions,
            contexts=contexts,
            weighing=self._config.kv_reuse.weighing if contexts else None,
            chunks=chunks,
            origin=origin,
            adapter=adapter,
        )
        # In a pipeline tokens are drawn where texts do not begin: they go from step to step by way of the host.
        sequence.waits |= self._config.pipeline_parallel > 1
        if request.deadline is not None:
            sequence.deadline = time.monotonic() + request.deadline
            heappush(self._deadlines, (sequence.deadline, sequence.arrival, sequence))
        self._arrivals += 1
        self._sequences.setdefault(request.id, []).append(sequence)
        self._counters.prompt_tokens += request.length
        self.events.add("arrived", request.id, index, tokens=request.length, waiting=self.steps.batcher.waiting)
        coming = [] if origin is not None else self.memory.fetch(sequence)
        if coming:
            self._fetching[sequence] = coming
        else:
            self.steps.batcher.add(sequence)
        return sequence

    def _draft(self, sampling: SamplingParams, tokens: List[int], prompt: int) -> Draft | None:
        """What drafts for a sequence of ``tokens``, the first ``prompt`` of which were given."""
        drafter = self._config.draft
        if drafter is None or not sampling.drafts:
            return None
        if not sampling.prediction or isinstance(sampling.prediction, str):
            return drafter.start(tokens)
        draft = Prediction(sampling.prediction, drafter.most)
        draft.extend(tokens[prompt:])
        return draft

    def _companions(self, request: Request, limit: int, given: int, adapter: Adapter) -> Iterable[Sequence]:
        """Sequences with the rule's prompts, which go on with what the request's prompt has behind its ``given``
        tokens."""
        generated = request.prompt[given:]
        for prompt in request.sampling.companions:
            plain = SamplingParams(temperature=0)
            own = dataclasses.replace(request, prompt=list(prompt), sampling=plain)
            most = limit - given + len(prompt)
            text = [*prompt, *generated]
            yield Sequence(own, -1, plain, text, most, self._arrivals, prompt=len(prompt), adapter=adapter)

    def _contexts(self, request: Request, adapter: Adapter) -> Iterable[Sequence]:
        """Sequences of the request's contexts, each behind the shared tokens of its prompt."""
        for context in request.contexts:
            text, plain = [*request.prompt[: request.shared], *context], SamplingParams(temperature=0)
            own = dataclasses.replace(request, prompt=text, sampling=plain, contexts=[])
            yield Sequence(own, -1, plain, text, len(text), self._arrivals, adapter=adapter)

    # Steps

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._untold) or (not self.stopped and (bool(self._sequences) or not self._loop.idle))

    @property
    def stopped(self) -> bool:
        """Whether requests wait for it to go on: it is paused, or asleep."""
        return self.paused or self.asleep

    @property
    def due(self) -> float | None:
        """While it is :attr:`stopped`, the seconds until the next request passes its deadline; else None."""
        return max(0.0, self._deadlines[0][0] - time.monotonic()) if self.stopped and self._deadlines else None

    def step(self) -> list[Delta]:
        """Does one step; returns what became known, at most one delta for each sequence and reason."""
        self._expire()
        if self.stopped:
            deltas, self._untold = self._untold, []
            return deltas
        self._arrive()
        begun = time.perf_counter()
        try:
            deltas = self._loop.step()
        except Exception:
            self._failed = True
            raise
        deltas, self._untold = self._untold + deltas, []
        self.steps.last.seconds = time.perf_counter() - begun
        if self._config.check:
            self.memory.check()
        return deltas

    def states(self, texts: List[List[int]]) -> list[Tensor]:
        """The hidden states after the model's last norm of all tokens of ``texts``, float32 [tokens, hidden] each, on
        the CPU: computed now, from the beginning, beside the batches and without their cache.

        Raises:
            UsageError: the model is not here as a whole, or asleep.
        """
        if not isinstance(self.executor, Readable):
            raise UsageError(
                "hidden states can be had of a model that one process has as a whole, and records no steps"
            )
        if self.asleep:
            raise UsageError("the engine is asleep", hint="Wake it before it computes hidden states.")
        return self.executor.states(texts)

    # Pausing, sleeping, and other weights

    @property
    def version(self) -> int:
        """Of the weights: 0 are those that it was opened with."""
        return self.steps.version

    def pause(self) -> None:
        """Lets requests wait, those under way with all that they have; others may come. Their deadlines pass."""
        self._settle()
        self.paused = True

    def resume(self) -> None:
        """Lets requests go on, with the same tokens as if there had been no pause."""
        self.paused = False

    def sleep(self) -> None:
        """Lets requests wait, and frees the memory of the model and of its cache: on CUDA the host keeps the weights,
        on a CPU they are read again, unless they came from a program and not from a folder. Of a model that drafts, all
        stays.

        Raises:
            UsageError: it records its steps.
        """
        executor = self._changeable()
        if not self.asleep:
            self._void("sleep")
            executor.sleep()
            self.asleep = True

    def wake(self) -> None:
        """Brings back what :meth:`sleep` freed. Requests that were under way are computed again up to where they were,
        and go on, unless it is paused besides.

        Raises:
            PenstockError: the memory is not there any more, or the weights cannot be read again; it sleeps on.
        """
        if self.asleep:
            self._changeable().wake()
            self.asleep = False

    def load(self, weights: Mapping[str, Tensor] | str | Path, version: int | None = None) -> int:
        """Puts other weights in the place of the model's, between steps: those of a folder, or tensors by the names of
        ``Decoder.state_dict``, such as a trainer's. What was computed with the old ones is forgotten: every request
        that comes is answered as by a new engine, and those under way go on with the new weights behind the tokens that
        they have. Adapters stay, on the new weights.

        Args:
            version: what they are called from now on, in every delta; one more than before if not given.

        Returns:
            The version.

        Raises:
            UsageError, ModelError: they are not weights of such a model, or this engine cannot take any. Nothing has
                changed then.
        """
        executor = self._changeable()
        if self.asleep:
            raise UsageError("the engine is asleep", hint="Wake it before it is given weights.")
        if version is not None and version < 0:
            raise UsageError(f"a version is a number from 0 on, not {version}")
        self._settle()
        executor.load(Path(weights) if isinstance(weights, str) else weights)
        self._void("load")
        if self._tiers is not None:
            self._tiers.forget()
        self.steps.version = self.version + 1 if version is None else version
        return self.version

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Loads the adapter of ``folder``, between steps: requests choose it by ``name`` from now on.

        Raises:
            PenstockError: it cannot be had, or does not fit the model, or there is no slot, or the name is taken.
                Nothing has changed then.
        """
        sequences = [*(each for own in self._sequences.values() for each in own), *self._kept.values()]
        self.adapters.load(name, Path(folder), {each.adapter for each in sequences})

    def drop_adapter(self, name: str) -> None:
        """No request can choose the adapter ``name`` any more. Those that have it go on with it to their end, and what
        is forked from them has it too; then its slot is free.

        Raises:
            UsageError: there is no such.
        """
        self.adapters.drop(name)

    def _changeable(self) -> Changeable:
        if not isinstance(self.executor, Changeable):
            raise UsageError(
                "an engine that records its steps has the same weights all the time", hint="Leave out `record`."
            )
        return self.executor

    def _void(self, why: str) -> None:
        """What the cache holds is of no use any more, since it was told to ``why``: whoever ran waits, and is computed
        again."""
        self._settle()
        for sequence, coming in self._fetching.items():
            wait(coming)
            self.steps.batcher.add(sequence)
        self._fetching.clear()
        lost = [(sequence, sequence.computed) for sequence in self.memory.running]
        self.memory.clear()
        self._counters.preemptions += len(lost)
        for sequence, computed in lost:
            sequence.preempted = True
            self.events.add("preempted", sequence.request.id, sequence.index, why=why, computed=computed)
            self.steps.batcher.add(sequence)

    # Ends

    def _drop(self, sequence: Sequence, finish: Finish) -> None:
        """Ends ``sequence`` and frees what it holds."""
        if sequence.running:
            for member in sequence.members:
                self.memory.commit(member)
            if sequence.request.keep:
                self.memory.keep(sequence)
            else:
                self.memory.release(sequence)
        elif self._fetching.pop(sequence, None) is None:
            self.steps.batcher.remove(sequence)
        sequence.finish, sequence.origin = finish, None
        if sequence.request.keep:
            self._kept[sequence.request.id] = sequence
        generated = len(sequence.tokens) - sequence.prompt
        self.events.add("finished", sequence.request.id, sequence.index, reason=finish.value, generated=generated)
        siblings = self._sequences[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.request.id]

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        """Ends ``sequence`` between steps, and says so with the next one."""
        self._drop(sequence, finish)
        self._untold.append(Delta(sequence.request.id, sequence.index, [], finish=finish))

    def _arrive(self) -> None:
        """Those wait for memory from now on whose beginning has come from disk. Where there is nothing else to do, it
        is waited for, a moment at a time."""
        if self._fetching and not self.memory.running and not self.steps.batcher.waiting:
            wait(next(iter(self._fetching.values())), MOMENT)
        for sequence, coming in list(self._fetching.items()):
            if all(each.done() for each in coming):
                del self._fetching[sequence]
                self.steps.batcher.add(sequence)

    def _expire(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            _, _, sequence = heappop(self._deadlines)
            if sequence.finish is None:
                self._end(sequence, Finish.DEADLINE)

    def close(self) -> None:
        """Ends the engine: what is on its way is computed to its end, and told to nobody. Where that fails, the engine
        has ended all the same. Where a step has failed before, there is nothing left to compute."""
        try:
            if not self._failed:
                self._loop.drain()
        finally:
            self.executor.close()
            if self._tiers is not None:
                self._tiers.close()

    def snapshot(self) -> Snapshot:
        """The engine's state now."""
        last, speculation, tiers = self.steps.last, self.speculation, self._tiers
        return Snapshot(
            running=len(self.memory.running),
            waiting=self.steps.batcher.waiting + len(self._fetching),
            blocks=self.limits.blocks,
            held=self.memory.pool.held,
            hits=self.memory.hits,
            misses=self.memory.misses,
            evicted=self.memory.pool.evicted,
            tier_bytes=(0, 0) if tiers is None else (tiers.host_bytes, tiers.disk_bytes),
            tier_hits=(0, 0) if tiers is None else (tiers.host_hits, tiers.disk_hits),
            batch_tokens=last.tokens,
            batch_sequences=len(last.entries),
            step_seconds=last.seconds,
            drafted_at=() if speculation is None else tuple(speculation.drafted),
            accepted_at=() if speculation is None else tuple(speculation.accepted),
            version=self.version,
            paused=self.paused,
            asleep=self.asleep,
            adapters=self.adapters.names,
            **dataclasses.asdict(self._counters),
        )


def _in_a_row(request: Request) -> Request:
    """The ``request`` with its contexts in its prompt."""
    before, behind = request.prompt[: request.shared], request.prompt[request.shared :]
    given = None if request.given is None else request.given + request.length - len(request.prompt)
    prompt = [*before, *(token for context in request.contexts for token in context), *behind]
    first = request.sampling.prompt_logprobs_from
    later = {"prompt_logprobs_from": first + request.length - len(request.prompt)} if first else {}
    sampling = request.sampling.model_copy(update=later)
    return dataclasses.replace(request, prompt=prompt, sampling=sampling, given=given, contexts=[], shared=0)
