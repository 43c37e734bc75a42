"""A sequence of tokens that the engine continues."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as List
from typing import TYPE_CHECKING

import numpy as np

from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.engine.adapters import BASE, Adapter
from penstock.serve.kv.chunks import Chunk
from penstock.serve.kv.pool import numbers_of
from penstock.serve.kv.reuse.contract import Weighing
from penstock.serve.messages import Finish, Request

if TYPE_CHECKING:
    from penstock.serve.choose.grammar import Matcher
    from penstock.serve.choose.restriction import Restriction
    from penstock.serve.choose.superposed import SuperposedTexts
    from penstock.serve.engine.memory.held import Held
    from penstock.speculate.contract import Draft


class Sequence:
    """One continuation of a request, and where it stands.

    Attributes:
        request: what asked for it; ``index`` says which of the request's continuations it is.
        sampling: how its tokens are chosen (with its own seed).
        tokens: the prompt and what followed, as far as known here.
        prompt: how many of the tokens were given; those behind them count as generated. Of a fork, that is what its
            parent was given.
        limit: most tokens in all.
        arrival: its number among all sequences of the engine.
        in_flight: queued steps that will append tokens.
        held: its memory while it runs, None while it waits; see :class:`~penstock.serve.engine.memory.memory.Memory`.
        cached: prompt tokens that were found in the cache when it was admitted first; -1 before.
        preempted: whether it lost its memory and has to be computed again.
        compressed: with how many tokens computed its cache was compressed since blocks were missing, ascending. There
            it is compressed again whenever it is computed again.
        deadline: time.monotonic() at which it ends, or None.
        finish: why it ended, None while it lives.
        stop: tokens that end it.
        matcher: where it stands in its grammar; None without one.
        restriction: which tokens its request forbids; None where it forbids none.
        superposed: the continuations of its request, where all of them are computed in its one row; None where it is
            one itself. Behind the prompt, its tokens are numbers then that stand for rows.
        draft: proposes what may follow; None where nothing is drafted for it. It knows the first ``told`` tokens, see
            :meth:`catch_up`.
        guessed: whether tokens were drafted for it that are not settled yet, or probes are on their way.
        waits: whether the host must know all of its tokens before the next one can be chosen.
        prompt_logprobs: of its prompt's tokens from ``prompt_logprobs_from`` on, as far as known, a row of
            :class:`~penstock.serve.choose.logprobs.LogprobRows` each; None where they are not wanted, or told already.
        prompt_logprobs_from: the first token of the prompt whose log-probability is wanted.
        companions: sequences with other prompts that go on with the same tokens, in the same steps, for the rule of
            this one to combine their scores with its own. They are no continuations of their own.
        contexts: texts that it sees beside its own, from its token number ``shared`` on, with which each of them
            begins too. They are no continuations, and gain no tokens.
        weighing: how it sees them; None without any.
        chunks: contexts in its text, which are cached by themselves.
        exact: how many of its first tokens have the keys and values that they would be given in a row; all of them,
            where no contexts were moved.
        mark: stands for both where texts are compared: numbers that are no tokens, none without contexts.
        leader: of a companion or context, the sequence that it belongs to.
        lockstep: the sequence and its companions, which go on with the same tokens.
        members: those that have memory while it runs: the sequence, its companions and its contexts.
        alone: whether it has no others beside it, no contexts in its text, and nothing computed twice.
        origin: the sequence whose text it goes on from, and whose blocks it takes if they are still there; None where
            there is no such.
        adapter: what is added to the model for its tokens, its companions' too.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        sampling: SamplingParams,
        tokens: list[int],
        limit: int,
        arrival: int,
        *,
        prompt: int | None = None,
        stop: Iterable[int] = (),
        matcher: Matcher | None = None,
        restriction: Restriction | None = None,
        superposed: SuperposedTexts | None = None,
        draft: Draft | None = None,
        companions: tuple[Sequence, ...] = (),
        contexts: tuple[Sequence, ...] = (),
        weighing: Weighing | None = None,
        chunks: tuple[Chunk, ...] = (),
        origin: Sequence | None = None,
        adapter: Adapter = BASE,
    ) -> None:
        self.request = request
        self.index = index
        self.sampling = sampling
        self.tokens = tokens
        self.prompt = len(tokens) if prompt is None else prompt
        self.limit = limit
        self.arrival = arrival
        self.deadline: float | None = None
        self.in_flight = 0
        self.held: Held | None = None
        self.cached = -1
        self.preempted = False
        self.compressed: list[int] = []
        self.finish: Finish | None = None
        self.stop = frozenset(stop)
        self.matcher = matcher
        self.restriction = restriction
        self.superposed = superposed
        self.draft, self.told = draft, 0
        self.guessed = False
        self.waits = sampling.waits or superposed is not None
        self.companions = companions
        self.contexts, self.shared, self.weighing = contexts, request.shared, weighing
        self.mark = _mark(contexts, weighing)
        self.chunks, self.exact = chunks, limit
        self.leader: Sequence | None = None
        for each in (*companions, *contexts):
            each.leader = self
        self.lockstep = (self, *companions)
        self.members = (*self.lockstep, *contexts)
        self.alone = len(self.members) == 1 and not chunks and sampling.again is None
        self.origin, self.adapter = origin, adapter
        # The prompt is the same for all continuations: one of them tells.
        told = sampling.prompt_logprobs is not None and index == 0
        self.prompt_logprobs: list[np.ndarray] | None = [] if told else None
        self.prompt_logprobs_from = max(1, sampling.prompt_logprobs_from)

    def tentative(self) -> Sequence:
        """One that stands where this one does, and goes on by tokens that are drafted, of which this one knows
        nothing."""
        other = object.__new__(Sequence)
        other.__dict__ |= self.__dict__  # copy.copy takes ten times as long, which is felt
        other.tokens, other.lockstep, other.members = list(self.tokens), (other,), (other,)
        other.matcher = self.matcher and self.matcher.copy()
        return other

    @property
    def keeps_all(self) -> bool:
        """Whether its cache is never compressed, whatever becomes of those of others."""
        return self.sampling.kv == "full"

    @property
    def recent(self) -> list[int]:
        """The last of its generated tokens, as many as its restriction has to know."""
        reach = 0 if self.restriction is None else self.restriction.reach
        return self.tokens[max(self.prompt, len(self.tokens) - reach) :]

    @property
    def running(self) -> bool:
        """Whether it has memory."""
        return self.held is not None

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are in the cache, or will be once the queued work is done."""
        return 0 if self.held is None else self.held.computed

    @property
    def length(self) -> int:
        """Tokens, with one for each queued step that will append some."""
        return len(self.tokens) + self.in_flight

    @property
    def remaining(self) -> int:
        """Tokens that must be computed before the next one can be sampled; 1 where it decodes."""
        held = self.held
        return len(self.tokens) + self.in_flight - (0 if held is None else held.computed + len(held.filled))

    def ready(self, ahead: int = 0) -> bool:
        """Whether its next step, in which up to ``ahead`` tokens may be drafted, can be formed now: nothing that it has
        to wait for is under way."""
        if not self.in_flight:
            return True
        return not (self.waits or self.guessed or (ahead and self.draft is not None))

    @property
    def drafts_next(self) -> bool:
        """Whether its tokens are awaited, behind which some may be drafted."""
        return self.in_flight > 0 and self.draft is not None

    def catch_up(self) -> None:
        """Its draft knows all of its tokens from now on. It is told when it is asked, or when others may learn from it:
        where drafting does not pay, drafts are seldom asked, and nobody shall wait for what they would learn."""
        if self.draft is not None and self.told < len(self.tokens):
            self.draft.extend(self.tokens[self.told :])
            self.told = len(self.tokens)

    @property
    def decoding(self) -> bool:
        """Whether only its newest token remains to be computed, and its companions'."""
        if len(self.members) == 1:  # asked for each sequence at each step
            return self.remaining == 1
        return all(member.remaining == 1 for member in self.lockstep) and self.informed

    @property
    def is_context(self) -> bool:
        """Whether it is seen by another sequence, and not continued."""
        return self.leader is not None and bool(self.leader.contexts)

    @property
    def informed(self) -> bool:
        """Whether all of its contexts are in the cache, or will be once the queued work is done."""
        return not any(context.remaining for context in self.contexts)

    def blocks(self, size: int, count: int, first: int = 0) -> Iterator[list[int]]:
        """Its ``count`` first tokens in blocks of ``size``, from the block number ``first`` on, as the prefix tree
        knows them: full ones, and of a context the last one too. What depends on contexts is marked by them."""
        end = count if self.is_context else count - size + 1
        for start in range(first * size, end, size):
            tokens = self.tokens[start : min(start + size, count)]
            yield [*self.mark, *tokens] if start <= self.shared < start + size else tokens

    @property
    def shift(self) -> int:
        """How far behind their places the positions are of those that see contexts."""
        return max((len(context.tokens) - self.shared for context in self.contexts), default=0)

    @property
    def rank(self) -> tuple[int, int]:
        """Order among sequences: by priority, then by arrival."""
        return self.request.priority, self.arrival


def common(one: List[int], other: List[int]) -> int:
    """How many tokens two texts begin with alike."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(place for place in range(most) if one[place] != other[place])


def _mark(contexts: tuple[Sequence, ...], weighing: Weighing | None) -> list[int]:
    """Two negative numbers that stand for ``contexts`` in any order, and for how they are weighed."""
    if not contexts:
        return []
    digest = hashlib.blake2b(repr(weighing).encode(), digest_size=16)
    for context in sorted(context.tokens for context in contexts):
        digest.update(array("q", [len(context), *context]).tobytes())
    return numbers_of(digest.digest())
