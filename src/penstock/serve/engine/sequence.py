"""A sequence of tokens that the engine continues."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.messages import Finish, Request, TokenLogprobs

if TYPE_CHECKING:
    from penstock.serve.choose.grammar import Matcher


class Sequence:
    """One continuation of a request, and where it stands.

    Attributes:
        request: what asked for it; ``index`` says which of the request's continuations it is.
        sampling: how its tokens are chosen (with its own seed).
        tokens: the prompt and what followed, as far as known here.
        prompt: length of the prompt.
        limit: most tokens in all.
        computed: tokens whose keys and values are in the cache, or will be once the queued work is done.
        in_flight: tokens that queued work will append to ``tokens``.
        blocks: its blocks of the cache, in order; empty while it waits.
        committed: how many of the blocks are in the prefix tree, the last of them at ``node``.
        slot: its row in the runner's tables while it runs, else -1.
        cached: prompt tokens that were found in the cache when it was admitted first; -1 before.
        preempted: whether it lost its memory and has to be computed again.
        deadline: time.monotonic() at which it ends, or None.
        finish: why it ended, None while it lives.
        stop: tokens that end it.
        matcher: where it stands in its grammar; None without one.
        blind: whether its next token can be chosen only once all before it are known here.
        rated: log-probabilities of its prompt's tokens but the first, as far as known; None where they are not wanted,
            or told already.
        companion: a sequence with another prompt that goes on with the same tokens, in the same steps, for the rule of
            this one to look at its scores; None without one. It is no continuation of its own.
        leader: of a companion, the sequence that it belongs to.
    """

    __slots__ = (
        "arrival",
        "blind",
        "blocks",
        "cached",
        "committed",
        "companion",
        "computed",
        "deadline",
        "finish",
        "in_flight",
        "index",
        "leader",
        "limit",
        "matcher",
        "node",
        "preempted",
        "prompt",
        "rated",
        "request",
        "sampling",
        "slot",
        "stop",
        "tokens",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        sampling: SamplingParams,
        tokens: list[int],
        limit: int,
        arrival: int,
        stop: Iterable[int] = (),
        matcher: Matcher | None = None,
        companion: Sequence | None = None,
    ) -> None:
        self.request = request
        self.index = index
        self.sampling = sampling
        self.tokens = tokens
        self.prompt = len(request.prompt)
        self.limit = limit
        self.arrival = arrival
        self.deadline: float | None = None
        self.computed = 0
        self.in_flight = 0
        self.blocks: list[int] = []
        self.committed = 0
        self.node = 0
        self.slot = -1
        self.cached = -1
        self.preempted = False
        self.finish: Finish | None = None
        self.stop = frozenset(stop)
        self.matcher = matcher
        self.companion = companion
        self.leader: Sequence | None = None
        if companion is not None:
            companion.leader = self
        self.blind = sampling.blind
        # The prompt is the same for all continuations: one of them tells.
        self.rated: list[TokenLogprobs] | None = [] if sampling.prompt_logprobs is not None and index == 0 else None

    @property
    def members(self) -> tuple[Sequence, ...]:
        """The sequence itself, and its companion where it has one."""
        return (self,) if self.companion is None else (self, self.companion)

    @property
    def length(self) -> int:
        """Tokens, with those that queued work will append."""
        return len(self.tokens) + self.in_flight

    @property
    def remaining(self) -> int:
        """Tokens that must be computed before the next one can be sampled; 1 where it decodes."""
        return len(self.tokens) + self.in_flight - self.computed

    @property
    def running(self) -> bool:
        """Whether it has a slot and blocks."""
        return self.slot >= 0

    @property
    def decoding(self) -> bool:
        """Whether only its newest token remains to be computed, and its companion's."""
        return self.remaining == 1 and (self.companion is None or self.companion.remaining == 1)

    @property
    def rank(self) -> tuple[int, int]:
        """Order among sequences: by priority, then by arrival."""
        return self.request.priority, self.arrival
