"""Weight decay and batch size from power laws."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field

from penstock.core.config import Config
from penstock.core.errors import UsageError
from penstock.policy import policy
from penstock.train.hyper.contract import Amount, HyperRule, Scale, Settings
from penstock.train.schedules.linear import LinearDecay

#: Tokens in the sequences that the paper counts batches in.
SEQUENCE = 2048


class PowerLaw(Config):
    """y = ``coefficient`` * x ** ``exponent``."""

    coefficient: Amount
    exponent: float = Field(ge=-4, le=4)

    def __call__(self, x: float) -> float:
        return self.coefficient * math.pow(x, self.exponent)


@policy("train.hyper", "power_lines", papers=[271])
class PowerLines(HyperRule):
    """Weight decay from AdamW's timescale, and batch sizes from the number of tokens (Power Lines).

    AdamW's weights are an exponential average of its updates over 1 / (lr * weight_decay) steps; as a share of the
    run, that is the timescale tau = B / (lr * weight_decay * D). The best tau is a power law in the tokens for each
    parameter, D / N, so the best weight decay is B / (lr * D * tau). The best batch, and the critical one beyond
    which more parallelism costs more than twice the tokens, are power laws in D alone (for the critical batch, D are
    the tokens that a small batch would need).

    The three laws are the paper's fits (GPT-2-like models of 0.1 to 3 B parameters under maximal update
    parametrization, its batches in sequences of 2,048 tokens, here in tokens); :mod:`penstock.train.hyper.fitting`
    finds them for other models. Ours are the peak rate ``lr``, which no law here sets, and the warm-up, the first
    ``warmup`` of the run, but at most ``longest_warmup`` tokens.
    """

    lr: Amount = 3e-4
    timescale: PowerLaw = PowerLaw(coefficient=1.084, exponent=-0.527)
    optimal_batch: PowerLaw = PowerLaw(coefficient=0.0306 * SEQUENCE, exponent=0.383)
    critical_batch: PowerLaw = PowerLaw(coefficient=0.0471 * SEQUENCE, exponent=0.462)
    warmup: float = Field(0.1, ge=0, lt=1)
    longest_warmup: Amount = 375e6

    def settings(self, scale: Scale) -> Settings:
        batch = scale.whole(scale.batch or self.optimal_batch(scale.tokens))
        steps = scale.steps(batch)
        tau = self.timescale(scale.tokens / scale.parameters)
        if tau * steps <= 1:  # decay would take all of the weights at each update, or more
            raise UsageError(
                f"a run of {steps} updates is too short: its weights should average {tau:.2g} of them",
                hint="Use a smaller batch.",
            )
        warmup = min(self.warmup * scale.tokens, self.longest_warmup)
        return Settings(
            batch=batch,
            steps=steps,
            lr=self.lr,
            weight_decay=batch / (self.lr * scale.tokens * tau),
            schedule=LinearDecay(warmup_steps=round(warmup / batch)),
            findings={
                "timescale": tau,
                "optimal_batch": self.optimal_batch(scale.tokens),
                "critical_batch": self.critical_batch(scale.tokens),
            },
        )

    @classmethod
    def example(cls) -> tuple[Self, Scale, Settings]:
        # 64 tokens for each parameter, and 6,400 in all.
        rule = cls(
            lr=1e-2,
            timescale=PowerLaw(coefficient=2, exponent=-0.5),
            optimal_batch=PowerLaw(coefficient=4, exponent=0.5),
            critical_batch=PowerLaw(coefficient=0.5, exponent=1),
            warmup=0.5,
            longest_warmup=1280,
        )
        settings = Settings(
            batch=320,
            steps=20,
            lr=1e-2,
            weight_decay=20.0,
            schedule=LinearDecay(warmup_steps=4),
            findings={"timescale": 0.25, "optimal_batch": 320, "critical_batch": 3200},
        )
        return rule, Scale(parameters=100, tokens=6400, length=32), settings
