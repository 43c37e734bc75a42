"""The law of ``speculate.controller``: nothing is drafted or verified that may not be, and the text stays the same.

What each clause is there to catch:

- :func:`check_bounds` plays random steps: a length below 0 or above what the drafter can, more verified than was
  drafted, one that decides by something that it was not told;
- :func:`check_ends`: of those that predict or go by confidence, a product of the wrong numbers, one that forgets, a
  rule the wrong way round;
- :func:`check_predictions` and :func:`check_confidence` compare with the whole text computed anew: what is predicted
  of another token, place or sequence, or the confidence in it, and a token that is lost;
- :func:`check_engine`: tokens that change with the length, with drafts that are thrown away, and with steps in which
  nothing is drafted between others, with a drafter of each kind;
- :func:`check_times` plays an engine whose steps all take as long: one that is timed by its end takes the next one's
  time as well where they overlap, and plain steps seem twice as slow as they are; and those who draft in steps of
  their own, since they came while others were under way: all take twice as many steps;
- :func:`check_crowds`: drafts for the first of a crowd, as if nobody else came; and those who wait for blocks, counted
  as if they ran;
- :func:`check_rests` compares one that is left alone where it rests with one that is told of each step: a rest that
  goes on too long, or steps that are not counted;
- :func:`check_losses`, of those that go by time, plays machines on which drafting never pays: trials that cost more
  than they may, or are repeated for nothing; and one on which it does, where one that gives up drafts nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from unittest import mock

import torch

from penstock.core.randomness import numpy_generator
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.engine.batch import Awaited, Batch
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.speculate.contract import Drafter
from penstock.speculate.controllers.contract import Control, Controller, Seen
from penstock.speculate.controllers.resting import Resting
from penstock.speculate.drafters.model import Model
from penstock.speculate.drafters.ngram import Ngram
from penstock.speculate.drafters.ppd import ParallelPromptDecoding
from penstock.testing.drafting_engines import engine_with, outcomes
from penstock.testing.model_head import watched
from penstock.testing.reference import next_logits
from penstock.testing.serve_model import SHAPE, draft_of, predictor_of, small_model
from penstock.testing.speculate_drafter import BRANCHES

#: Drafters of each kind: by the text, by a model, and by probes.
DRAFTERS: tuple[Drafter, ...] = (
    Ngram(shortest=1),
    Model(source="a model", tokens=4),
    ParallelPromptDecoding(source="a head"),
)


def check(controller: Controller) -> None:
    """Asserts the law."""
    for seed in range(4):
        check_bounds(controller, seed)
    if controller.predicts:
        check_ends(controller)
        check_predictions(controller)
    if controller.by_confidence:
        check_ends(controller)
        check_confidence(controller)
        check_confidence(controller, tree=BRANCHES)
    check_engine(controller)
    check_times(controller)
    check_crowds(controller)
    if controller.goes_by_time:
        check_losses(controller)
    check_rests(controller)


def check_bounds(controller: Controller, seed: int, steps: int = 200) -> None:
    """Asserts that lengths stay within what there is, and follow from what was seen."""
    draw = numpy_generator(seed, "testing/controller")
    most = int(draw.integers(1, 9))
    first, second = controller.start(most), controller.start(most)
    for _ in range(steps):
        sequences = int(draw.integers(1, 20))
        ahead = first.ahead(sequences)
        assert ahead == second.ahead(sequences), "two that have seen the same decide otherwise"
        assert 0 <= ahead <= most, f"{ahead} tokens are drafted, of {most} at most"
        confidence = [draw.random(int(draw.integers(ahead + 1))).tolist() for _ in range(sequences)]
        kept = first.kept(confidence)
        assert kept == second.kept(confidence)
        assert len(kept) == sequences
        assert all(0 <= own <= len(each) for own, each in zip(kept, confidence, strict=True))
        accepted = [int(draw.integers(own + 1)) for own in kept]
        chances = draw.random(int(draw.integers(1, most + 1))).tolist()
        assert first.goes_on(chances) == second.goes_on(chances)
        seen = Seen(sequences, int(draw.integers(2)), ahead, kept, accepted, 0.1 * ahead, float(draw.random()) + 0.1)
        first.learn(seen)
        second.learn(seen)


def check_ends(controller: Controller, trials: int = 200) -> None:
    """Asserts of a controller that predicts, or goes by confidence, that it ends where a rejection is certain, goes on
    where acceptances are, and does not change its mind for more tokens, or for less likely ones."""
    draw, most = numpy_generator(0, "testing/controller/ends"), 8
    control = controller.start(most)
    assert all(control.goes_on([1.0] * count) for count in range(1, most)), "it ends for nothing"
    for _ in range(trials):
        chances = (1 - draw.random(int(draw.integers(1, most))) ** 3).tolist()
        place = int(draw.integers(len(chances)))
        assert not control.goes_on([*chances[:place], 0.0, *chances[place:]]), "it goes on behind a certain rejection"
        if not control.goes_on(chances):
            less = [chance * float(draw.random()) for chance in chances]
            assert not control.goes_on(less) and not control.goes_on([*chances, 1.0]), "it changes its mind"


def check_predictions(controller: Controller, most: int = 5) -> None:
    """Asserts of a controller that predicts that the engine drafts as far as it says, by what the head predicts of each
    token behind the whole text."""
    draft, limits = draft_of(small_model()), dict[int, int]()
    head, control = predictor_of(draft), controller.start(most)
    engine = engine_with(Model(source="a model", tokens=most), controller=controller, draft=draft)
    drafts = watched(engine)
    for number, temperature in enumerate((0, 0.8, 0, 1.2)):
        prompt = [(7 * place + 3 * number) % SHAPE.vocabulary for place in range(5 + 6 * number)]
        limits[prompt[0]] = len(prompt) + 24
        sampling = SamplingParams(temperature=temperature, seed=number, max_tokens=24)
        engine.add(Request(str(number), prompt, sampling))
    while engine.busy:
        engine.step()
    ended = set()
    for text, (window, _, _) in drafts:
        going = []
        with torch.no_grad():
            hidden = draft(torch.tensor([[*text, *window]]), CausalRows.of(len(text) + len(window))).hidden[0]
            behind = hidden[len(text) - 1 : -1]  # what each token of the window was drafted from
            chances = head(draft, behind, torch.tensor(window)).sigmoid().tolist()
        going = [control.goes_on(chances[:end]) for end in range(1, len(window) + 1)]
        assert all(going[:-1]), "it went on behind its end"
        if going[-1]:
            # Behind the drafted tokens comes one more.
            assert len(window) == min(most, limits[text[0]] - len(text) - 1), "it ended before its end"
        else:
            ended.add(len(window))
    assert len(ended) > 1, f"behind {ended} tokens, always alike"


def check_confidence(controller: Controller, most: int = 5, tree: Sequence[int] = ()) -> None:
    """Asserts of a controller that goes by confidence that it is asked behind each drafted token, of a ``tree`` behind
    each on the way that the model would take itself, by the model's own probabilities of these behind the whole text,
    and that drafting ends where it says."""
    draft, lengths = draft_of(small_model(), 0.3), set[int]()
    engine = engine_with(Model(source="a model", tokens=most), controller=controller, draft=draft, tree=tree)
    asked, drafts = _asked(engine), _drafted(engine)
    for number, temperature in enumerate((0, 0, 0, 0) if tree else (0, 0.8, 0, 1.2)):
        prompt = [(7 * place + 3 * number) % SHAPE.vocabulary for place in range(5 + 6 * number)]
        engine.add(Request(str(number), prompt, SamplingParams(temperature=temperature, seed=number, max_tokens=24)))
    while engine.busy:
        asked.clear()
        drafts.clear()
        engine.step()
        for text, room, window, parents in drafts:
            chances = _confidence(draft, text, window, parents)
            for end in range(1, len(chances) + 1):
                said = [on for each, on in asked if _alike(each, chances[:end])]
                assert said, f"it was not asked about {chances[:end]}"
                assert said[0] == (end < len(chances)) or end == room, "drafting does not end where it says"
            lengths.add(len(chances))
    assert len(lengths) > 1, f"behind {lengths} tokens, always alike"


def _alike(some: Sequence[float], others: Sequence[float]) -> bool:
    """Whether they are the same numbers, but for rounding."""
    return len(some) == len(others) and all(abs(one - other) < 1e-4 for one, other in zip(some, others, strict=True))


def _asked(engine: Engine) -> list[tuple[list[float], bool]]:
    """What the controller of ``engine`` is asked behind drafted tokens from now on, and what it says."""
    assert engine.steps.speculation is not None
    said, seen = engine.steps.speculation.goes_on, list[tuple[list[float], bool]]()
    assert said is not None

    def saying(chances: Sequence[float]) -> bool:
        seen.append((list(chances), said(chances)))
        return seen[-1][1]

    engine.steps.speculation.goes_on = saying
    return seen


def _drafted(engine: Engine) -> list[tuple[list[int], int, tuple[int, ...], tuple[int, ...]]]:
    """The texts behind which ``engine`` drafts from now on, with how many tokens ahead it may, what it drafts, and the
    parents of a tree's tokens."""
    assert engine.steps.speculation is not None
    draft, seen = engine.steps.speculation.draft, list[tuple[list[int], int, tuple[int, ...], tuple[int, ...]]]()

    def drafting(batch: Batch) -> None:
        ahead = [each.ahead for each in batch.entries]
        draft(batch)
        for each, most in zip(batch.entries, ahead, strict=True):
            if each.window:
                seen.append((list(each.sequence.tokens), most, each.window, each.parents))

    vars(engine.steps.speculation)["draft"] = drafting
    return seen


