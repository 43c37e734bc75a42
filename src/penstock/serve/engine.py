"""The engine core: requests in, tokens out, a step at a time."""

from __future__ import annotations

import time
from collections.abc import Iterable

from penstock.core.errors import UsageError
from penstock.serve.batch import Batch
from penstock.serve.batching.contract import Limits
from penstock.serve.config import EngineConfig
from penstock.serve.kv.pool import ROOT, BlockPool
from penstock.serve.messages import Delta, Finish, Request, Snapshot
from penstock.serve.room import StepRoom
from penstock.serve.runner import Runner
from penstock.serve.sequence import Sequence


class Engine:
    """Continuous batching over a paged cache whose prefixes are shared.

    Every step a batching policy picks pieces of sequences, the runner computes them, and the tokens that come out are
    published. One thread owns an engine; other processes talk to it through messages.

    Args:
        config: the settings.
        runner: the model with its cache.
        stop: the model's own end-of-text tokens.
    """

    def __init__(self, config: EngineConfig, runner: Runner, stop: Iterable[int] = ()) -> None:
        shape = runner.cache.shape
        self.config, self.runner = config, runner
        self.context = min(runner.tables.shape[1], shape.blocks) * shape.block_size
        self.context = min(self.context, config.context or runner.model.config.context)
        self.pool = BlockPool(shape.blocks, shape.block_size)
        self.limits = Limits(config.tokens, config.sequences, shape.blocks, shape.block_size)
        self.batcher = config.batching.start(self.limits)
        self.running: list[Sequence] = []
        self._stop = frozenset(stop)
        self._sequences: dict[str, list[Sequence]] = {}
        self._slots = list(range(config.sequences - 1, -1, -1))
        self._loop = config.loop.start(self)
        self._ended: list[Delta] = []
        self._arrivals = 0
        self._last = Batch([])
        self._deadlines = False
        self.steps = self.preemptions = self.prompt_tokens = self.cached_tokens = self.output_tokens = 0

    # Requests

    def add(self, request: Request) -> None:
        """Takes in a request.

        Raises:
            UsageError: its prompt is empty, too long or has unknown tokens, or its id is in use.
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
        limit = min(self.context, len(request.prompt) + request.sampling.max_tokens)
        self._sequences[request.id] = []
        for index in range(request.sampling.n):
            sampling = request.sampling.model_copy(update={"seed": request.sampling.seed + index})
            self._enter(Sequence(request, index, sampling, list(request.prompt), limit, self._arrivals))

    def _enter(self, sequence: Sequence) -> None:
        self._arrivals += 1
        if sequence.request.deadline is not None:
            sequence.deadline = time.monotonic() + sequence.request.deadline
            self._deadlines = True
        self._sequences[sequence.request.id].append(sequence)
        self.prompt_tokens += sequence.prompt
        self.batcher.add(sequence)

    def abort(self, id: str) -> None:
        """Ends a request, and frees what it holds at once; an unknown one is ignored."""
        for sequence in list(self._sequences.get(id, ())):
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
            self.batcher.remove(child)
            child.computed = min(parent.computed, len(child.tokens) - 1)
            shared = parent.blocks[: -(-child.computed // self.pool.block_size)]
            self.pool.share(shared)
            child.cached = child.computed
            self.cached_tokens += child.cached
            self.start(child, shared)
            child.committed = min(parent.committed, child.computed // self.pool.block_size)
            child.node = self.pool.node_of(shared[child.committed - 1]) if child.committed else ROOT

    # Steps

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._sequences or self._ended) or not self._loop.idle

    def step(self) -> list[Delta]:
        """Does one step; returns what became known, at most one delta for each sequence and reason."""
        if self._deadlines:
            self._expire()
        begun = time.perf_counter()
        deltas = self._loop.step()
        deltas, self._ended = self._ended + deltas, []
        self._last.seconds = time.perf_counter() - begun
        if self.config.check:
            self.pool.check(sequence.blocks for sequence in self.running)
        return deltas

    def form(self) -> Batch | None:
        room = StepRoom(self)
        # One whose last token is on its way has nothing more to compute.
        self.batcher.form([sequence for sequence in self.running if sequence.length < sequence.limit], room)
        if not room.entries:
            return None
        if room.copies:
            self.runner.cache.copy(*map(list, zip(*room.copies, strict=True)))
        self._last = Batch(room.entries)
        return self._last

    def launch(self, batch: Batch) -> None:
        self.steps += 1
        self.runner.launch(batch)

    def publish(self, batch: Batch) -> list[Delta]:
        scored = [entry for entry in batch.entries if entry.scored]
        if batch.sampled is None:
            return []
        deltas = []
        for entry, token in zip(scored, batch.sampled.tokens.tolist(), strict=True):
            sequence = entry.sequence
            if sequence.finish is not None:
                continue
            sequence.tokens.append(token)
            sequence.in_flight -= 1
            self.output_tokens += 1
            finish = self._finish_of(sequence, token)
            if finish is not None:
                self._drop(sequence, finish)
            deltas.append(
                Delta(sequence.request.id, sequence.index, [token], finish=finish, cached=max(sequence.cached, 0))
            )
        return deltas

    def blind(self) -> bool:
        return False

    def _finish_of(self, sequence: Sequence, token: int) -> Finish | None:
        sampling = sequence.sampling
        if token in sampling.stop_tokens or (token in self._stop and not sampling.ignore_eos):
            return Finish.STOP
        return Finish.LENGTH if len(sequence.tokens) >= sequence.limit else None

    # Memory

    def start(self, sequence: Sequence, blocks: list[int]) -> None:
        """Gives ``sequence`` a slot, and the ``blocks`` that hold its first tokens."""
        sequence.slot = self._slots.pop()
        self.grow(sequence, blocks)
        self.running.append(sequence)
        if len(self.running) > 1 and self.running[-2].rank > sequence.rank:
            self.running.sort(key=lambda each: each.rank)
        self.runner.sampler.add(sequence.slot, sequence.sampling)

    def grow(self, sequence: Sequence, blocks: list[int]) -> None:
        """Appends ``blocks`` to those of ``sequence``."""
        if blocks:
            first = len(sequence.blocks)
            sequence.blocks += blocks
            self.runner.tables[sequence.slot, first : len(sequence.blocks)] = blocks

    def preempt(self, sequence: Sequence) -> None:
        """Takes the memory of ``sequence``; it will be computed again."""
        self._stop_running(sequence)
        sequence.computed = sequence.committed = 0
        sequence.node = ROOT
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
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        self._slots.append(sequence.slot)
        sequence.slot = -1
        self.running.remove(sequence)

    def _drop(self, sequence: Sequence, finish: Finish) -> None:
        if sequence.running:
            self.commit(sequence)
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
        now = time.monotonic()
        for sequence in [s for group in self._sequences.values() for s in group]:
            if sequence.deadline is not None and now >= sequence.deadline:
                self._end(sequence, Finish.DEADLINE)

    def snapshot(self) -> Snapshot:
        """The engine's state now."""
        return Snapshot(
            steps=self.steps,
            running=len(self.running),
            waiting=self.batcher.waiting,
            blocks=self.pool.blocks,
            held=self.pool.held,
            batch_tokens=self._last.tokens,
            batch_sequences=len(self._last.entries),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            preemptions=self.preemptions,
            step_seconds=self._last.seconds,
        )
