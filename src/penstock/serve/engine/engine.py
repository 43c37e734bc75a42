"""The engine core: requests in, tokens out, a step at a time."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable
from heapq import heappop, heappush

from penstock.core.errors import UsageError
from penstock.serve.batching.contract import Limits
from penstock.serve.choose.grammar import Grammars, Matcher
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.batch import Batch
from penstock.serve.engine.room import StepRoom
from penstock.serve.engine.sequence import Sequence
from penstock.serve.kv.pool import ROOT, BlockPool
from penstock.serve.messages import Delta, Finish, Request, Snapshot
from penstock.serve.run.runner import Runner


class Engine:
    """Continuous batching over a paged cache whose prefixes are shared.

    Every step a batching policy picks pieces of sequences, the runner computes them, and the tokens that come out are
    published. One thread owns an engine; other processes talk to it through messages.

    Args:
        config: the settings.
        runner: the model with its cache.
        stop: the model's own end-of-text tokens.
        grammars: compiles grammars; without it, requests cannot have one.

    Attributes:
        limits: what a step may hold.
        context: most tokens of a sequence.
        pool: the blocks of the cache.
        running: sequences that have a slot and blocks, by priority and arrival.
        batcher: holds those that wait.
        last: the batch that was formed last.
    """

    def __init__(
        self, config: EngineConfig, runner: Runner, stop: Iterable[int] = (), grammars: Grammars | None = None
    ) -> None:
        shape = runner.cache.shape
        self.config, self.runner = config, runner
        self.context = min(runner.tables.shape[1], runner.blocks) * shape.block_size
        self.context = min(self.context, config.context or runner.model.config.context)
        self.pool = BlockPool(runner.blocks, shape.block_size)
        self.limits = Limits(
            config.budget(runner.device),
            config.sequences,
            runner.blocks,
            shape.block_size,
            runner.model.config,
        )
        self.batcher = config.batching.start(self.limits)
        self.running: list[Sequence] = []
        self._stop, self._grammars = frozenset(stop), grammars
        self._sequences: dict[str, list[Sequence]] = {}
        self._slots = list(range(config.sequences - 1, -1, -1))
        self._loop = config.loop.start(self)
        self._ended: list[Delta] = []
        self._arrivals = 0
        self.last = Batch([])
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self.steps = self.preemptions = self.prompt_tokens = self.cached_tokens = self.output_tokens = 0

    # Requests

    def add(self, request: Request) -> None:
        """Takes in a request.

        Raises:
            UsageError: its prompt is empty, too long or has unknown tokens, its sampling names unknown tokens or has a
                grammar that cannot be used, or its id is in use.
        """
        vocabulary = self.runner.model.config.vocabulary
        if request.id in self._sequences:
            raise UsageError(f"a request {request.id!r} is under way already")
        if not request.prompt:
            raise UsageError("the prompt is empty", hint="Give at least one token to continue.")
        if len(request.prompt) >= self.context:
            raise UsageError(
                f"the prompt has {len(request.prompt)} tokens, and a sequence can have {self.context} with what follows"
            )
        if not all(0 <= token < vocabulary for token in request.prompt):
            raise UsageError(f"the prompt has a token outside of the vocabulary of {vocabulary}")
        named = max([*request.sampling.logit_bias, *request.sampling.stop_tokens], default=0)
        if named >= vocabulary:
            raise UsageError(
                f"logit_bias or stop_tokens name the token {named}, which is outside of the vocabulary of {vocabulary}"
            )
        matchers = self._matchers(request.sampling)
        limit = self._limit(request)
        self._sequences[request.id] = []
        for index, matcher in enumerate(matchers):
            sampling = request.sampling.model_copy(update={"seed": request.sampling.seed + index})
            stop = self._stop if not sampling.ignore_eos or matcher is not None else frozenset()
            stop |= set(sampling.stop_tokens)
            tokens, companion = list(request.prompt), self._companion(request, limit)
            self._enter(Sequence(request, index, sampling, tokens, limit, self._arrivals, stop, matcher, companion))

    def _matchers(self, sampling: SamplingParams) -> list[Matcher | None]:
        """For each continuation, where it stands in the grammar."""
        if sampling.grammar is None:
            return [None] * sampling.continuations
        if self._grammars is None or not self._stop:
            raise UsageError("this model serves no grammars: it has no tokenizer here, or no end-of-text token")
        return [self._grammars.start(sampling.grammar) for _ in range(sampling.continuations)]

    def _limit(self, request: Request) -> int:
        """The most tokens of the request's sequences."""
        prompt, companion = len(request.prompt), request.sampling.companion
        if companion is None:
            return min(self.context, prompt + request.sampling.max_tokens)
        if not all(0 <= token < self.runner.model.config.vocabulary for token in companion):
            raise UsageError("the rule's prompt has a token outside of the vocabulary")
        # Both have to fit, each with a last block that may be nearly empty.
        room = self.runner.blocks * self.pool.block_size - 2 * (self.pool.block_size - 1)
        left = min(self.context - max(prompt, len(companion)), (room - prompt - len(companion)) // 2)
        if left < 1 or self.limits.sequences < 2:
            raise UsageError(
                f"there is no room for the prompt and, beside it, the rule's prompt of {len(companion)} tokens",
                hint="Shorten them, or raise engine.sequences, engine.context and engine.cache_tokens.",
            )
        return prompt + min(left, request.sampling.max_tokens)

    def _companion(self, request: Request, limit: int) -> Sequence | None:
        prompt = request.sampling.companion
        if prompt is None:
            return None
        own = dataclasses.replace(request, prompt=list(prompt), sampling=SamplingParams(temperature=0))
        most = limit - len(request.prompt) + len(prompt)
        return Sequence(own, -1, own.sampling, list(prompt), most, self._arrivals)

    def _enter(self, sequence: Sequence) -> None:
        self._arrivals += 1
        if sequence.request.deadline is not None:
            sequence.deadline = time.monotonic() + sequence.request.deadline
            heappush(self._deadlines, (sequence.deadline, sequence.arrival, sequence))
        self._sequences[sequence.request.id].append(sequence)
        self.prompt_tokens += sequence.prompt
        self.batcher.add(sequence)

    def abort(self, id: str, index: int | None = None) -> None:
        """Ends a request, or only its continuation ``index``, and frees what it holds at once; an unknown one is
        ignored."""
        for sequence in list(self._sequences.get(id, ())):
            if index is None or sequence.index == index:
                self._end(sequence, Finish.ABORT)

    def fork(self, id: str, request: Request) -> None:
        """Starts ``request``, whose prompt is the first sequence of the running request ``id`` up to now, on the same
        blocks: nothing is computed twice but the last token, and a block is copied only when one of them writes to it.

        Raises:
            UsageError: there is no such request, or its tokens are not those of the new prompt.
        """
        parents = self._sequences.get(id)
        if not parents or parents[0].tokens[: len(request.prompt)] != request.prompt:
            raise UsageError(f"no request {id!r} has got to the prompt of {request.id!r}")
        parent = parents[0]
        self.add(request)
        if not parent.running or not self._slots:
            return
        for child in self._sequences[request.id]:
            if not self._slots:
                break
            if child.rated is not None or child.companion is not None:
                continue
            self.batcher.remove(child)
            child.computed = min(parent.computed, len(child.tokens) - 1)
            shared = parent.blocks[: -(-child.computed // self.pool.block_size)]
            self.pool.share(shared)
            child.cached = child.computed
            self.cached_tokens += child.cached
            self.start(child, shared)
            self.commit(child)

    # Steps

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._sequences or self._ended) or not self._loop.idle

    def step(self) -> list[Delta]:
        """Does one step; returns what became known, at most one delta for each sequence and reason."""
        self._expire()
        begun = time.perf_counter()
        deltas = self._loop.step()
        deltas, self._ended = self._ended + deltas, []
        self.last.seconds = time.perf_counter() - begun
        if self.config.check:
            self.pool.check(member.blocks for sequence in self.running for member in sequence.members)
        return deltas

    def form(self) -> Batch | None:
        room = StepRoom(self)
        # One whose last token is on its way has nothing more to compute.
        self.batcher.form([sequence for sequence in self.running if sequence.length < sequence.limit], room)
        if not room.entries:
            return None
        if room.copies:
            self.runner.cache.copy(*map(list, zip(*room.copies, strict=True)))
        self.last = Batch(room.entries, room.parts, room.lead)
        return self.last

    def launch(self, batch: Batch) -> None:
        self.steps += 1
        self.runner.launch(batch)

    def publish(self, batch: Batch) -> list[Delta]:
        if batch.sampled is None:
            return []
        batch.sampled.wait()
        _rate(batch)
        sequences = [entry.sequence for entry in batch.entries if entry.scored]
        told = batch.sampled.told([sequence.sampling.alternatives for sequence in sequences])
        deltas = []
        for sequence, token, logprobs in zip(sequences, batch.sampled.tokens.tolist(), told, strict=True):
            if sequence.finish is not None or sequence.leader is not None:
                continue
            for member in sequence.members:
                member.tokens.append(token)
                member.in_flight -= 1
            self.output_tokens += 1
            finish = self._finish_of(sequence, token)
            if finish is not None:
                self._drop(sequence, finish)
            rated, sequence.rated = sequence.rated, None
            cached = max(sequence.cached, 0)
            deltas.append(Delta(sequence.request.id, sequence.index, [token], logprobs, rated, finish, cached))
        return deltas

    def blind(self) -> bool:
        return any(sequence.blind for sequence in self.running)

    def _finish_of(self, sequence: Sequence, token: int) -> Finish | None:
        if sequence.matcher is not None:
            sequence.matcher.consume(token)
            if sequence.matcher.failed:
                return Finish.ERROR
        if token in sequence.stop:
            return Finish.STOP
        return Finish.LENGTH if len(sequence.tokens) >= sequence.limit else None

    # Memory

    @property
    def free_slots(self) -> int:
        """How many more sequences could run."""
        return len(self._slots)

    def start(self, sequence: Sequence, blocks: list[int]) -> None:
        """Gives ``sequence`` a slot, and the ``blocks`` that hold its first tokens."""
        sequence.slot = self._slots.pop()
        self.grow(sequence, blocks)
        self.runner.sampler.add(sequence.slot, sequence)
        if sequence.leader is not None:
            return
        self.running.append(sequence)
        if len(self.running) > 1 and self.running[-2].rank > sequence.rank:
            self.running.sort(key=lambda each: each.rank)

    def grow(self, sequence: Sequence, blocks: list[int]) -> None:
        """Appends ``blocks`` to those of ``sequence``."""
        if blocks:
            first = len(sequence.blocks)
            sequence.blocks += blocks
            self.runner.tables[sequence.slot, first : len(sequence.blocks)] = blocks

    def preempt(self, sequence: Sequence) -> None:
        """Takes the memory of ``sequence``; it will be computed again."""
        self._stop_running(sequence)
        for member in sequence.members:
            member.computed = member.committed = 0
            member.node = ROOT
        sequence.preempted = True
        self.preemptions += 1
        self.batcher.add(sequence)

    def commit(self, sequence: Sequence) -> None:
        """Puts the full blocks of known tokens of ``sequence`` into the prefix tree."""
        size = self.pool.block_size
        for index in range(sequence.committed, min(sequence.computed, len(sequence.tokens)) // size):
            tokens = sequence.tokens[index * size : (index + 1) * size]
            sequence.node = self.pool.commit(sequence.node, tokens, sequence.blocks[index])
            sequence.committed = index + 1

    def _stop_running(self, sequence: Sequence) -> None:
        for member in sequence.members:
            self.pool.release(member.blocks)
            member.blocks = []
            self._slots.append(member.slot)
            member.slot = -1
        self.running.remove(sequence)

    def _drop(self, sequence: Sequence, finish: Finish) -> None:
        if sequence.running:
            for member in sequence.members:
                self.commit(member)
            self._stop_running(sequence)
        else:
            self.batcher.remove(sequence)
        sequence.finish = finish
        siblings = self._sequences[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.request.id]

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        self._drop(sequence, finish)
        self._ended.append(Delta(sequence.request.id, sequence.index, [], finish=finish))

    def _expire(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            _, _, sequence = heappop(self._deadlines)
            if sequence.finish is None:
                self._end(sequence, Finish.DEADLINE)

    def snapshot(self) -> Snapshot:
        """The engine's state now."""
        return Snapshot(
            steps=self.steps,
            running=len(self.running),
            waiting=self.batcher.waiting,
            blocks=self.pool.blocks,
            held=self.pool.held,
            batch_tokens=self.last.tokens,
            batch_sequences=len(self.last.entries),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            preemptions=self.preemptions,
            step_seconds=self.last.seconds,
        )


def _rate(batch: Batch) -> None:
    """Hands the log-probabilities of prompt tokens in ``batch`` to their sequences."""
    rated = [entry for entry in batch.entries if entry.rated]
    if batch.sampled is None or batch.sampled.prompt is None:
        return
    most = [entry.sequence.sampling.prompt_logprobs or 0 for entry in rated for _ in range(entry.rated)]
    records = iter(batch.sampled.prompt.records(most))
    for entry in rated:
        own = list(itertools.islice(records, entry.rated))
        if entry.sequence.rated is not None:
            # After preemption, what is known already comes again.
            entry.sequence.rated[entry.start : entry.start + entry.rated] = own
