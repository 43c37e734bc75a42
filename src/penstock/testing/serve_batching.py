"""The law of ``serve.batching``: a machine that plays any course of events on a small engine.

Requests arrive, overlap, fork, are aborted and run out of time, on pools so small that sequences are thrown out. After
each step the budgets are checked, and the pool compares its books with the sequences; in the end every request has
finished with the tokens of the reference decoder, which knows no cache and no batch, and no block is held.
"""

from __future__ import annotations

import functools
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from penstock.core.errors import UsageError
from penstock.core.randomness import numpy_generator
from penstock.models.sampling import Sampling
from penstock.ops.paged.reference import Reference
from penstock.serve.batching.contract import Batching
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.decode.uscd import UncertaintyAwareContrast
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.loops.contract import Loop
from penstock.serve.engine.loops.plain import Plain
from penstock.serve.messages import Delta, Finish, Request
from penstock.testing.enrolled import enrolled
from penstock.testing.reference import contrasted, greedy, sample
from penstock.testing.serve_model import SHAPE, small_model

MOST, STOP = 16, 7


@functools.cache
def expected(
    prompt: tuple[int, ...], temperature: float, seed: int, rule: UncertaintyAwareContrast | None
) -> list[int]:
    """What follows ``prompt``, at least :data:`MOST` tokens or up to the model's context."""
    model, count = small_model(), min(MOST, SHAPE.context - len(prompt))
    sampling = Sampling(temperature=temperature, seed=seed, max_tokens=count)
    if rule is not None:
        return contrasted(model, prompt, sampling, rule)
    return greedy(model, prompt, count) if temperature == 0 else sample(model, prompt, sampling)


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


