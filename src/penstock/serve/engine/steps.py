"""The parts of a step: form, launch, publish."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as List
from typing import TYPE_CHECKING

from penstock.core.events import EventLog
from penstock.serve.choose.logprobs import LogprobRows, TokenLogprobs
from penstock.serve.choose.sampler import Sampled
from penstock.serve.choose.superposed import SuperposedTexts
from penstock.serve.engine.batch import Batch, Entry
from penstock.serve.engine.executor import Executor
from penstock.serve.engine.memory.memory import Memory
from penstock.serve.engine.prompt_clock import PromptClock
from penstock.serve.engine.room import StepRoom
from penstock.serve.engine.sequence import Sequence
from penstock.serve.engine.speculation import Speculation
from penstock.serve.engine.superposed import told
from penstock.serve.messages import Delta, Finish

if TYPE_CHECKING:
    from penstock.serve.batching.contract import Batcher


@dataclasses.dataclass
class Counters:
    """What an engine did since its start: steps, sequences preempted, prompt tokens and those of them that were found
    in the cache, tokens that came out, tokens that were drafted and accepted, how often a step brought tokens of a
    sequence, tokens that went out of caches that were compressed, and those of contexts that were found in the cache by
    themselves, and that were computed again all the same."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    sequence_steps: int = 0
    dropped_tokens: int = 0
    reused_tokens: int = 0
    renewed_tokens: int = 0