def _confidence(draft: Decoder, text: list[int], window: Sequence[int], parents: Sequence[int]) -> list[float]:
    """The probabilities that ``draft`` gives the tokens of a chain behind ``text``, or of a tree those that are the
    likeliest in their places, one behind the other."""
    way, found, node = list(text), list[float](), -1
    while True:
        children = [each for each, parent in enumerate(parents or range(-1, len(window) - 1)) if parent == node]
        if not children:
            return found
        chances = next_logits(draft, way).softmax(-1)
        node = max(children, key=lambda each: float(chances[window[each]]))
        way.append(window[node])
        found.append(float(chances[window[node]]))


def check_engine(controller: Controller) -> None:
    """Asserts that tokens are those of an engine that drafts nothing."""
    wanted = plain_outcomes()
    drafters = [each for each in DRAFTERS if controller.refuses(each, branches=False) is None]
    assert drafters, "it decides for nobody"
    for drafter in drafters:
        engine = controlled(drafter, controller)
        assert outcomes(engine) == wanted, f"tokens that {drafter.policy_name} drafts change the text"
        assert engine.snapshot().held == 0


def check_times(controller: Controller) -> None:
    """Asserts that what it sees of a step's time is what one more step costs, where the host computes, as on a CPU, and
    the next step is launched before the tokens of one are known, and has something to do between steps; and that all
    who draft do so in the same steps, though they have come one after the other."""
    drafter = next(each for each in DRAFTERS if controller.refuses(each, branches=False) is None)
    engine, now, told = engine_with(drafter, controller=controller), [0.0], list[float | None]()
    launch, speculation, idle = engine.executor.launch, engine.steps.speculation, set[int]()
    assert speculation is not None

    def launched(batch: Batch) -> Awaited | None:
        own = {id(each.sequence) for each in batch.entries}
        going = [each for each in engine.memory.running if each.length < each.limit]
        apart = sum(each.drafts_next and id(each) not in own for each in going)
        assert not batch.ahead or apart <= len(own), "who came later goes on in steps of its own"
        if all(len(each.sequence.tokens) == each.sequence.prompt for each in batch.entries):
            idle.add(id(batch))  # nobody may have been there before
        now[0] += 1.0
        return launch(batch)

    def ended(batch: Batch, end: Callable[[Batch], None] = speculation.end) -> None:
        end(batch)
        now[0] += 0.25
        if id(batch) not in idle:
            told.append(batch.took)

    with mock.patch.object(engine.executor, "launch", launched), mock.patch.object(speculation, "end", ended):
        speculation.clock = lambda: now[0]
        outcomes(engine)
    known = [each for each in told if each is not None]
    assert 2 * len(known) >= len(told), "of most steps it does not learn what they take"
    assert set(known) == {1.25}, f"steps of 1.25 seconds take {sorted(set(known))}"


