"""The law of ``train.hyper``.

Bugs that its clauses are there to catch:

- the example: a rule that grows where it should shrink, an exponent of the wrong sign, a unit mistaken for another.
- finite numbers; whole sequences and the batch that was asked for; tokens spent to within an update; a warm-up that
  ends within the run.
- one and the same: settings that depend on more than options and scale, or on whether the rule or the person chose the
  batch.
"""

from __future__ import annotations

import itertools
import math

from penstock.testing.enrolled import rebuilt
from penstock.train.hyper.contract import HyperRule, Scale, Settings


def check(rule: HyperRule) -> None:
    """Asserts the law of ``train.hyper``, from small models to large ones."""
    check_example(rule)
    for parameters, tokens, batch in itertools.product((1e6, 1e9, 1e11), (1e9, 1e12), (None, 1e5, 1e6)):
        check_scale(rule, Scale(parameters=parameters, tokens=tokens, batch=batch, length=2048))


def check_example(rule: HyperRule) -> None:
    """At one scale the settings are those that the policy gives, all of them."""
    example, scale, wanted = rule.example()
    found = example.settings(scale)
    assert found.schedule == wanted.schedule, f"the schedule is {found.schedule!r}, in the example {wanted.schedule!r}"
    numbers, expected = _numbers(found), _numbers(wanted)
    assert numbers.keys() == expected.keys()
    for name, value in expected.items():
        assert math.isclose(numbers[name], value, rel_tol=1e-9), f"{name} is {numbers[name]}, in the example {value}"


def _numbers(settings: Settings) -> dict[str, float]:
    plain = {"batch": settings.batch, "steps": settings.steps, "lr": settings.lr}
    return {**plain, "weight_decay": settings.weight_decay, **settings.findings}


def check_scale(rule: HyperRule, scale: Scale) -> None:
    """The law at one scale, which the rule must serve."""
    settings = rule.settings(scale)
    numbers = {"lr": settings.lr, "weight_decay": settings.weight_decay, **settings.findings}
    assert all(map(math.isfinite, numbers.values())), f"{scale} gets {numbers}"
    assert settings.batch % scale.length == 0, f"{settings.batch} tokens are no whole sequences of {scale.length}"
    asked = scale.batch
    assert asked is None or abs(settings.batch - asked) <= scale.length / 2, f"{asked} tokens become {settings.batch}"
    spent = settings.batch * settings.steps
    assert abs(spent - scale.tokens) <= settings.batch, f"{spent} tokens are spent of {scale.tokens}"
    assert settings.schedule.warmup_steps < settings.steps, "the warm-up does not end within the run"
    assert rebuilt(rule).settings(scale) == settings, "the settings depend on more than options and scale"
    again = rule.settings(scale.model_copy(update={"batch": settings.batch}))
    assert again == settings, f"asked for its own batch, the rule has {again} instead of {settings}"