class EngineSteps:
    """See :class:`~penstock.serve.engine.loops.contract.Steps`.

    Args:
        memory: of the sequences.
        batcher: holds those that wait.
        executor: computes.
        tokens: the token budget of a step.
        counters, events: told what happens.
        end: called with a sequence and the reason when its last token is known.
        speculation: drafts; None where nothing is drafted.
        branches: how many drafts a place has, by depth, where trees are drafted.
        stages: how many stages of a model compute one behind the other.

    Attributes:
        batcher, speculation, stages: as given.
        last: the batch that was formed last.
        version: of the weights that compute.
        prompts: what tokens of prompts take.
    """

    def __init__(
        self,
        memory: Memory,
        batcher: Batcher,
        executor: Executor,
        tokens: int,
        counters: Counters,
        events: EventLog,
        end: Callable[[Sequence, Finish], None],
        speculation: Speculation | None = None,
        branches: List[int] = (),
        stages: int = 1,
    ) -> None:
        self._memory, self.batcher, self._executor = memory, batcher, executor
        self._tokens, self._counters, self._events, self._end = tokens, counters, events, end
        self.speculation, self._branches = speculation, branches
        self.last = Batch([], memory.tables)
        self.version, self.stages = 0, stages
        self._shut = False  # whether those who wait had no room in the last step, though it had tokens left
        self.prompts = PromptClock()

    def form(self, pieces: int | None = None) -> Batch | None:
        begun, ahead = 0.0, 0
        if self.speculation is not None:
            begun, ahead = self.speculation.clock(), self.speculation.ahead(self._crowd())
            if ahead and self.stages == 1 and self._few_are_ready(ahead):
                # They, and who comes now, would go on in steps of their own, between those of the others, for good.
                return None
        shaper = None if self.speculation is None else self.speculation.shaper
        room = StepRoom(self._memory, self._tokens, self._events, ahead, self._branches, shaper)
        room.compact(each for each in self._memory.running if each.length < each.limit)
        # One whose last token is on its way has nothing more to compute; one that waits for a token is left out.
        running = [each for each in self._memory.running if each.length < each.limit and each.ready(ahead)]
        self.batcher.form(running if pieces is None else self._piece(running, pieces), room)
        self._shut = self.batcher.waiting > 0 and room.tokens > 0
        for victim in room.preempted:
            self.batcher.add(victim)
        self._counters.preemptions += len(room.preempted)
        self._counters.cached_tokens += room.found
        self._counters.dropped_tokens += room.dropped
        self._counters.reused_tokens += room.reused
        self._counters.renewed_tokens += room.renewed
        memory, given = self._memory, (room.parts, room.lead, ahead)
        for entry in room.entries:
            if entry.scored and entry.sequence.chunks:
                memory.keep_chunks(entry.sequence)
        moves, keeps = memory.chunks.told()
        if not room.entries:  # nor is anything left to move: whoever is admitted computes something, or is preempted
            return None
        self.last = Batch(room.entries, memory.tables, memory.copies(), memory.restored(), *given, begun=begun)
        self.last.asleep = self.speculation is not None and self.speculation.asleep
        self.last.compactions = memory.compactions()
        self.last.moves, self.last.keeps = moves, keeps
        return self.last

    def _crowd(self) -> int:
        """How many sequences run, or are about to: were drafts to be made for the first of a crowd, as they pay for a
        few, those for all who are there a moment later would be in vain."""
        coming = 0 if self._shut else min(self.batcher.waiting, self._memory.free_slots)
        return len(self._memory.running) + coming

    def _few_are_ready(self, ahead: int) -> bool:
        """Whether there are fewer sequences that can go on now, with up to ``ahead`` drafted tokens, than such whose
        tokens are awaited, and which draft then."""
        going = [each for each in self._memory.running if each.length < each.limit]
        return sum(each.drafts_next for each in going) > sum(each.ready(ahead) for each in going)

    def _piece(self, ready: list[Sequence], pieces: int) -> list[Sequence]:
        """Those of ``ready`` that take part in a step: of those that decode, one of so many ``pieces``, and no more
        than one of as many as there are stages of all that decode, so that they do not stay together."""
        going = [each for each in ready if each.decoding]
        under_way = sum(each.in_flight > 0 for each in self._memory.running)
        most = min(-(-len(going) // pieces), -(-(len(going) + under_way) // self.stages))
        later = {*going[most:]}
        return [each for each in ready if each not in later]

    def launch(self, batch: Batch) -> None:
        self._counters.steps += 1
        self.prompts.begin(batch)
        if self.speculation is not None:
            self.speculation.begin(batch)
            self.speculation.draft(batch)
        batch.sampled = self._executor.launch(batch)

    def publish(self, batch: Batch) -> list[Delta]:
        sampled = None if batch.sampled is None else batch.sampled.wait()
        self.prompts.end(batch, sampled is not None)
        if self.speculation is not None:
            self.speculation.end(batch)
        if sampled is None:
            return []
        _rate(batch, sampled)
        self._learn(batch, sampled)
        entries = [entry for entry in batch.entries if entry.scored]
        rows = None if sampled.logprobs is None else sampled.logprobs.rows
        tokens, counts = sampled.tokens.tolist(), sampled.settled(len(entries))
        if self.speculation is not None:
            self.speculation.learn(batch, entries, counts)
        deltas = []
        first = row = 0
        for entry, count in zip(entries, counts, strict=True):
            most = None if rows is None else entry.sequence.sampling.alternatives
            if entry.sequence.finish is None and entry.sequence.leader is None:
                logprobs = None if rows is None or most is None else rows.cut(row, row + count, most)
                if entry.sequence.superposed is not None and logprobs is not None:
                    deltas += self._cross(entry.sequence, entry.sequence.superposed, logprobs[0])
                else:
                    deltas.append(self._settle(entry, tokens[first : first + count], logprobs))
            first += entry.scored
            row += 0 if most is None else entry.scored  # others have no rows there
        return deltas

    def _learn(self, batch: Batch, sampled: Sampled) -> None:
        """Takes note of what tokens of contexts look at."""
        drawn = iter(sampled.weighed)
        for entry in [each for each in batch.entries if each.sequence.chunks]:
            # An executor that only simulates a model has nothing to tell.
            for chunk, own in zip(entry.weighed, drawn, strict=False):
                chunk.learn(max(entry.start, chunk.start), own.numpy())
            if entry.scored:
                self._memory.chunks.learn(entry.sequence.chunks)

    def _cross(self, sequence: Sequence, texts: SuperposedTexts, likeliest: TokenLogprobs) -> list[Delta]:
        """Hands the ``likeliest`` tokens that a step told to all ``texts`` of a sequence, which are told at its end."""
        if len(sequence.tokens) == len(sequence.request.prompt):
            self._events.add("first", sequence.request.id, sequence.index)
        sequence.tokens.append(texts.cross(likeliest))
        sequence.in_flight -= 1
        self._counters.sequence_steps += 1
        if not texts.ended and len(sequence.tokens) < sequence.limit:
            return []
        self._counters.output_tokens += sum(len(each.tokens) for each in texts.texts)
        finish = Finish.STOP if texts.ended else Finish.LENGTH
        self._end(sequence, finish)
        return told(sequence, finish, self.version)

    def _settle(self, entry: Entry, tokens: list[int], logprobs: LogprobRows | None) -> Delta:
        """Hands the ``tokens`` that a step settled to their sequence, up to one that ends it."""
        sequence, window = entry.sequence, entry.window
        kept, finish = 0, None
        while finish is None and kept < len(tokens):
            finish = _take(sequence, tokens[kept])
            kept += finish is not Finish.ERROR
        for member in sequence.lockstep:
            member.in_flight -= 1
        # Those behind the one that ended the text were accepted, and are not kept.
        accepted = min(len(tokens) - 1, kept)
        self._counters.output_tokens += kept
        self._counters.sequence_steps += 1
        if window:
            self._counters.drafted_tokens += len(window)
            self._counters.accepted_tokens += accepted
            self._events.add("settled", sequence.request.id, sequence.index, drafted=len(window), accepted=accepted)
        if sequence.guessed:
            if sequence.held is not None:
                # Keys and values of probes, and of drafted tokens that were not accepted, are nobody's.
                self._memory.truncate(sequence, entry.start + entry.count - len(window) + len(tokens) - 1)
            sequence.guessed = False
        held = sequence.held
        if held is not None and (entry.probes or held.probed):
            held.probed = 0 if self.speculation is None else self.speculation.probed(entry, tokens)
        if len(sequence.tokens) - kept == len(sequence.request.prompt):
            self._events.add("first", sequence.request.id, sequence.index)
        prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        if finish is not None:
            self._end(sequence, finish)
        return Delta(
            sequence.request.id,
            sequence.index,
            tokens[:kept],
            logprobs if logprobs is None or kept == len(logprobs) else logprobs[:kept],
            None if prompt_logprobs is None else LogprobRows.stacked(prompt_logprobs),
            finish,
            max(sequence.cached, 0),
            len(window),
            accepted,
            self.version,
        )


def _take(sequence: Sequence, token: int) -> Finish | None:
    """Appends ``token`` to ``sequence`` and its companions; tells whether it ends them. One that may not come is left
    out: there was no other."""
    limits = sequence.restriction
    if limits is not None and limits.refuses(token, len(sequence.tokens) - sequence.prompt, sequence.recent):
        return Finish.ERROR
    if sequence.matcher is not None:
        sequence.matcher.consume(token)
        if sequence.matcher.failed:
            return Finish.ERROR
    for member in sequence.lockstep:
        member.tokens.append(token)
    if token in sequence.stop:
        return Finish.STOP
    return Finish.LENGTH if len(sequence.tokens) >= sequence.limit else None


def _rate(batch: Batch, sampled: Sampled) -> None:
    """Hands the log-probabilities of prompt tokens in ``batch`` to their sequences."""
    prompt_logprobs = [entry for entry in batch.entries if entry.prompt_logprobs]
    if sampled.prompt is None:
        return
    rows, first = sampled.prompt.rows, 0
    for entry in prompt_logprobs:
        own = rows.cut(first, first + entry.prompt_logprobs, entry.sequence.sampling.prompt_logprobs or 0).table
        first += entry.prompt_logprobs
        if entry.sequence.prompt_logprobs is not None:
            # After preemption, what is known already comes again.
            place = entry.start + entry.prompt_logprobs_from + 1 - entry.sequence.prompt_logprobs_from
            entry.sequence.prompt_logprobs[place : place + entry.prompt_logprobs] = own
