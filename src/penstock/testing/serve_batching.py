"""The law of ``serve.batching``: a machine that plays any course of events on a small engine.

Requests arrive, overlap, fork, are cut back, fed, aborted and run out of time, on pools so small that sequences are
thrown out, with and without drafts. After each step the budgets are checked, and the pool compares its books with the
sequences; in the end every request has finished with the tokens of the reference decoder, which knows no cache and no
batch, and no block is held. What each clause is there to catch:

- tokens and log-probabilities of the reference: wrong blocks, tables, positions, masks, draws, copies on write, tokens
  that belong to somebody else, log-probabilities that slip by one after a preemption;
- budgets and books: a batch that is too large, blocks that are lost, held twice or given back too early;
- who is thrown out, and who comes back first: the least urgent that came last goes; one that was thrown out returns
  before anybody of the same priority and key who has not run yet; what it had found in the cache is counted once;
- forks and cuts: a block that is written to although somebody else holds it, or the prefix tree offers it;
- tiers: a block that comes back with another's content, or too early, or over what has yet to be copied;
- nobody waits for ever: see :func:`check_no_starvation`; the urgent go first: see :func:`check_priority`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from penstock.core.errors import UsageError
from penstock.core.events import Event
from penstock.core.randomness import numpy_generator
from penstock.models.decoder import Decoder
from penstock.models.sampling import Sampling
from penstock.ops.paged.codecs.contract import Codec
from penstock.ops.paged.codecs.plain import Plain as PlainCodec
from penstock.ops.paged.reference import Reference
from penstock.serve.batching.contract import Batching
from penstock.serve.build import build_engine, build_runners
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.decode.uscd import UncertaintyAwareContrast
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.loops.contract import Loop
from penstock.serve.engine.loops.plain import Plain
from penstock.serve.engine.sequence import Sequence as EngineSequence
from penstock.serve.kv.disk import DiskBlocks
from penstock.serve.kv.evictions.contract import Eviction
from penstock.serve.kv.host import HostBlocks
from penstock.serve.kv.policies.contract import CachePolicy
from penstock.serve.kv.policies.full import Full
from penstock.serve.kv.tiers import Tiers
from penstock.serve.messages import Delta, Finish, Request
from penstock.speculate.contract import Drafter
from penstock.speculate.controllers.contract import Controller
from penstock.testing.alike import alike
from penstock.testing.enrolled import enrolled
from penstock.testing.kept_scores import KeptScores
from penstock.testing.reference import Scores, continued, greedy, prompt_logprobs
from penstock.testing.serve_model import SHAPE, small_draft, small_head, small_model, small_predictor
from penstock.testing.serve_simulation import simulated_engine

MOST, STOP = 16, 7
FULL = Full()


#: Where the caches of a sequence and of its companions were compressed; None is where the policy is due.
Places = tuple[tuple[int, ...], ...] | None

#: What is known to follow a text, by what decides it.
_FOLLOWS: dict[tuple[object, ...], list[int]] = {}


def expected(
    model: Decoder,
    tokens: tuple[int, ...],
    given: int,
    temperature: float,
    seed: int,
    rule: UncertaintyAwareContrast | None,
    count: int,
    guess: Sequence[int],
    kv: CachePolicy = FULL,
    places: Places = None,
) -> list[int]:
    """The ``count`` tokens that follow ``tokens`` by ``model``, of which so many were ``given``."""
    known = _FOLLOWS.setdefault((model, tokens, given, temperature, seed, rule, kv, places), [])
    if len(known) < count:
        text = [*tokens, *known]
        sampling = Sampling(temperature=temperature, seed=seed, max_tokens=len(tokens) + count - given)
        compressed: Iterable[tuple[int, ...] | None] = places or itertools.repeat(None)
        scores = Scores if kv == FULL else functools.partial(_kept, kv, iter(compressed))
        known += continued(model, text, given, sampling, rule, guess[len(known) :], scores)
    return known[:count]


def _kept(
    kv: CachePolicy,
    places: Iterator[tuple[int, ...] | None],
    model: Decoder,
    likely: Sequence[int],
    prompt: int,
) -> KeptScores:
    return KeptScores(model, kv, prompt, next(places))


@functools.cache
def rated(
    model: Decoder, prompt: tuple[int, ...], given: int = 0, kv: CachePolicy = FULL, places: Places = None
) -> list[float]:
    """The log-probabilities of the tokens of ``prompt`` but the first."""
    if kv == FULL:
        return prompt_logprobs(model, prompt)
    scores = KeptScores(model, kv, given, places[0] if places else None).every(prompt)
    return [float(each.log_softmax(-1)[token]) for each, token in zip(scores, prompt[1:], strict=False)]


def numbers(stream: str, count: int) -> list[int]:
    """``count`` tokens, the same for the same ``stream``."""
    return [int(token) for token in numpy_generator(0, f"testing/{stream}").integers(SHAPE.vocabulary, size=count)]


#: Prompts begin like one of these, and go on on their own.
PREFIXES = [numbers(f"prefix {index}", 24) for index in range(2)]
TAILS = [numbers(f"tail {index}", 9) for index in range(3)]

#: A rule with a second sequence that begins as prompts do.
CONTRAST = UncertaintyAwareContrast(prompt=(*PREFIXES[0][:8], *TAILS[0][:4]))

prompts = st.builds(
    lambda prefix, shared, tail, own: PREFIXES[prefix][:shared] + TAILS[tail][:own],
    st.integers(0, 1),
    st.sampled_from([0, 3, 8, 16, 24]),
    st.integers(0, 2),
    st.sampled_from([1, 4, 9]),
)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2),
    max_tokens=st.sampled_from([1, 5, MOST, MOST]),
    n=st.sampled_from([1, 1, 1, 3]),
    stop_tokens=st.sampled_from([(), (STOP,)]),
    prompt_logprobs=st.sampled_from([None, None, 1]),
    rule=st.sampled_from([None, None, None, CONTRAST]),
)

#: A request and one of its continuations.
Name = tuple[str, int]


@dataclasses.dataclass
class Account:
    """What is known of one continuation: its ``text`` when it was touched last, of which ``given`` tokens were its
    prompt, its ``limit`` of tokens in all, what its cache keeps (``kv``), and the tokens that were ``told``; the
    ``model`` says what they should be. The engine has it as ``sequence``.
    """

    model: Decoder
    request: Request
    index: int
    text: list[int]
    given: int
    limit: int
    kv: CachePolicy
    sequence: EngineSequence
    touched: bool = False
    told: list[int] = dataclasses.field(default_factory=list)
    finish: Finish | None = None
    aborted: bool = False

    @property
    def places(self) -> Places:
        """Where its cache was compressed, which the load decides where the policy is patient."""
        return tuple(tuple(each.compressed) for each in self.sequence.lockstep) if self.kv.patient else None

    @property
    def ahead(self) -> list[int]:
        """What follows the text."""
        sampling = self.request.sampling
        rule = CONTRAST if sampling.rule is not None else None
        seed = sampling.seed + self.index if sampling.temperature else 0  # greedy ones are all the same
        left = self.limit - len(self.text)
        guess = self.told[-left:] if self.touched else self.told
        for count in (min(len(guess), left), left):
            asked = (self.model, tuple(self.text), self.given, sampling.temperature, seed, rule)
            follows = expected(*asked, count, guess, self.kv, self.places)
            if STOP in sampling.stop_tokens and STOP in follows:
                return follows[: follows.index(STOP) + 1]
        return follows


class AtOnce(Executor):
    """Does what it is given before it returns: a course of events is the same each time."""

    def submit(self, function: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*given, **named))
        return done


class EngineMachine(RuleBasedStateMachine):
    """Any course of events. Subclasses name the policy, see :func:`machine_of`.

    Attributes:
        codec: of the cache.
        drafts: what drafts, what decides how much, and how it branches.
        models: what is served, and what drafts for it.
        oracle: says what tokens should come out; None is what is served.
        options: more of the engine's.
    """

    batching: Batching
    loops: list[Loop]
    drafts: list[tuple[Drafter | None, Controller, tuple[int, ...]]]
    kv: CachePolicy = FULL
    evictions: list[Eviction]
    codec: Codec = PlainCodec()
    models: tuple[Decoder, Decoder] = small_model(), small_draft()
    oracle: Decoder | None = None
    options: Mapping[str, Any] = {}

    @initialize(
        loop=st.integers(0, 7),
        tokens=st.sampled_from([10, 24, 64]),
        sequences=st.sampled_from([1, 4, 10]),
        block_size=st.sampled_from([2, 4]),
        cache=st.sampled_from([36, 60, 400]),
        draft=st.integers(0, 63),
        eviction=st.integers(0, 7),
        places=st.sampled_from([0, 0, 3, 40]),
    )
    def open(
        self,
        loop: int,
        tokens: int,
        sequences: int,
        block_size: int,
        cache: int,
        draft: int,
        eviction: int,
        places: int,
    ) -> None:
        drafter, controller, tree = self.drafts[draft % len(self.drafts)]
        config = EngineConfig(
            batching=self.batching,
            loop=self.loops[loop % len(self.loops)],
            attention=Reference(),
            codec=self.codec,
            tokens=tokens,
            sequences=sequences,
            block_size=block_size,
            eviction=self.evictions[eviction % len(self.evictions)],
            cache_tokens=cache,
            draft=drafter,
            draft_tree=tree,
            controller=controller,
            kv=self.kv,
            check=True,
            **self.options,
        )
        model, draft_model = self.models
        drafts = small_head(drafter) if drafter is not None and drafter.head is not None else draft_model
        predictor = small_predictor() if drafter is not None and controller.predicts else None
        runner, drafting = build_runners(model, config, drafts, predictor=predictor)
        self.folder = tempfile.TemporaryDirectory()
        disk = DiskBlocks(Path(self.folder.name), "machine", 1 << 20)
        tiers = Tiers(HostBlocks(runner.cache, places), disk, AtOnce()) if places else None
        self.engine = Engine(config, runner, draft=drafting, tiers=tiers)
        for name, place in config.adapters.items():
            self.engine.load_adapter(name, place)
        if self.engine.speculation is not None:
            # By a clock that goes on by itself: a course of events is the same each time.
            self.engine.speculation.clock = itertools.count().__next__
        self.accounts: dict[Name, Account] = {}
        self.rated: set[str] = set()
        self.found = 0
        self.thrown: set[Name] = set()

    @rule(
        asked=st.lists(st.tuples(prompts, params), min_size=1, max_size=4),
        priority=st.sampled_from([0, 0, 1]),
        key=st.sampled_from(["", "a", "b"]),
        deadline=st.sampled_from([None, None, None, 0.0, 1e6]),
    )
    def arrive(self, asked: list[tuple[list[int], SamplingParams]], **fields: Any) -> None:
        for prompt, sampling in asked:
            self._enter(Request(str(len(self.accounts)), prompt, sampling, **fields), len(prompt))

    @precondition(lambda self: self._speaking())
    @rule(data=st.data(), back=st.sampled_from([0, 0, 3]), sampling=params)
    def fork(self, data: st.DataObject, back: int, sampling: SamplingParams) -> None:
        """From where a sequence is, or from a little before."""
        name = data.draw(st.sampled_from(self._speaking()))
        parent = self.accounts[name]
        tokens = self._text(name)
        few = sampling.model_copy(update={"max_tokens": min(sampling.max_tokens, 6)})
        prompt = tokens[: max(parent.given, len(tokens) - back)]
        self._enter(Request(str(len(self.accounts)), prompt, few), parent.given, of=name)

    @precondition(lambda self: self._speaking())
    @rule(data=st.data(), back=st.integers(0, 6))
    def truncate(self, data: st.DataObject, back: int) -> None:
        name = data.draw(st.sampled_from(self._speaking()))
        account, length = self.accounts[name], max(self.accounts[name].given, len(self._text(name)) - back)
        try:
            self.engine.truncate(name[0], length, name[1])
        except UsageError:
            assert not self._lives(name), "a living sequence can be cut"
            return
        assert self._text(name) == [*account.text, *account.ahead][:length]
        account.text, account.touched = self._text(name), True

    @precondition(lambda self: self._speaking())
    @rule(data=st.data(), tokens=st.lists(st.integers(0, SHAPE.vocabulary - 1), max_size=4))
    def feed(self, data: st.DataObject, tokens: list[int]) -> None:
        name = data.draw(st.sampled_from(self._speaking()))
        account = self.accounts[name]
        try:
            self.engine.feed(name[0], tokens, name[1])
        except UsageError:
            assert not self._lives(name) or len(self._text(name)) + len(tokens) >= account.limit
            return
        text = self._text(name)
        before = text[: len(text) - len(tokens)]
        assert before == [*account.text, *account.ahead][: len(before)] and text[len(before) :] == tokens
        account.text, account.touched = text, True

    @precondition(lambda self: self._alive())
    @rule(data=st.data(), one=st.booleans())
    def abort(self, data: st.DataObject, one: bool) -> None:
        id, index = data.draw(st.sampled_from(self._alive()))
        for name, account in self.accounts.items():
            meant = name == (id, index) or (name[0] == id and not one and account.finish is None)
            # One that has ended, and whose last news is still to be told, is not aborted any more.
            account.aborted |= meant and self._lives(name)
        self.engine.abort(id, index if one else None)
        self.engine.abort("unknown")

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self._step()

    def teardown(self) -> None:
        """Everything finishes, with the right tokens, and nothing is left."""
        if not hasattr(self, "engine"):
            return
        self.folder.cleanup()  # what is not there any more is computed again
        for _ in range(60 + 8 * sum(MOST + len(each.text) for each in self.accounts.values())):
            if not self.engine.busy:
                break
            self._step()
        assert not self.engine.busy, "requests do not finish"
        now = self.engine.snapshot()
        assert now.held == now.waiting == now.running == 0
        assert now.cached_tokens == self.found, "what is found in the cache is counted once for each sequence"
        for account in self.accounts.values():
            self._judge(account)

    def _enter(self, request: Request, given: int, of: Name | None = None) -> None:
        """Adds or forks ``request``, which the engine refuses exactly where it cannot fit, or where the parent
        has ended and its last news is still to be told."""
        request, oracle = self._asked(request, of)
        try:
            self.engine.add(request) if of is None else self.engine.fork(of[0], request, of[1])
        except UsageError:
            assert self._left(request, given) < 1 or (of is not None and not self._lives(of))
            return
        left = self._left(request, given)
        assert left >= 1
        limit = len(request.prompt) + min(request.sampling.max_tokens, left)
        for sequence in self.engine._sequences[request.id]:
            self.accounts[request.id, sequence.index] = Account(
                oracle, request, sequence.index, list(request.prompt), given, limit, self.kv, sequence
            )

    def _asked(self, request: Request, of: Name | None) -> tuple[Request, Decoder]:
        """``request``, a fork ``of`` another where one is named, as the engine gets it, and who knows its answer."""
        return request, self._oracle

    @property
    def _oracle(self) -> Decoder:
        return self.oracle or self.models[0]

    def _left(self, request: Request, given: int) -> int:
        """The most tokens that can follow the prompt. With a companion both have to fit, with a last block each that is
        nearly empty."""
        limits, length = self.engine.limits, len(request.prompt)
        if request.sampling.rule is None:
            return self.engine.context - length
        other, size = len(CONTRAST.prompt) + length - given, limits.block_size
        both = limits.blocks * size - 2 * (size - 1) - length - other
        return min(self.engine.context - max(length, other), both // 2) if limits.sequences > 1 else 0

    def _step(self) -> None:
        before = self.engine.steps.last
        for delta in self.engine.step():
            self._receive(delta)
        for event in self.engine.events.fresh():
            self._hear(event)
            # Where a cache that is compressed wanted the room of the only one, there is no batch after it.
            if event.kind == "preempted" and self.engine.steps.last is not before:
                self._judge_preemption((event.id, event.index), int(event.detail["taken"]))
        now, limits = self.engine.snapshot(), self.engine.limits
        assert now.batch_tokens <= limits.tokens
        assert now.batch_sequences <= now.batch_tokens
        assert max(now.batch_sequences, now.running) <= limits.sequences
        assert now.held <= limits.blocks

    def _receive(self, delta: Delta) -> None:
        account = self.accounts[delta.id, delta.index]
        assert account.finish is None, "news of a sequence that has finished"
        account.told += delta.tokens
        account.finish = delta.finish
        if delta.prompt_logprobs is not None:
            assert delta.id not in self.rated, "the prompt is rated twice"
            self.rated.add(delta.id)
            prompt = account.request.prompt
            assert [each.token for each in delta.prompt_logprobs] == prompt[1:]
            known = rated(account.model, tuple(prompt), account.given, self.kv, account.places)
            for each, wanted in zip(delta.prompt_logprobs, known, strict=True):
                assert abs(each.logprob - wanted) < 1e-3

    def _hear(self, event: Event) -> None:
        """Who is thrown out, and who returns first."""
        name = event.id, event.index
        if event.kind == "preempted":
            by = str(event.detail["by"]), int(event.detail["by_index"])
            assert self._rank(by) <= self._rank(name), "one who came earlier is thrown out for a later one"
            self.thrown.add(name)
        elif event.kind == "admitted":
            if name not in self.thrown:
                self.found += int(event.detail["cached"])
                own = self.accounts[name].request
                others = [self.accounts[each].request for each in self.thrown]
                before = [each for each in others if (each.priority, each.key) == (own.priority, own.key)]
                assert not before or "forked" in event.detail, "one who was thrown out is overtaken by a newcomer"
            self.thrown.discard(name)
        elif event.kind == "finished":
            self.thrown.discard(name)

    def _judge_preemption(self, victim: Name, taken: int) -> None:
        """Those who had their turn in the step after it, behind so many entries, could have been thrown out too."""
        entries = self.engine.steps.last.entries
        if not any(each.sequence.guessed or each.window for each in entries):
            after = [each.sequence for each in entries[taken:] if each.sequence.leader is None]
            later = [each for each in after if self._rank((each.request.id, each.index)) > self._rank(victim)]
            assert not later, "one who came later keeps his memory"

    def _rank(self, name: Name) -> tuple[int, int]:
        """Priority, then arrival."""
        return self.accounts[name].request.priority, list(self.accounts).index(name)

    def _lives(self, name: Name) -> bool:
        return any(each.index == name[1] for each in self.engine._sequences.get(name[0], ()))

    def _text(self, name: Name) -> list[int]:
        """What the engine has of a sequence; what was told last where it has ended."""
        for each in self.engine._sequences.get(name[0], ()):
            if each.index == name[1]:
                return list(each.tokens)
        account = self.accounts[name]
        return [*account.text, *account.ahead]

    def _alive(self) -> list[Name]:
        """Continuations that have not ended."""
        return [name for name, each in self.accounts.items() if each.finish is None and not each.aborted]

    def _speaking(self) -> list[Name]:
        """Those that have begun."""
        return [name for name in self._alive() if self.accounts[name].told]

    def _judge(self, account: Account) -> None:
        request, told = account.request, account.told
        wanted = account.ahead
        reason = Finish.STOP if STOP in request.sampling.stop_tokens and wanted[-1:] == [STOP] else Finish.LENGTH
        if account.aborted or request.deadline == 0:
            assert account.touched or told == wanted[: len(told)]
            reason = Finish.ABORT if account.aborted else Finish.DEADLINE
        else:
            assert told[len(told) - len(wanted) :] == wanted
            assert account.touched or len(told) == len(wanted)
        assert account.finish is reason
        if request.sampling.prompt_logprobs is not None and account.index == 0 and told:
            assert request.id in self.rated


def check(batching: Batching, examples: int = 20, steps: int = 20) -> None:
    """Asserts the law: the machine plays so many courses of events, the same each time."""
    chosen = alike(examples, stateful_step_count=steps)
    run_state_machine_as_test(machine_of(batching), settings=chosen)
    for seed in range(8):
        check_crowding(batching, seed)
    check_forks(batching)
    check_rated(batching)
    check_no_starvation(batching)
    check_priority(batching)
    check_progress(batching)


def check_crowding(batching: Batching, seed: int) -> None:
    """Asserts what the machine does, for a crowd that must be thrown out again and again, also amidst its prompts."""
    crowd(machine_of(batching)(), seed)


def crowd(machine: EngineMachine, seed: int) -> None:
    """Plays such a course of events on ``machine``."""
    draw = numpy_generator(seed, "testing/crowding")
    machine.open(
        loop=seed,
        tokens=int(draw.choice([10, 24])),
        sequences=int(draw.choice([4, 10])),
        block_size=int(draw.choice([2, 4])),
        cache=int(draw.choice([36, 48, 60])),
        draft=seed,
        eviction=seed,
        places=(0, 3, 40)[seed % 3],
    )
    for number in range(10):
        for _ in range(int(draw.integers(3))):
            prompt = PREFIXES[int(draw.integers(2))][: int(draw.integers(24))] + TAILS[int(draw.integers(3))]
            sampling = SamplingParams(
                temperature=float(draw.integers(2)),
                seed=number,
                max_tokens=MOST,
                prompt_logprobs=int(draw.integers(2)) or None,
            )
            machine.arrive(asked=[(prompt[: machine.engine.context - 1], sampling)], deadline=None)
        machine.step(times=int(draw.integers(1, 5)))
    machine.teardown()


def check_rated(batching: Batching) -> None:
    """Asserts that log-probabilities of a prompt are told once and are the model's, also where the sequence was thrown
    out amidst its prompt, as it is here wherever a policy lets the others go on beside it."""
    config = EngineConfig(
        batching=batching, attention=Reference(), tokens=4, sequences=3, block_size=2, cache_tokens=60, check=True
    )
    engine, prompt = build_engine(small_model(), config), numbers("rated", 30)
    for id in ("one", "other"):
        engine.add(Request(id, numbers(id, 4), SamplingParams(temperature=0, max_tokens=30)))
    for _ in range(3):
        engine.step()
    engine.add(Request("rated", prompt, SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0)))
    told: list[float] = []
    while engine.busy:
        for delta in engine.step():
            told += [each.logprob for each in delta.prompt_logprobs or []]
    wanted = rated(small_model(), tuple(prompt))
    assert len(told) == len(wanted), f"{len(told)} log-probabilities of {len(wanted)} tokens"
    assert all(abs(one - other) < 1e-3 for one, other in zip(told, wanted, strict=True))


def check_forks(batching: Batching) -> None:
    """Asserts that forks and cuts leave alone what others hold or may find, wherever in a block they are: after a
    parent and its children have gone their own ways, and one was cut back and fed, later requests find the keys and
    values of each text where the prefix tree says."""
    config = EngineConfig(
        batching=batching, attention=Reference(), tokens=64, sequences=8, block_size=4, cache_tokens=800, check=True
    )
    for back in range(6):
        engine, told = build_engine(small_model(), config), defaultdict[str, list[int]](list)
        prompt = numbers(f"fork {back}", 6)
        engine.add(Request("parent", prompt, SamplingParams(temperature=0, max_tokens=30)))
        while len(told["parent"]) < 9:
            _hear(engine, told)
        start = [*prompt, *told["parent"]][: len(prompt) + len(told["parent"]) - back]
        for seed in range(2):
            sampling = SamplingParams(seed=seed, max_tokens=8, temperature=1.0)
            engine.fork("parent", Request(f"child {seed}", start, sampling))
        engine.abort("parent")
        while engine.busy:
            _hear(engine, told)
        for seed in range(2):
            drawn = Sampling(seed=seed, temperature=1.0, max_tokens=len(start) - len(prompt) + 8)
            wanted = continued(small_model(), start, len(prompt), drawn, guess=told[f"child {seed}"])
            assert told[f"child {seed}"] == wanted, "a fork's tokens are not those of its text"
        engine.add(Request("cut", [*prompt, *told["parent"]], SamplingParams(temperature=0, max_tokens=20)))
        for _ in range(8):
            _hear(engine, told)
        engine.truncate("cut", len(prompt) + 9 + back % 3)
        engine.feed("cut", [1, 2, 3])
        while engine.busy:
            _hear(engine, told)
        for text in ([*prompt, *told["parent"]], *([*start, *told[f"child {seed}"]] for seed in range(2))):
            engine.add(Request("again", text, SamplingParams(temperature=0, max_tokens=4)))
            told["again"].clear()
            while engine.busy:
                _hear(engine, told)
            assert told["again"] == greedy(small_model(), text, 4), "the tree offers what somebody has overwritten"


def _hear(engine: Engine, told: dict[str, list[int]]) -> None:
    for delta in engine.step():
        told[delta.id] += delta.tokens


def check_progress(batching: Batching) -> None:
    """Asserts that once all run and decode, each of them gains a token in every step."""
    config = EngineConfig(batching=batching, loop=Plain(), tokens=32, sequences=6, block_size=4, cache_tokens=400)
    engine = simulated_engine(config)
    for number in range(5):
        sampling = SamplingParams(temperature=0, max_tokens=30)
        engine.add(Request(str(number), numbers(f"progress {number}", 6), sampling))
    steady = 0
    while engine.busy:
        running = [each.request.id for each in engine.memory.running if each.decoding]
        gained = {delta.id for delta in engine.step()}
        if len(running) == 5:
            steady += 1
            assert gained == set(running), "one who could go on gained nothing"
    assert steady > 10


def check_no_starvation(batching: Batching) -> None:
    """Asserts that those who came first are done in time although more come at each step than can be served."""
    engine, done = _small_engine(batching), set()
    for step in range(400):
        engine.add(Request(str(step), numbers(f"starving {step}", 5), SamplingParams(temperature=0, max_tokens=4)))
        done |= {int(delta.id) for delta in engine.step() if delta.finish is not None}
        if step >= 60:
            assert set(range((step - 60) // 20)) <= done, "one who came early still waits"


def check_priority(batching: Batching) -> None:
    """Asserts that of those who wait, the urgent go in first."""
    engine = _small_engine(batching)
    for number in range(2):
        engine.add(Request(f"runs {number}", [1, 2], SamplingParams(temperature=0, max_tokens=12)))
    engine.step()
    for number in range(6):
        urgent = number % 2
        sampling = SamplingParams(temperature=0, max_tokens=4)
        engine.add(Request(str(number), numbers(f"urgent {number}", 5), sampling, priority=1 - urgent))
    while engine.busy:
        engine.step()
    order = [event.id for event in engine.events.fresh() if event.kind == "admitted" and not event.id.startswith("r")]
    assert sorted(order[:3]) == ["1", "3", "5"], f"admitted in the order {order}"


def _small_engine(batching: Batching) -> Engine:
    """One that computes nothing, for two sequences at a time."""
    return simulated_engine(
        EngineConfig(batching=batching, loop=Plain(), tokens=16, sequences=2, block_size=4, cache_tokens=400)
    )


def machine_of(batching: Batching) -> type[EngineMachine]:
    """The machine for a policy, over all registered loops, orders of eviction, and drafters with controllers, with and
    without memory and disk for what leaves the cache."""
    loops = [loop for loop in enrolled("serve.loop").values() if isinstance(loop, Loop)]
    drafters = [each for each in enrolled("speculate.drafter").values() if isinstance(each, Drafter)]
    controllers = [each for each in enrolled("speculate.controller").values() if isinstance(each, Controller)]
    pairs = list(itertools.product(drafters, controllers))
    drafts: list[tuple[Drafter | None, Controller, tuple[int, ...]]] = [(None, controllers[0], ())]
    for tree in ((), (2, 2)):
        able = [pair for pair in pairs if pair[0].branches or not tree]
        drafts += [(*pair, tree) for pair in able if pair[1].refuses(pair[0], bool(tree)) is None]
    evictions = [each for each in enrolled("kv.eviction").values() if isinstance(each, Eviction)]
    fields = {"batching": batching, "loops": loops, "drafts": drafts, "evictions": evictions}
    return type(f"{type(batching).__name__}Machine", (EngineMachine,), fields)


def check_stall_free(batching: Batching, seed: int) -> None:
    """Asserts that every running sequence that decodes gains a token in every iteration, unless it was thrown out."""
    draw = numpy_generator(seed, "testing/stall")
    config = EngineConfig(
        batching=batching,
        loop=Plain(),
        attention=Reference(),
        tokens=10,
        sequences=5,
        block_size=4,
        cache_tokens=80,
        check=True,
    )
    engine = build_engine(small_model(), config)
    for number in range(12):
        tokens = [int(token) for token in draw.integers(SHAPE.vocabulary, size=draw.integers(1, 40))]
        engine.add(Request(str(number), tokens, SamplingParams(temperature=0, max_tokens=int(draw.integers(1, 20)))))
    while engine.busy:
        decoding = [sequence for sequence in engine.memory.running if sequence.decoding]
        gained = {delta.id for delta in engine.step() if delta.tokens}
        for sequence in decoding:
            assert sequence.request.id in gained or not sequence.running