def check_crowds(controller: Controller) -> None:
    """Asserts that it is asked about all who come together, from the first step on, though prompts take several; and,
    where the cache has no room for all, about those who run once that is known."""
    drafter = next(each for each in DRAFTERS if controller.refuses(each, branches=False) is None)
    for cache_tokens in (400, 96):
        engine, asked = engine_with(drafter, controller=controller, cache_tokens=cache_tokens), list[int]()
        assert engine.steps.speculation is not None
        ahead = engine.steps.speculation.ahead

        def asking(running: int, ahead: Callable[[int], int] = ahead, asked: list[int] = asked) -> int:
            asked.append(running)
            return ahead(running)

        vars(engine.steps.speculation)["ahead"] = asking
        for number in range(6):
            prompt = [(7 * place + number) % SHAPE.vocabulary for place in range(24)]
            engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=12)))
        for _ in range(8):
            there = len(engine.memory.running)
            engine.step()
        if cache_tokens == 400:
            assert set(asked) == {6}, f"it is asked about {asked}, and six are there, or about to be"
        else:
            assert asked[-1] == there < 6, f"it is asked about {asked[-1]}, and {there} are there"
        for number in range(6):
            engine.abort(str(number))


@dataclasses.dataclass(frozen=True)
class Machine:
    """An engine with a model that drafts, as its controller sees it.

    Attributes:
        sequences: that go on.
        plain: seconds of a step without drafts.
        each: and of each token more that is drafted, and verified, for all of them.
        once: and of a step that drafts at all.
        chances: of each depth, how likely a token is accepted if those before it were.
        missed: seconds in which the model computes what it has missed in a step without drafts.
        surges: how often drafts are many or long, and so many seconds more are spent on them.
        loading: seconds that the first step with drafts takes beside these: kernels are loaded. They are nobody's loss.
    """

    sequences: int
    plain: float
    each: float
    once: float
    chances: tuple[float, ...]
    missed: float = 0.0
    surges: tuple[float, float] = (0.0, 0.0)
    loading: float = 0.0

    def seconds(self, length: int) -> float:
        """Of a step in which so many tokens are drafted, in the mean."""
        often, more = self.surges
        return self.plain + (self.once + self.each * length + often * more if length else 0.0)

    def tokens(self, length: int) -> float:
        """A step of a sequence, in the mean."""
        return 1 + sum(itertools.accumulate(self.chances[:length], lambda reached, chance: reached * chance))

    def gain(self, length: int) -> float:
        """How much faster it is than plain decoding where so many tokens are always drafted."""
        return self.tokens(length) * self.plain / self.seconds(length)

    def start(self, controller: Controller, told: float) -> Control:
        """A control for it, which is told beforehand so many times what steps with drafts take; nothing if that is
        0."""
        control = controller.start(len(self.chances))
        self.tell(control, told)
        return control

    def tell(self, control: Control, told: float) -> None:
        """Tells ``control``, as of :meth:`start`."""
        for length in control.asks() if told else ():
            control.expect(self.sequences, length, self.seconds(length) * (told if length else 1))

    def speed(self, control: Control, steps: int, overlapped: bool) -> float:
        """How much faster than plain decoding ``control`` makes the tokens of so many plain steps. If ``overlapped``,
        each step is formed before the tokens of the last one are known; where that drafted, all wait for them, and what
        is said then is void."""
        draw, tokens, seconds, behind = numpy_generator(0, "testing/machine"), 0, 0.0, 0
        loading, asked = self.loading, Resting(control)
        length, asleep = asked.ahead(self.sequences), asked.asleep
        while tokens < steps * self.sequences:
            early = (asked.ahead(self.sequences), asked.asleep) if overlapped else None
            reached = draw.random((self.sequences, length)) < self.chances[:length]
            accepted = reached.cumprod(1).sum(1).tolist()
            catching_up = self.missed * behind if length else 0.0
            often, more = self.surges
            uneven = more * ((draw.random() < often) - often) if length and more else 0.0
            took = self.seconds(length) + catching_up + uneven
            # Half of what drafting adds is the drafting itself.
            drafting = (self.once + self.each * length) / 2 + catching_up if length else 0.0
            loads, loading = (loading, 0.0) if length else (0.0, loading)
            behind = 0 if length else behind + 1
            drafted = [length] * self.sequences if length else []
            seen = Seen(self.sequences, 0, length, drafted, accepted if length else [], drafting + loads, took + loads)
            if not asleep:
                control.learn(seen)
            tokens, seconds = tokens + self.sequences + sum(accepted), seconds + took
            if early is not None and early[0] == length == 0:
                asleep = early[1]
            else:
                length, asleep = asked.ahead(self.sequences), asked.asleep
        return steps * self.plain / seconds


