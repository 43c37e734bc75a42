"""A machine that plays any course of events on a small engine.

Requests arrive, overlap, fork, are cut back, fed, aborted and run out of time, on pools so small that sequences are
preempted, with and without drafts. After each step the budgets are checked, and the pool compares its books with the
sequences; in the end every request has finished with the tokens of the reference decoder, which knows no cache and no
batch, and no block is held.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import nn

from penstock.core.errors import UsageError
from penstock.models.decoder import Decoder
from penstock.models.heads.contract import HeadModule
from penstock.ops.paged.codecs.contract import Codec
from penstock.ops.paged.codecs.plain import Plain as PlainCodec
from penstock.ops.paged.reference import Reference
from penstock.serve.batching.contract import Batching
from penstock.serve.build import build_runners
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.loops.contract import Loop
from penstock.serve.kv.disk import DiskBlocks
from penstock.serve.kv.evictions.contract import Eviction
from penstock.serve.kv.host import HostBlocks
from penstock.serve.kv.policies.contract import CachePolicy
from penstock.serve.kv.tiers import Tiers
from penstock.serve.messages import Delta, Finish, Request
from penstock.speculate.contract import Drafter
from penstock.speculate.controllers.contract import Controller
from penstock.testing.at_once import AtOnce
from penstock.testing.engine.accounts import FULL, Account, Name, rated
from penstock.testing.engine.pairs import END, grammars
from penstock.testing.engine.precedence import Precedence
from penstock.testing.engine.requests import CONTRAST, MOST, params, prompts
from penstock.testing.enrolled import enrolled
from penstock.testing.serve_model import SHAPE, small_draft, small_head, small_model, small_predictor

T = TypeVar("T", bound=nn.Module)

#: Chooses one of however many there are, by what is left of a division.
ANY = st.integers(0, 2**16 - 1)


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
        loop=ANY,
        tokens=st.sampled_from([10, 24, 64]),
        sequences=st.sampled_from([1, 4, 10]),
        block_size=st.sampled_from([2, 4]),
        cache=st.sampled_from([36, 60, 400]),
        draft=ANY,
        eviction=ANY,
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
            kv=self.kv,
            check=True,
            **({} if drafter is None else {"controller": controller}),
            **self.options,
        )
        model, draft_model = self.models
        drafts: Decoder | HeadModule = draft_model
        if drafter is not None and drafter.head is not None:
            drafts = _as_wide(small_head(drafter), model)
        predictor = _as_wide(small_predictor(), model) if drafter is not None and controller.predicts else None
        runner, drafting = build_runners(model, config, drafts, predictor=predictor)
        self.folder = tempfile.TemporaryDirectory()
        disk = DiskBlocks(Path(self.folder.name), "machine", 1 << 20)
        tiers = Tiers(HostBlocks(runner.cache, places), disk, AtOnce()) if places else None
        self.engine = Engine(config, runner, frozenset({END}), grammars(), drafting, tiers)
        for name, place in config.adapters.items():
            self.engine.adapters.load(name, place)
        if self.engine.steps.speculation is not None:
            # By a clock that goes on by itself: a course of events is the same each time.
            self.engine.steps.speculation.clock = itertools.count().__next__
        self.accounts: dict[Name, Account] = {}
        self.rated: set[str] = set()
        self.precedence = Precedence(self.accounts)

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
        account.text, account.touched, account.begun = self._text(name), True, min(account.begun, length)

    @precondition(lambda self: self._speaking())
    @rule(data=st.data(), tokens=st.lists(st.integers(0, SHAPE.vocabulary - 1), max_size=4))
    def feed(self, data: st.DataObject, tokens: list[int]) -> None:
        name = data.draw(st.sampled_from(self._speaking()))
        account = self.accounts[name]
        try:
            self.engine.feed(name[0], tokens, name[1])
        except UsageError:
            text = self._text(name)
            fits = len(text) + len(tokens) < account.limit and account.allows(text, tokens)
            assert not fits or not self._lives(name)
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
        assert now.cached_tokens == self.precedence.found, (
            "what is found in the cache is counted once for each sequence"
        )
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
        limit, begun = len(request.prompt) + min(request.sampling.max_tokens, left), len(request.prompt)
        if of is not None and self.accounts[of].request.sampling.grammar == request.sampling.grammar:
            begun = min(begun, self.accounts[of].begun)
        for sequence in self.engine.requests.of(request.id):
            self.accounts[request.id, sequence.index] = Account(
                *(oracle, request, sequence.index, list(request.prompt), given, limit, self.kv, sequence, begun)
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
            return self.engine.limits.context - length
        other, size = len(CONTRAST.prompt) + length - given, limits.block_size
        both = limits.blocks * size - 2 * (size - 1) - length - other
        return min(self.engine.limits.context - max(length, other), both // 2) if limits.sequences > 1 else 0

    def _step(self) -> None:
        before = self.engine.steps.last
        for delta in self.engine.step():
            self._receive(delta)
        for event in self.engine.events.fresh():
            self.precedence.hear(event)
            # Where a cache that is compressed wanted the room of the only one, there is no batch after it.
            if event.kind == "preempted" and self.engine.steps.last is not before:
                self.precedence.judge(event, self.engine.steps.last.entries)
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

    def _lives(self, name: Name) -> bool:
        return any(each.index == name[1] for each in self.engine.requests.of(name[0]))

    def _text(self, name: Name) -> list[int]:
        """What the engine has of a sequence; what was told last where it has ended."""
        for each in self.engine.requests.of(name[0]):
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
        reason = Finish.STOP if account.ends.intersection(wanted[-1:]) else Finish.LENGTH
        if account.aborted or request.deadline == 0:
            assert account.touched or told == wanted[: len(told)]
            reason = Finish.ABORT if account.aborted else Finish.DEADLINE
        else:
            assert told[len(told) - len(wanted) :] == wanted
            assert account.touched or len(told) == len(wanted)
        assert account.finish is reason
        if request.sampling.prompt_logprobs is not None and account.index == 0 and told:
            assert request.id in self.rated


def _as_wide(part: T, model: Decoder) -> T:
    """``part`` in the dtype of ``model``, a copy where that is another one."""
    dtype = model.like.dtype
    same = all(each.dtype == dtype for each in part.parameters())
    return part if same else copy.deepcopy(part).to(dtype)


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
