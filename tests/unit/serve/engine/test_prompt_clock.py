"""What tokens of prompts take, beside a device of known speed."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from penstock.serve.engine.prompt_clock import PromptClock

#: Seconds that the device takes for a step, and for each of its tokens.
STEP, TOKEN = 0.01, 0.002


class Played:
    """Steps on a device that computes one after the other, published ``behind`` steps later."""

    def __init__(self, behind: int) -> None:
        self.clock, self._behind, self._now, self._done = PromptClock(), behind, 0.0, 0.0
        self.clock.clock = lambda: self._now
        self._under_way: list[tuple[SimpleNamespace, bool, float]] = []

    def step(self, *counts: int, told: bool = True) -> None:
        batch = SimpleNamespace(tokens=sum(counts), entries=[SimpleNamespace(count=each) for each in counts])
        self.clock.begin(batch)
        self._done = max(self._done, self._now) + STEP + TOKEN * batch.tokens
        self._under_way.append((batch, told, self._done))
        while len(self._under_way) > self._behind:
            self.publish()

    def publish(self) -> None:
        batch, told, done = self._under_way.pop(0)
        if told:  # else nobody waits
            self._now = max(self._now, done)
        self.clock.end(batch, told)

    def rest(self) -> None:
        while self._under_way:
            self.publish()
        self._now += 1000.0


@pytest.mark.parametrize("behind", [0, 1, 3])
def test_it_is_what_the_device_takes_however_steps_overlap(behind):
    played = Played(behind)
    assert played.clock.seconds == math.inf
    for _ in range(3):
        played.step(1, 1, 1)
    played.rest()
    assert played.clock.seconds == math.inf, "steps that decode do not tell"
    for _ in range(4):
        # A prompt in pieces, of which only the last has a next token, and that is short.
        played.step(1000, told=False)
        played.step(1000, told=False)
        played.step(100)
        played.rest()
    assert played.clock.seconds == pytest.approx(TOKEN + 3 * STEP / 2100)
    for _ in range(40):
        played.step(1000)  # each the whole of a prompt
    played.rest()
    assert played.clock.seconds == pytest.approx(TOKEN + STEP / 1000, rel=1e-2)
    played.step(1, 1)
    played.step(1, 1, 998)
    played.step(1, 1)
    played.rest()
    assert TOKEN < played.clock.seconds < TOKEN + STEP / 500