#: Acceptance of a model that drafts, by depth.
FAIR, GOOD = (0.6, 0.55, 0.5, 0.45, 0.4), (0.85, 0.8, 0.8, 0.8, 0.8)

#: Machines on which drafting never pays: a model drafts for sixteen, of whom each row costs; the same with little
#: to verify; trees; a model that has missed much; and drafts that are seldom, and then dear.
LOSING = (
    Machine(16, 0.010, 0.0222, 0.0, FAIR),
    Machine(16, 0.010, 0.0062, 0.0, FAIR),
    Machine(16, 0.010, 0.0500, 0.0, FAIR),
    Machine(16, 0.010, 0.0062, 0.0, FAIR, missed=0.0002),
    Machine(1, 0.010, 0.0070, 0.0, FAIR),
    Machine(16, 0.010, 0.0020, 0.0, FAIR, surges=(0.25, 0.025)),
)
#: And on which it does: for one, of whom single steps say little.
ALONE = Machine(1, 0.005, 0.0006, 0.0005, FAIR, loading=0.3)
#: For one whose drafts are always right.
SURE = Machine(1, 0.0014, 0.0003, 0.0005, (1.0,) * 5, missed=0.00002)
#: A little; much; only far ahead; unevenly.
WINNING = (
    Machine(16, 0.010, 0.0042, 0.0, FAIR),
    Machine(16, 0.010, 0.0015, 0.0, GOOD),
    Machine(16, 0.010, 0.0010, 0.009, GOOD),
    Machine(16, 0.010, 0.0015, 0.0, GOOD, missed=0.0002),
    Machine(16, 0.010, 0.0015, 0.0, GOOD, surges=(0.3, 0.004)),
    ALONE,
)