class EngineMachine(RuleBasedStateMachine):
    """Any course of events. Subclasses name the policy, see :func:`machine_of`."""

    batching: Batching
    loops: list[Loop]

    @initialize(
        loop=st.integers(0, 7),
        tokens=st.sampled_from([10, 24, 64]),
        sequences=st.sampled_from([1, 4, 10]),
        block_size=st.sampled_from([2, 4]),
        cache=st.sampled_from([36, 60, 400]),
    )
    def open(self, loop: int, tokens: int, sequences: int, block_size: int, cache: int) -> None:
        config = EngineConfig(
            batching=self.batching,
            loop=self.loops[loop % len(self.loops)],
            attention=Reference(),
            tokens=tokens,
            sequences=sequences,
            block_size=block_size,
            cache_tokens=cache,
            check=True,
        )
        self.engine: Engine = build_engine(small_model(), config)
        self.requests: dict[str, Request] = {}
        self.got: dict[tuple[str, int], list[int]] = {}
        self.finish: dict[tuple[str, int], Finish] = {}
        self.aborted: set[tuple[str, int]] = set()
        self.rated: dict[str, int] = {}

    @rule(
        asked=st.lists(st.tuples(prompts, params), min_size=1, max_size=4),
        priority=st.sampled_from([0, 0, 1]),
        key=st.sampled_from(["", "a", "b"]),
        deadline=st.sampled_from([None, None, None, 0.0, 1e6]),
    )
    def arrive(self, asked: list[tuple[list[int], SamplingParams]], **fields: Any) -> None:
        for prompt, sampling in asked:
            self._enter(Request(str(len(self.requests)), prompt, sampling, **fields))

    @precondition(lambda self: self._speaking())
    @rule(data=st.data(), back=st.sampled_from([0, 0, 3]), sampling=params)
    def fork(self, data: st.DataObject, back: int, sampling: SamplingParams) -> None:
        """From where a sequence is, or from a little before."""
        id = data.draw(st.sampled_from(self._speaking()))
        tokens = self.requests[id].prompt + self.got[id, 0]
        few = sampling.model_copy(update={"max_tokens": min(sampling.max_tokens, 6)})
        self._enter(Request(str(len(self.requests)), tokens[: max(1, len(tokens) - back)], few), of=id)

    @precondition(lambda self: self._alive())
    @rule(data=st.data(), one=st.booleans())
    def abort(self, data: st.DataObject, one: bool) -> None:
        id = data.draw(st.sampled_from(self._alive()))
        indices = [0] if one else range(self.requests[id].sampling.n)
        self.aborted |= {(id, index) for index in indices}
        self.engine.abort(id, 0 if one else None)
        self.engine.abort("unknown")

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self._step()

    def teardown(self) -> None:
        """Everything finishes, with the right tokens, and nothing is left."""
        if not hasattr(self, "engine"):
            return
        for _ in range(20 + 8 * sum(MOST + len(each.prompt) for each in self.requests.values())):
            if not self.engine.busy:
                break
            self._step()
        assert not self.engine.busy, "requests do not finish"
        assert self.engine.pool.held == self.engine.batcher.waiting == len(self.engine.running) == 0
        for (id, index), got in self.got.items():
            self._judge(self.requests[id], index, got)

    def _enter(self, request: Request, of: str | None = None) -> None:
        """Adds or forks ``request``, which the engine refuses exactly where it cannot fit."""
        try:
            self.engine.add(request) if of is None else self.engine.fork(of, request)
        except UsageError:
            assert self._left(request) < 1
            return
        assert self._left(request) >= 1
        self.requests[request.id] = request
        self.got |= {(request.id, index): [] for index in range(request.sampling.n)}

    def _left(self, request: Request) -> int:
        """The most tokens that can follow the prompt. With a companion both have to fit, with a last block each that is
        nearly empty."""
        limits, length = self.engine.limits, len(request.prompt)
        if request.sampling.rule is None:
            return self.engine.context - length
        other, size = len(CONTRAST.prompt), limits.block_size
        both = limits.blocks * size - 2 * (size - 1) - length - other
        return min(self.engine.context - max(length, other), both // 2) if limits.sequences > 1 else 0

    def _step(self) -> None:
        for delta in self.engine.step():
            self._receive(delta)
        now, limits = self.engine.snapshot(), self.engine.limits
        assert now.batch_tokens <= limits.tokens
        assert now.batch_sequences <= now.batch_tokens
        assert max(now.batch_sequences, now.running) <= limits.sequences
        assert now.held <= limits.blocks

    def _receive(self, delta: Delta) -> None:
        name = delta.id, delta.index
        assert name not in self.finish, "news of a sequence that has finished"
        self.got[name] += delta.tokens
        if delta.prompt_logprobs is not None:
            assert delta.id not in self.rated, "the prompt is rated twice"
            self.rated[delta.id] = len(delta.prompt_logprobs)
        if delta.finish is not None:
            self.finish[name] = delta.finish

    def _alive(self) -> list[str]:
        """Requests of which no continuation has ended."""
        ended = {id for id, _ in self.finish} | {id for id, _ in self.aborted}
        return [id for id in self.requests if id not in ended]

    def _speaking(self) -> list[str]:
        """Requests for one continuation that has begun."""
        return [id for id in self._alive() if self.requests[id].sampling.n == 1 and self.got[id, 0]]

    def _judge(self, request: Request, index: int, got: list[int]) -> None:
        sampling, name = request.sampling, (request.id, index)
        rule = CONTRAST if sampling.rule is not None else None
        wanted = expected(tuple(request.prompt), sampling.temperature, sampling.seed + index, rule)
        wanted = wanted[: min(sampling.max_tokens, self._left(request))]
        reason = Finish.LENGTH
        if STOP in sampling.stop_tokens and STOP in wanted:
            wanted, reason = wanted[: wanted.index(STOP) + 1], Finish.STOP
        if name in self.aborted or request.deadline == 0:
            assert got == wanted[: len(got)]
            reason = Finish.ABORT if name in self.aborted else Finish.DEADLINE
        else:
            assert got == wanted
        assert self.finish[name] is reason
        if sampling.prompt_logprobs is not None and index == 0 and got:
            assert self.rated[request.id] == len(request.prompt) - 1


def machine_of(batching: Batching) -> type[EngineMachine]:
    """The machine for a policy, over all registered loops."""
    loops = [loop for loop in enrolled("serve.loop").values() if isinstance(loop, Loop)]
    return type(f"{type(batching).__name__}Machine", (EngineMachine,), {"batching": batching, "loops": loops})


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
        decoding = [sequence for sequence in engine.running if sequence.decoding]
        gained = {delta.id for delta in engine.step() if delta.tokens}
        for sequence in decoding:
            assert sequence.request.id in gained or not sequence.running
