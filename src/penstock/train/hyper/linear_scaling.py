"""The linear scaling rule."""

from __future__ import annotations

from typing import Self

from pydantic import Field, NonNegativeFloat, PositiveInt

from penstock.policy import policy
from penstock.train.hyper.contract import Amount, HyperRule, Scale, Settings
from penstock.train.schedules.gradual import GradualWarmup


@policy("train.hyper", "linear_scaling", papers=[206])
class LinearScaling(HyperRule):
    """Multiplies the learning rate by k where the batch is k times the base batch, and warms up gradually.

    Accurate, Large Minibatch SGD. k small steps along nearly equal gradients are one step with their summed rate; the
    rule was found for SGD with momentum, and holds until the batch is so large that gradients are not nearly equal
    along k steps. All else stays: the weight decay, and the number of samples in the warm-up, so 5 of the paper's 90
    epochs are ``warmup`` of the run here. The base settings are ours: those of a run that is known to train well.
    """

    base_lr: Amount = 3e-4
    base_batch: PositiveInt = 16384
    weight_decay: NonNegativeFloat = 0.1
    warmup: float = Field(5 / 90, ge=0, lt=1)

    def settings(self, scale: Scale) -> Settings:
        batch = scale.whole(scale.batch or self.base_batch)
        growth, steps = batch / self.base_batch, scale.steps(batch)
        return Settings(
            batch=batch,
            steps=steps,
            lr=self.base_lr * growth,
            weight_decay=self.weight_decay,
            schedule=GradualWarmup(growth=max(1.0, growth), warmup_steps=round(self.warmup * steps)),
            findings={"batch_growth": growth},
        )

    @classmethod
    def example(cls) -> tuple[Self, Scale, Settings]:
        rule = cls(base_lr=1e-3, base_batch=1024, weight_decay=0.2, warmup=0.1)
        settings = Settings(
            batch=4096,
            steps=250,
            lr=4e-3,
            weight_decay=0.2,
            schedule=GradualWarmup(growth=4, warmup_steps=25),
            findings={"batch_growth": 4},
        )
        return rule, Scale(parameters=1e6, tokens=1_024_000, batch=4000), settings