def check_losses(controller: Controller) -> None:
    """Asserts of a controller that goes by time that it is next to never slower than plain decoding, trials included,
    and comes to the best length where drafting pays, behind a crowd for which it does not, too; in either loop, and
    whether or not it is told beforehand what steps take, or told twice that."""
    for machine, overlapped, told in itertools.product(LOSING, (False, True), (0, 1, 2)):
        for steps, least in ((300, 0.97), (3000, 0.98)):
            speed = machine.speed(machine.start(controller, told), steps, overlapped)
            assert speed >= least, f"{machine}: {speed:.3f} of the speed of plain decoding in {steps} steps"
        if machine.sequences > 1:
            control = ALONE.start(controller, told)
            machine.tell(control, told)
            ALONE.speed(control, 500, overlapped)
            speed = machine.speed(control, 300, overlapped)
            assert speed >= 0.95, f"{machine}: {speed:.3f} of the speed of plain decoding behind one request"
    for machine, overlapped, told in itertools.product(LOSING, (False, True), (0, 1)):
        control, crowd = SURE.start(controller, told), dataclasses.replace(machine, chances=SURE.chances)
        if machine.sequences > 1 and crowd.gain(5) < 1:
            crowd.tell(control, told)
            SURE.speed(control, 600, overlapped)
            crowd.speed(control, 400, overlapped)
            speed, best = SURE.speed(control, 2000, overlapped), SURE.gain(5)
            assert speed >= 0.9 * best, f"{crowd}: behind it one request gains {speed:.3f}, and {best:.3f} can be had"
    for machine, overlapped, told in itertools.product(WINNING, (False, True), (0, 1, 2)):
        best = max(machine.gain(length) for length in range(1 + len(machine.chances)))
        # Who has to find out what steps take needs some for it; and of one sequence, few say little.
        control = machine.start(controller, told)
        speed = machine.speed(control, 200 if told == 1 and machine.sequences > 1 else 1000, overlapped)
        least = (0.9 if told == 2 else 0.97) * best
        assert speed >= least, f"{machine}: it gains {speed:.3f}, and {best:.3f} can be had"
        later = dataclasses.replace(machine, loading=0.0)
        for before in (control, machine.start(controller, told)):
            dataclasses.replace(machine, chances=(0.05,) * len(machine.chances)).speed(before, 500, overlapped)
            speed = later.speed(before, 2000, overlapped)
            assert speed >= (3 + 2 * best) / 5, (
                f"{machine}: it gains {speed:.3f} of {best:.3f} once drafts are accepted"
            )


