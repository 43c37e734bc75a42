"""The engine core: requests in, tokens out, a step at a time."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable
from collections.abc import Sequence as List
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

from penstock.core.errors import UsageError
from penstock.core.events import EventLog
from penstock.serve.choose.grammar import Grammars
from penstock.serve.engine.adapters import Adapters
from penstock.serve.engine.admission import Admission
from penstock.serve.engine.continuations import Continuations, in_a_row
from penstock.serve.engine.control import EngineControl
from penstock.serve.engine.drafted import DraftExecutor
from penstock.serve.engine.executor import Compressing, Executor
from penstock.serve.engine.limits import Limits
from penstock.serve.engine.memory.memory import Memory
from penstock.serve.engine.requests import Requests
from penstock.serve.engine.sequence import Sequence
from penstock.serve.engine.speculation import Speculation
from penstock.serve.engine.steps import Counters, EngineSteps
from penstock.serve.engine.superposed import told
from penstock.serve.kv.tiers import Tiers
from penstock.serve.messages import Delta, Finish, Request, Snapshot

if TYPE_CHECKING:
    from penstock.serve.config import EngineConfig


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
        ends: the model's own end-of-text tokens.
        memory: who runs, and in which blocks.
        events: what was decided about which request.
        executor: who computes.
        requests: that are under way, or kept.
        adapters: that requests can choose.
        steps: the parts of a step, with the batcher, and with who drafts.
        control: what an operator does with it.
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
        context = min(config.context or shape.context, shape.context, blocks * size)
        tokens, selection = config.budget(executor.device), config.kv.selection
        reuse, tentative, residual = config.kv_reuse, config.rows - 1, config.residual
        apart = reuse.weighing is not None
        self.limits = Limits(tokens, config.sequences, blocks, size, context, shape, selection, apart, residual)
        kv = config.kv.fitted(shape)
        self.memory = Memory(
            *(config.sequences, blocks, size, context, kv, config.eviction, tiers, reuse, tentative, residual)
        )
        self.events, self.ends, self.executor = EventLog(), frozenset(stop), executor
        self._policy = config.kv.policy_name
        self._compressing = executor if isinstance(executor, Compressing) else None
        self.requests = Requests()
        self.adapters = Adapters(executor, self.requests.adapters)
        self._config, self._tiers, self._counters = config, tiers, Counters()
        speculation = (
            Speculation(config.controller, config.draft.most, draft, config.draft.shaper()) if config.draft else None
        )
        batcher = config.batching.start(self.limits)
        self.steps = EngineSteps(
            *(self.memory, batcher, executor, tokens, self._counters, self.events, self._drop, speculation),
            config.tree,
            config.pipeline_parallel,
        )
        self._loop = config.loop.start(self.steps)
        self._admission = Admission(self.limits, reuse)
        self._continuations = Continuations(config, shape.vocabulary, self.ends, grammars)
        self.control = EngineControl(executor, self.steps, self._settle, self._void, tiers)
        self._untold: list[Delta] = []
        self._fetching: dict[Sequence, list[Future[bool]]] = {}
        #: A step failed, and whoever made it knows why.
        self._failed = False

    # Requests

    def add(self, request: Request, sources: List[str | None] = ()) -> None:
        """Takes in a request.

        Args:
            sources: for each of its contexts, where these are encoded apart, the request that was kept whose text
                begins with the prompt's shared tokens and the context, if there is one: what both have is not computed
                again, but for the context's last token.

        Raises:
            UsageError: its prompt is empty, too long or has unknown tokens, its sampling names unknown tokens or has a
                grammar that cannot be used, its contexts do not fit, its adapter is not there, or its id is in use.
        """
        if request.contexts:
            self._admission.check_contexts(request)
        bounds = [*itertools.accumulate(map(len, request.contexts), initial=request.shared)]
        if request.contexts and self._config.kv_reuse.weighing is None:
            request = in_a_row(request)
        self.requests.check_new(request.id)
        self._admission.check(request)
        adapter = self.adapters.named(request.adapter)
        given = len(request.prompt) if request.given is None else request.given
        limit = self._admission.limit(request, given)
        origins = [None if id is None else self.requests.parent(id, 0) for id in sources]
        for sequence in self._continuations.begin(request, limit, given, adapter, bounds=bounds, origins=origins):
            self._enter(sequence)

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
        parent = self.requests.parent(id, index)
        if parent.contexts or parent.chunks or request.contexts:
            raise UsageError(
                f"{request.id!r} cannot go on from {id!r}: one of them has contexts that are encoded apart, or moved",
                hint="Ask anew, or serve with kv_reuse = prefix.",
            )
        if parent.tokens[: parent.prompt] != request.prompt[: parent.prompt]:
            raise UsageError(f"the prompt of {request.id!r} does not begin with that of {id!r}")
        if request.adapter != parent.adapter.name:
            raise UsageError(f"{request.id!r} names the adapter {request.adapter!r}, and {id!r} has another")
        self.requests.check_new(request.id)
        self._admission.check(request)
        limit = self._admission.limit(request, parent.prompt)
        children = self._continuations.begin(request, limit, parent.prompt, parent.adapter, parent)
        self.events.add("forked", id, index, into=request.id)
        for child in children:
            self._enter(child)
            if not child.companions and self.memory.fork(parent, child):
                self.steps.batcher.remove(child)
                child.cached = child.computed
                self._counters.cached_tokens += child.cached
                self.events.add(
                    "admitted", request.id, child.index, cached=child.cached, tokens=len(request.prompt), forked=id
                )

    def truncate(self, id: str, length: int, index: int = 0) -> None:
        """Takes back what the continuation ``index`` of the request ``id`` generated behind its first ``length``
        tokens, prompt included; it goes on from there, and so does its grammar, which begins anew where none of its
        text is left. Tokens that were under way are told with the next step, and are taken back with the others.

        Raises:
            UsageError: there is no such continuation, or it does not have so many tokens, or fewer were its prompt, or
                it is computed with others in one row.
        """
        self._settle()
        sequence = self._alone(id, index)
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
            UsageError: there is no such continuation, they do not fit, one is unknown, its grammar does not allow them,
                or it is computed with others in one row.
        """
        self._settle()
        sequence = self._alone(id, index)
        self._admission.check_tokens(tokens, "a token that is fed")
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

    def _alone(self, id: str, index: int) -> Sequence:
        """The continuation ``index`` of the request ``id``, which has a text of its own."""
        sequence = self.requests.living(id, index)
        if sequence.superposed is not None:
            raise UsageError(f"the continuations of {id!r} are computed in one row: none can be changed by itself")
        return sequence

    def abort(self, id: str, index: int | None = None) -> None:
        """Ends a request, or only its continuation ``index``, and frees what it holds at once; an unknown one is
        ignored."""
        for sequence in self.requests.of(id):
            if index is None or sequence.index == index:
                self._end(sequence, Finish.ABORT)

    def forget(self, id: str) -> None:
        """Nobody will go on from the request ``id``, which was kept; an unknown one is ignored."""
        sequence = self.requests.forget(id)
        if sequence is not None:
            self.memory.forget(sequence)

    def _changed(self, sequence: Sequence) -> None:
        """The text of ``sequence`` was changed from outside."""
        if sequence.draft is not None:
            sequence.draft = self._continuations.draft(sequence.sampling, sequence.prompt)
            sequence.told = 0
        for member in sequence.members:
            if member.held is not None:
                self.memory.renew(member)

    def _settle(self) -> None:
        """Nothing is on its way: all tokens are known."""
        self._untold += self._loop.drain()

    def _enter(self, sequence: Sequence) -> None:
        """A new sequence waits."""
        request = sequence.request
        self.requests.enter(sequence)
        self._counters.prompt_tokens += request.length
        waiting = self.steps.batcher.waiting
        self.events.add("arrived", request.id, sequence.index, tokens=request.length, waiting=waiting)
        # Where others wait for the device, what it need not compute is time for them.
        seconds = math.inf if waiting else self.steps.prompts.seconds
        coming = [] if sequence.origin is not None else self.memory.fetch(sequence, seconds)
        if coming:
            self._fetching[sequence] = coming
        else:
            self.steps.batcher.add(sequence)

    # Steps

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._untold) or (not self.control.stopped and (bool(self.requests) or not self._loop.idle))

    def step(self) -> list[Delta]:
        """Does one step; returns what became known, at most one delta for each sequence and reason."""
        for sequence in self.requests.expired():
            self._end(sequence, Finish.DEADLINE)
        if self.control.stopped:
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
        if self._config.draft is not None and self._config.draft.remembers:
            sequence.catch_up()
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
        self.requests.leave(sequence)
        generated = len(sequence.tokens) - sequence.prompt
        self.events.add("finished", sequence.request.id, sequence.index, reason=finish.value, generated=generated)

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        """Ends ``sequence`` between steps, and says so with the next one."""
        self._drop(sequence, finish)
        if sequence.superposed is not None:
            self._untold += told(sequence, finish, self.steps.version)
        else:
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
        last, speculation, tiers = self.steps.last, self.steps.speculation, self._tiers
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
            version=self.control.version,
            paused=self.control.paused,
            asleep=self.control.asleep,
            adapters=self.adapters.names,
            adapter_keys=self.adapters.keys,
            policy=self._policy,
            compress_seconds=0.0 if self._compressing is None else self._compressing.compress_seconds,
            **dataclasses.asdict(self._counters),
        )
