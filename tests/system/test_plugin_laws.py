"""A distribution outside of the tree brings policies, and runs their laws: they hold, or they refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from penstock import policy
from penstock.policy import create
from penstock.testing import check
from programs import Program

#: The policies of a stranger's distribution, good ones and bad ones.
MODULE = '''
"""Policies for schedules and optimizers, some of them wrong."""

from __future__ import annotations

import torch
from pydantic import Field

from penstock.policy import policy
from penstock.train.optim.contract import Limit, Optimizer
from penstock.train.schedules.contract import Schedule


@policy("train.schedule", "square_root")
class SquareRoot(Schedule):
    """Falls as the root of what is left of the run."""

    def shape(self, step, total):
        return max(0.0, 1 - step / total) ** 0.5

    @classmethod
    def example(cls):
        return cls(), [1.0, 0.75**0.5, 0.5**0.5, 0.5, 0.0]


@policy("train.schedule", "steady")
class Steady(SquareRoot):
    """Claims the same, and never falls."""

    def shape(self, step, total):
        return 1.0


@policy("train.schedule", "silent")
class Silent(Schedule):
    """Gives nothing to hold it against."""

    def shape(self, step, total):
        return 1.0


class Ball(torch.optim.Optimizer):
    def __init__(self, parameters, options, sign):
        self.options, self.sign = options, sign
        super().__init__(parameters, {"lr": options.lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    velocity = state.setdefault("velocity", torch.zeros_like(p))
                    velocity.mul_(self.options.momentum).add_(p.grad)
                    p.mul_(1 - group["lr"] * self.options.weight_decay)
                    p.add_(velocity, alpha=-self.sign * group["lr"])


@policy("optim.optimizer", "heavy_ball")
class HeavyBall(Optimizer):
    """Polyak's momentum, with decoupled weight decay."""

    lr: float = 0.01
    momentum: float = Field(0.9, ge=0, lt=1)

    def build(self, parameters):
        return Ball(parameters.values(), self, 1)

    @classmethod
    def limit(cls):
        def known(parameters):
            return [torch.optim.SGD(parameters.values(), lr=0.02, momentum=0.8)]

        return Limit(cls(lr=0.02, momentum=0.8, weight_decay=0.0), known)


@policy("optim.optimizer", "uphill")
class Uphill(HeavyBall):
    """The same in the wrong direction."""

    def build(self, parameters):
        return Ball(parameters.values(), self, -1)
'''


def judge(*policies: tuple[str, str]) -> None:
    """What a process runs: prints what the law says of each policy, with a distribution of the working directory."""
    sys.path.insert(0, str(Path.cwd()))
    policy.index.cache_clear()
    verdicts: dict[str, object] = {}
    for contract, name in policies:
        try:
            verdicts[name] = check(create(contract, name))  # type: ignore[func-returns-value]
        except Exception as error:
            verdicts[name] = [type(error).__name__, str(error)]
    print(json.dumps(verdicts))


@pytest.fixture
def verdicts(tmp_path):
    """What the law says of each policy of the distribution, None where it holds; asked from outside of the tree."""
    (tmp_path / "penstock_stranger.py").write_text(MODULE)
    metadata = tmp_path / "penstock_stranger-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: penstock-stranger\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[penstock.policies]\nstranger = penstock_stranger\n")
    schedules = [("train.schedule", name) for name in ("square_root", "steady", "silent")]
    optimizers = [("optim.optimizer", name) for name in ("heavy_ball", "uphill")]
    done = Program(judge, *schedules, *optimizers, folder=tmp_path).completed()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_plug_in_runs_its_own_laws(verdicts):
    assert verdicts["square_root"] is None
    assert verdicts["heavy_ball"] is None
    assert verdicts["steady"] == [
        "AssertionError",
        "the factor at step 1 of 4 is 1.0, and 0.8660254037844386 in the example",
    ]
    assert verdicts["uphill"][0] == "AssertionError"
    assert verdicts["silent"] == [
        "PenstockError",
        "the train.schedule 'silent' has no example(), and its law is tested with that\n"
        "Write the class method Silent.example(): return a schedule, and its factors at steps 0 to T of a run of T "
        "updates.",
    ]
