"""The schedule that the pipelines of a run follow, and what a configuration cannot have with it."""

from __future__ import annotations

import dataclasses
from typing import Self, TypeVar

from penstock.core.errors import ConfigError
from penstock.pipeline.ir.schedule import Kind, Schedule, WeightRule
from penstock.pipeline.routes.contract import PipelineRoute
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.pipeline.simulate.times import Times
from penstock.pipeline.transforms.contract import PipelineTransform
from penstock.policy import Policy
from penstock.train.config import TrainConfig

P = TypeVar("P", bound=Policy)


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """A schedule or a route, and its transforms, one after another.

    Attributes:
        config: the run's.
        policy, transforms: those of its ``pipeline`` section, perhaps with times that were measured.
    """

    config: TrainConfig
    policy: PipelineSchedule | PipelineRoute
    transforms: tuple[PipelineTransform, ...]

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        """What the configuration says."""
        return cls(config, config.pipeline.route or config.pipeline.schedule, config.pipeline.transforms)

    def check_post_validation(self, sparse: bool) -> None:
        """Refuses what makes all processes wait for each other in each update, where none is to.

        Raises:
            ConfigError: post-validation is asked for, and something that needs an answer of all before an update.
        """
        if not self.config.pipeline.post_validation:
            return
        for found, what, instead in (
            (
                isinstance(self.policy, PipelineRoute) and self.policy.recovers,
                f"{self.policy.policy_name} recovers lost stages from updates that are final",
                "set pipeline.route=none",
            ),
            (sparse, "the loads of experts are summed over all processes", "use a dense model"),
            (
                self.config.on_bad_update == "skip",
                "on_bad_update looks at the whole gradient first",
                "set on_bad_update=stop, with which a gradient that is not finite updates nothing either",
            ),
            (
                self.config.minutes is not None,
                "minutes asks the leading process for its clock",
                "set steps in place of minutes",
            ),
        ):
            if found:
                raise ConfigError(
                    f"with pipeline.post_validation no process waits for the others in an update, and {what}",
                    hint=f"{instead[0].upper()}{instead[1:]}, or pipeline.post_validation=false.",
                )

    @property
    def plans(self) -> bool:
        """Whether a part of it plans by times, and was given none."""
        return any(map(_plans, (self.policy, *self.transforms)))

    def planned(self, times: Times) -> Arrangement:
        """With ``times`` for what plans by them and was given none."""

        def given(policy: P) -> P:
            return policy.model_copy(update={"times": times}) if _plans(policy) else policy

        return dataclasses.replace(self, policy=given(self.policy), transforms=tuple(map(given, self.transforms)))

    def build(self, devices: int, microbatches: int) -> Schedule:
        """The schedule after all transforms.

        Raises:
            RefusalError: there is none for these numbers.
            ConfigError: the trainer cannot follow it with the rest of the configuration; the hint says what to change.
        """
        schedule = self.policy.build(devices, microbatches)
        self._check(schedule, self.policy, "set pipeline.schedule=1f1b")
        for transform in self.transforms:
            schedule = transform.apply(schedule)
            self._check(schedule, transform, f"leave {transform.policy_name} out of pipeline.transforms")
        return schedule

    def _check(self, schedule: Schedule, made_by: Policy, instead: str) -> None:
        """Refuses what does not go together; ``instead`` says what to do without ``made_by``."""
        config, name = self.config, made_by.policy_name
        if schedule.weights is WeightRule.STASH:
            _check_stashing(config, name)
        if schedule.barriers and not config.objective.cross_entropy:
            raise ConfigError(
                f"{name} computes the cross-entropy in rows of the vocabulary, and {config.objective.policy_name} is "
                "another objective",
                hint=f"Set objective=next_token, or {instead}.",
            )
        splits = any(task.kind is Kind.W for order in schedule.orders for task in order)
        if splits and config.activation_checkpointing:
            raise ConfigError(
                f"{name} defers weight gradients, which needs the activations "
                "that activation_checkpointing does not keep",
                hint=f"Turn one of them off: activation_checkpointing=false, or {instead}.",
            )


def _check_stashing(config: TrainConfig, name: str) -> None:
    """Where each stage updates its weights by itself, nothing can wait for the whole gradient."""
    for key, wanted, what in (
        ("clip", config.clip is not None, "needs the norm of the whole gradient"),
        ("on_bad_update", config.on_bad_update == "skip", "looks at the whole gradient first"),
        ("pipeline.post_validation", config.pipeline.post_validation, "validates one update a batch"),
    ):
        if wanted:
            value = {"clip": "none", "on_bad_update": "stop", "pipeline.post_validation": "false"}[key]
            raise ConfigError(
                f"{name} updates each stage after each microbatch, and {key} {what}",
                hint=f"Set {key}={value}, or pipeline.schedule=1f1b, which has the order of pipedream and one update a "
                "batch.",
            )


def _plans(policy: Policy) -> bool:
    field = type(policy).model_fields.get("times")
    return field is not None and getattr(policy, "times", None) == field.default