class Sleepless(Control):
    """Asks and tells ``control`` of each step.

    Attributes:
        dreamt: how many steps were looked at for which it would have rested.
    """

    def __init__(self, control: Control) -> None:
        self._control, self._draw, self.dreamt = control, numpy_generator(0, "testing/sleepless"), 0

    def ahead(self, sequences: int) -> int:
        ahead = self._control.ahead(sequences)
        rests = 0 if ahead else self._control.rests()
        dreaming = copy.deepcopy(self._control)
        for _ in range(rests):
            dreaming.learn(Seen(sequences, 0, 0, (), (), 0.0, float(self._draw.exponential(0.01))))
            assert not dreaming.ahead(sequences), "it would draft where it rests"
        self.dreamt += rests
        return ahead

    def learn(self, seen: Seen) -> None:
        self._control.learn(seen)


def check_rests(controller: Controller) -> None:
    """Asserts that no step for which it rests would have drafted, whatever those before it had taken; that where it is
    left alone all goes on as if it were told of each step: the same lengths, so that all takes as long; and that it is
    asked anew where another sequence comes."""
    for machine in (*LOSING, *WINNING):
        watched = Sleepless(machine.start(controller, 1))
        told = machine.speed(watched, 500, overlapped=False)
        assert machine.speed(machine.start(controller, 1), 500, overlapped=False) == told, f"{machine}: it forgets"
        idle = controller.goes_by_time and machine in LOSING
        assert watched.dreamt > 200 or not idle, f"{machine}: it never rests"
    losing = LOSING[0].start(controller, 1)
    LOSING[0].speed(losing, 100, overlapped=False)
    asked = Resting(losing)
    for _ in range(4):
        asked.ahead(LOSING[0].sequences)
    assert asked.asleep or not controller.goes_by_time
    asked.ahead(LOSING[0].sequences + 1)
    assert not asked.asleep, "it rests on where another one comes"


@functools.cache
def plain_outcomes() -> dict[tuple[str, int], list[int]]:
    """What an engine says that drafts nothing."""
    return outcomes(engine_with(None))


def controlled(drafter: Drafter, controller: Controller) -> Engine:
    """A small engine whose controller sees steps that all take as long."""
    engine = engine_with(drafter, controller=controller)
    assert engine.steps.speculation is not None
    engine.steps.speculation.clock = itertools.count().__next__
    return engine


def rounds(control: Control, acceptance: float, cost: float, steps: int, seed: int = 0) -> list[int]:
    """The lengths that ``control`` chooses for one sequence, where each drafted token is accepted with probability
    ``acceptance`` if those before it were, and takes ``cost`` beside a pass of the target, which takes 1."""
    draw, lengths = numpy_generator(seed, "testing/rounds"), []
    for _ in range(steps):
        length = control.ahead(1)
        accepted = next((place for place in range(length) if draw.random() >= acceptance), length)
        control.learn(Seen(1, 0, length, [length], [accepted], cost * length, 1 + cost * length))
        lengths.append(length)
    return lengths
