"""The law of ``serve.batching``: any course of events on a small engine, and what each clause is there to catch.

:class:`~penstock.testing.engine.machine.EngineMachine` plays the courses. Of what it asserts:

- tokens and log-probabilities of the reference (:mod:`~penstock.testing.engine.accounts`): wrong blocks, tables,
  positions, masks, draws, copies on write, tokens that belong to somebody else; penalties and grammars that stand
  elsewhere than their text, behind drafts, forks, cuts, what is fed and preemptions;
- budgets and books: a batch that is too large, blocks that are lost, held twice or given back too early;
- :mod:`~penstock.testing.engine.precedence`, who is thrown out, and who comes back first: the least urgent that came
  last goes; one that was thrown out returns before anybody of the same priority and key who has not run yet; what it
  had found in the cache is counted once;
- tiers: a block that comes back with another's content, or too early, or over what has yet to be copied.

Clauses of their own:

- :func:`check_crowding`: the same, for a crowd that is thrown out again and again;
- :func:`check_charges`: a key pays for its requests that were preempted;
- :func:`check_forks`, forks and cuts: a block that is written to although somebody else holds it, or the prefix tree
  offers it;
- :func:`check_parts`: a part of a step that reads what another one writes, where steps are split; a split that leaves
  somebody out;
- :func:`check_rated`: log-probabilities that slip by one after a preemption;
- :func:`check_no_starvation`: somebody waits for ever, such as those of another key while the first one's keep coming,
  or the long while short ones do;
- :func:`check_priority`: the urgent do not go first, or only those of the key that is due;
- :func:`check_shares`: keys are not told from each other, though the policy says that they are; a key is not charged,
  or for each request as much whatever its length; one that comes late makes up for all that it did not ask for;
- :func:`check_progress`: one who could go on does not; :func:`check_stall_free`: nor does one while others begin, of
  policies that promise it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from hypothesis.stateful import run_state_machine_as_test

from penstock.core.randomness import numpy_generator
from penstock.models.sampling import Sampling
from penstock.ops.paged.reference import Reference
from penstock.serve.batching.contract import Batching
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.loops.plain import Plain
from penstock.serve.messages import Request
from penstock.serve.run.runner import Runner
from penstock.testing.alike import alike
from penstock.testing.engine.accounts import rated
from penstock.testing.engine.crowds import crowd
from penstock.testing.engine.machine import machine_of
from penstock.testing.engine.requests import numbers
from penstock.testing.reference import continued, greedy
from penstock.testing.serve_model import SHAPE, small_model
from penstock.testing.serve_simulation import simulated_engine


def check(batching: Batching, examples: int = 20, steps: int = 20) -> None:
    """Asserts the law: the machine plays so many courses of events, the same each time."""
    batching = batching.at_work()
    check_no_starvation(batching)
    check_priority(batching)
    check_shares(batching)
    check_progress(batching)
    check_parts(batching)
    check_rated(batching)
    chosen = alike(examples, stateful_step_count=steps)
    run_state_machine_as_test(machine_of(batching), settings=chosen)
    check_charges(batching)
    for seed in range(8):
        check_crowding(batching, seed)
    check_forks(batching)


def check_crowding(batching: Batching, seed: int) -> None:
    """Asserts what the machine does, for a crowd that must be thrown out again and again, also amidst its prompts."""
    crowd(machine_of(batching)(), seed)


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
    for _ in _while_busy(engine):
        for delta in engine.step():
            told += [each.logprob for each in delta.prompt_logprobs or []]
    wanted = rated(small_model(), tuple(prompt))
    assert len(told) == len(wanted), f"{len(told)} log-probabilities of {len(wanted)} tokens"
    assert all(abs(one - other) < 1e-3 for one, other in zip(told, wanted, strict=True))


def check_parts(batching: Batching) -> None:
    """Asserts that the parts of a step, where the policy splits it, can be computed at the same time: here the last of
    them is the first. Prompts come in pairs of which the second has little besides
    what both begin with, beside others that decode."""
    config = EngineConfig(
        batching=batching, attention=Reference(), tokens=40, sequences=12, block_size=4, cache_tokens=800, check=True
    )
    engine, told, asked = build_engine(small_model(), config), defaultdict[str, list[int]](list), dict[str, list[int]]()
    runner = engine.executor
    assert isinstance(runner, Runner)
    runner._pass_all = lambda parts, lead: [runner._pass(each) for each in parts[::-1]][::-1]  # type: ignore[method-assign]
    for number in range(8):
        for tail in range(2):
            id = f"{number} {tail}"
            asked[id] = numbers(f"part {number}", 9) + numbers(f"part {id}", (4, 1)[tail])
            engine.add(Request(id, asked[id], SamplingParams(temperature=0, max_tokens=10)))
        for _ in range(2):
            _hear(engine, told)
    for _ in _while_busy(engine):
        _hear(engine, told)
    for id, prompt in asked.items():
        assert told[id] == greedy(small_model(), prompt, 10), "tokens depend on the order of a step's parts"


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
        for _ in _while_busy(engine):
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
        for _ in _while_busy(engine):
            _hear(engine, told)
        for text in ([*prompt, *told["parent"]], *([*start, *told[f"child {seed}"]] for seed in range(2))):
            engine.add(Request("again", text, SamplingParams(temperature=0, max_tokens=4)))
            told["again"].clear()
            for _ in _while_busy(engine):
                _hear(engine, told)
            assert told["again"] == greedy(small_model(), text, 4), "the tree offers what somebody has overwritten"


def _while_busy(engine: Engine, most: int = 5000) -> Iterator[None]:
    """For each step that there is something left for; asserts that there are not more than ``most``."""
    for _ in range(most):
        if not engine.busy:
            return
        yield
    raise AssertionError("requests do not finish")


def _hear(engine: Engine, told: dict[str, list[int]]) -> None:
    for delta in engine.step():
        told[delta.id] += delta.tokens


def check_charges(batching: Batching) -> None:
    """Asserts that it costs a key nothing that one of its requests was preempted: those of two keys that come later go
    in as if there had been room for all."""
    tight, preempted = _order_after(batching, 32)
    roomy, none = _order_after(batching, 400)
    assert preempted and not none, "one is preempted where blocks are short"
    assert tight == roomy, f"after a preemption they go in in the order {tight}, else {roomy}"


def _order_after(batching: Batching, cache: int) -> tuple[list[str], int]:
    """In which order requests of two keys go in that come after one of each has ended in a cache of so many tokens, and
    how often the latter were preempted."""
    engine = simulated_engine(
        EngineConfig(batching=batching, loop=Plain(), tokens=16, sequences=2, block_size=4, cache_tokens=cache)
    )
    for key, count in (("a", 25), ("b", 15)):
        prompt = numbers(f"charged {key}", 5)
        engine.add(Request(key, prompt, SamplingParams(temperature=0, max_tokens=count), key=key))
    for _ in _while_busy(engine):
        engine.step()
    engine.events.fresh()
    for number in range(8):
        key = "ab"[number % 2]
        prompt = numbers(f"charged {number}", 5)
        engine.add(Request(f"{key}{number}", prompt, SamplingParams(temperature=0, max_tokens=4), key=key))
    for _ in _while_busy(engine):
        engine.step()
    order = [event.id for event in engine.events.fresh() if event.kind == "admitted"]
    return order, engine.snapshot().preemptions


def check_progress(batching: Batching) -> None:
    """Asserts that once all run and decode, each of them gains a token in every step."""
    config = EngineConfig(batching=batching, loop=Plain(), tokens=32, sequences=6, block_size=4, cache_tokens=400)
    engine = simulated_engine(config)
    for number in range(5):
        sampling = SamplingParams(temperature=0, max_tokens=30)
        engine.add(Request(str(number), numbers(f"progress {number}", 6), sampling))
    steady = 0
    for _ in _while_busy(engine):
        running = [each.request.id for each in engine.memory.running if each.decoding]
        gained = {delta.id for delta in engine.step()}
        if len(running) == 5:
            steady += 1
            assert gained == set(running), "one who could go on gained nothing"
    assert steady > 10


def check_no_starvation(batching: Batching) -> None:
    """Asserts that those who came first are done in time although more come at each step than can be served, of either
    of two keys alone, and of short prompts with short answers alone."""
    engine, done = _small_engine(batching), set()
    for step in range(400):
        for number in (2 * step, 2 * step + 1):
            length, most = 20 if number % 5 == 3 else 5, 12 if number % 7 == 4 else 4
            sampling = SamplingParams(temperature=0, max_tokens=most)
            engine.add(Request(str(number), numbers(f"starving {number}", length), sampling, key="ab"[number % 2]))
        done |= {int(delta.id) for delta in engine.step() if delta.finish is not None}
        late = set(range((step - 100) // 30)) - done
        assert not late, f"number {min(late)} still waits at step {step}, though two come at each step"


def check_priority(batching: Batching) -> None:
    """Asserts that of those who wait, the urgent go in first, also where another key was given less."""
    engine = _small_engine(batching)
    for number in range(2):
        engine.add(Request(f"runs {number}", [1, 2], SamplingParams(temperature=0, max_tokens=12), key="a"))
    engine.step()
    for number in range(6):
        urgent = number % 2
        sampling = SamplingParams(temperature=0, max_tokens=4)
        key = "a" if urgent else "b"
        engine.add(Request(str(number), numbers(f"urgent {number}", 5), sampling, priority=1 - urgent, key=key))
    for _ in _while_busy(engine):
        engine.step()
    order = [event.id for event in engine.events.fresh() if event.kind == "admitted" and not event.id.startswith("r")]
    assert sorted(order[:3]) == ["1", "3", "5"], f"admitted in the order {order}"


def check_shares(batching: Batching) -> None:
    """Asserts of a policy that is fair that keys which wait are given tokens alike, to within three of the longest
    requests: one has long requests and was served alone, then another comes with short ones."""
    if not batching.fair:
        return
    engine = _small_engine(batching)
    _ask(engine, "long", 30, prompt=6, most=18)
    for _ in range(60):
        engine.step()
    waiting, given = {"long": 30 - len(_admitted(engine)), "short": 80}, {"long": 0, "short": 0}
    _ask(engine, "short", 80, prompt=3, most=5)
    for _ in _while_busy(engine):
        if not all(waiting.values()):
            break
        engine.step()
        for key in _admitted(engine):
            waiting[key] -= 1
            given[key] += {"long": 24, "short": 8}[key]
        assert abs(given["long"] - given["short"]) <= 3 * 24, f"of keys that wait, one is given more: {given}"


def _ask(engine: Engine, key: str, count: int, prompt: int, most: int) -> None:
    """``count`` requests of one ``key``, each with a prompt and an answer of so many tokens."""
    for number in range(count):
        sampling = SamplingParams(temperature=0, max_tokens=most)
        engine.add(Request(f"{key} {number}", numbers(f"{key} {number}", prompt), sampling, key=key))


def _admitted(engine: Engine) -> list[str]:
    """The keys of those who were let in since the last call, in order."""
    return [event.id.split()[0] for event in engine.events.fresh() if event.kind == "admitted"]


def _small_engine(batching: Batching) -> Engine:
    """One that computes nothing, for two sequences at a time."""
    return simulated_engine(
        EngineConfig(
            batching=batching, loop=Plain(), tokens=16, sequences=2, block_size=4, cache_tokens=400, check=True
        )
    )


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
    for _ in _while_busy(engine):
        decoding = [sequence for sequence in engine.memory.running if sequence.decoding]
        gained = {delta.id for delta in engine.step() if delta.tokens}
        for sequence in decoding:
            assert sequence.request.id in gained or not sequence.running
