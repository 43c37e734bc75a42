"""What goes into an engine and what comes out: plain records, which travel between processes as they are."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

import msgspec

from penstock.core.progress import quantity
from penstock.serve.choose.logprobs import LogprobRows
from penstock.serve.choose.sampling import SamplingParams


class Finish(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"  #: the model ended its text, or a stop token or string came
    LENGTH = "length"  #: ``max_tokens`` or the model's context was reached
    ABORT = "abort"  #: the client went away, or asked for it
    DEADLINE = "deadline"  #: it took longer than it may
    ERROR = "error"  #: it could not go on: no token was left that it allows, or its grammar took too much


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        id: unique among the requests that are alive.
        prompt: token ids, at least one.
        sampling: how tokens are chosen, and how many continuations.
        priority: a smaller number goes first.
        key: whose request it is; the keys share the engine fairly.
        deadline: seconds from arrival after which the request ends with what it has, or None.
        keep: what it has come to stays in the cache after its end, for others to go on from, until it is forgotten; see
            :meth:`~penstock.serve.engine.engine.Engine.forget`.
        given: how many tokens of the prompt count as given, the others as generated; None for all. Of a fork, it is
            what its parent was given.
        contexts: texts that stand behind the first ``shared`` tokens of the prompt and before the others, as the
            engine's :mod:`~penstock.serve.kv.reuse.contract` encodes them.
        adapter: the name of the adapter by which it is computed; empty for the model alone. A fork has its parent's.
        whole: nobody is shown a part of the answer, so that it may be computed anew elsewhere.
    """

    id: str
    prompt: list[int]
    sampling: SamplingParams
    priority: int = 0
    key: str = ""
    deadline: float | None = None
    keep: bool = False
    given: int | None = None
    contexts: list[list[int]] = dataclasses.field(default_factory=list)
    shared: int = 0
    adapter: str = ""
    whole: bool = False

    @property
    def length(self) -> int:
        """Tokens of the prompt and of all contexts."""
        return len(self.prompt) + sum(map(len, self.contexts))


@dataclasses.dataclass(frozen=True)
class Embed:
    """Texts, as tokens, whose vectors are wanted; ``id`` is unique among the requests that are alive. Where texts are
    pairs, the second of each begins with its token number ``seconds``."""

    id: str
    texts: list[list[int]]
    seconds: list[int] | None = None


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Some of the vectors that the request ``id`` wants: float32 ``rows`` of its texts at ``places``."""

    id: str
    places: list[int]
    rows: bytes


class Act(enum.StrEnum):
    """What an operator may tell an engine to do."""

    PAUSE = "pause"
    RESUME = "resume"
    SLEEP = "sleep"
    WAKE = "wake"
    LOAD = "load"
    LOAD_ADAPTER = "load_adapter"
    DROP_ADAPTER = "drop_adapter"


@dataclasses.dataclass(frozen=True)
class Control:
    """Tells the engine to ``act``; weights are loaded from ``folder``, and are called by ``version`` where one is
    given; so is the adapter that is called ``name``. ``id`` is that of the answer."""

    id: str
    act: Act
    folder: str = ""
    version: int | None = None
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Abort:
    """Ends the request ``id`` or only its continuation ``index``, whatever its state; an unknown one is ignored."""

    id: str
    index: int | None = None


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):  # one for each sequence at each step
    """News of one continuation of a request.

    Attributes:
        id: of the request.
        index: which of its ``n`` continuations.
        tokens: the new tokens, in order; a stop token that ended the request is the last of them.
        logprobs: one for each of ``tokens`` where they were asked for.
        prompt_logprobs: once, where they were asked for: one for each prompt token but the first.
        finish: why it ended; None while it goes on.
        cached: prompt tokens whose keys and values were in the cache already.
        drafted, accepted: tokens that were drafted in the step, and those of them that are among ``tokens``.
        version: of the weights that computed ``tokens``.
    """

    id: str
    index: int
    tokens: list[int]
    logprobs: LogprobRows | None = None
    prompt_logprobs: LogprobRows | None = None
    finish: Finish | None = None
    cached: int = 0
    drafted: int = 0
    accepted: int = 0
    version: int = 0


def described(memory: Mapping[str, int]) -> str:
    """Bytes of a device's memory, by what they are for, in words: ``weights 16.4 GB, cache 48 GB, left 12 GB``."""
    return ", ".join(f"{name} {quantity(size, 'B')}" for name, size in memory.items())


@dataclasses.dataclass(frozen=True)
class ReplicaState:
    """One of several engines with the same model.

    Attributes:
        state: ``ready``, ``draining`` and ``drained`` (it takes no requests; some are under way, or none), ``starting``
            or ``dead``.
        under_way: continuations that were sent there.
        restarts: how often it was started again.
        process: its id; 0 while there is none.
        now: its engine's state, the last known.
    """

    state: str
    under_way: int
    restarts: int
    process: int
    now: Snapshot


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """An engine's state at the end of a step, for the metrics and the live page.

    Attributes:
        steps: steps so far.
        running, waiting: sequences that have memory, and that wait for it.
        blocks, held: of the pool, in all and held by sequences.
        batch_tokens, batch_sequences: of the last step.
        prompt_tokens, cached_tokens, output_tokens, preemptions: counters since the start.
        drafted_tokens, accepted_tokens: the same of speculation.
        sequence_steps: how often a step brought tokens of a sequence, one or several.
        drafted_at, accepted_at: drafted and accepted tokens by their place behind the newest one.
        dropped_tokens: how many went out of caches that were compressed.
        policy: what the cache of a sequence keeps, by name.
        compress_seconds: how long the host was at compressing caches: of a device's work, the time to queue it, and
            what the host waited for meanwhile.
        reused_tokens: tokens of contexts that were encoded apart or moved, found in the cache.
        renewed_tokens: tokens of contexts that were moved, computed again.
        step_seconds: of the last step.
        hits, misses: full blocks of the sequences that were admitted, found in the cache and not.
        evicted: blocks that were evicted from the prefix tree.
        tier_bytes: that blocks take in the host's memory and on disk.
        tier_hits: blocks that came back from the host's memory to the cache, and from disk to the host's memory.
        embedded_texts, embedded_tokens: of which vectors were made.
        version: of the weights.
        paused, asleep: whether it was told to be.
        adapters: the names of those that requests can choose.
        adapter_keys: what tells each of these from others, of one engine.
        replicas: what this adds up, where it is the state of several engines.
        resent: requests that were sent to another replica, as theirs was lost.
    """

    steps: int
    running: int
    waiting: int
    blocks: int
    held: int
    batch_tokens: int
    batch_sequences: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    preemptions: int
    step_seconds: float
    sequence_steps: int = 0
    dropped_tokens: int = 0
    policy: str = "full"
    compress_seconds: float = 0.0
    reused_tokens: int = 0
    renewed_tokens: int = 0
    drafted_at: tuple[int, ...] = ()
    accepted_at: tuple[int, ...] = ()
    hits: int = 0
    misses: int = 0
    evicted: int = 0
    tier_bytes: tuple[int, int] = (0, 0)
    tier_hits: tuple[int, int] = (0, 0)
    embedded_texts: int = 0
    embedded_tokens: int = 0
    version: int = 0
    paused: bool = False
    asleep: bool = False
    adapters: tuple[str, ...] = ()
    adapter_keys: tuple[str, ...] = ()
    replicas: tuple[ReplicaState, ...] = ()
    resent: int = 0
