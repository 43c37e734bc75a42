"""The law of ``speculate.controller``: nothing is drafted or verified that may not be, and the text stays the same.

What each clause is there to catch:

- :func:`check_bounds` plays random steps: a length below 0 or above what the drafter can, more verified than was
  drafted, one that decides by something that it was not told;
- :func:`check_engine`: tokens that change with the length, with drafts that are thrown away, and with steps in which
  nothing is drafted between others, with a drafter of each kind.
"""

from __future__ import annotations

import functools
import itertools

from penstock.core.randomness import numpy_generator
from penstock.serve.engine.engine import Engine
from penstock.speculate.contract import Drafter
from penstock.speculate.controllers.contract import Control, Controller, Seen
from penstock.speculate.drafters.model import Model
from penstock.speculate.drafters.ngram import Ngram
from penstock.testing.speculate_drafter import engine_with, outcomes

#: Drafters of both kinds: by the text, and by a model.
DRAFTERS: tuple[Drafter, ...] = (Ngram(shortest=1), Model(source="a model", tokens=4))


def check(controller: Controller) -> None:
    """Asserts the law."""
    for seed in range(4):
        check_bounds(controller, seed)
    check_engine(controller)


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
        seen = Seen(sequences, int(draw.integers(2)), ahead, kept, accepted, 0.1 * ahead, float(draw.random()) + 0.1)
        first.learn(seen)
        second.learn(seen)


def check_engine(controller: Controller) -> None:
    """Asserts that tokens are those of an engine that drafts nothing."""
    wanted = plain_outcomes()
    for drafter in DRAFTERS:
        engine = controlled(drafter, controller)
        assert outcomes(engine) == wanted, f"tokens that {drafter.policy_name} drafts change the text"
        assert engine.snapshot().held == 0


@functools.cache
def plain_outcomes() -> dict[tuple[str, int], list[int]]:
    """What an engine says that drafts nothing."""
    return outcomes(engine_with(None))


def controlled(drafter: Drafter, controller: Controller) -> Engine:
    """A small engine whose controller sees steps that all take as long."""
    engine = engine_with(drafter, controller=controller)
    assert engine.speculation is not None
    engine.speculation.clock = itertools.count().__next__
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
