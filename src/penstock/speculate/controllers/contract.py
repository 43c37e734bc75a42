"""The contract ``speculate.controller``: how many tokens are drafted for the sequences of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from penstock.policy import Policy, contract
from penstock.speculate.contract import Drafter


class Seen(NamedTuple):
    """A step in which sequences went on for which tokens may be drafted, and what came of it.

    Attributes:
        sequences: how many sequences went on, with those for which nothing may be drafted.
        prompts: tokens of prompts that were computed in the same step.
        ahead: how many tokens were to be drafted at most.
        drafted: how many were verified, of each sequence for which some may be; of none where ``ahead`` is 0.
        accepted: how many of those were accepted.
        drafting: seconds that the drafting took.
        seconds: that the step took, with the drafting; None where others overlapped with it and hide it.
        rows: how many tokens were computed in it, and probes.
        probes: how many of them were these.
    """

    sequences: int
    prompts: int
    ahead: int
    drafted: Sequence[int]
    accepted: Sequence[int]
    drafting: float
    seconds: float | None
    rows: int = 0
    probes: int = 0


class Control:
    """A controller at work in one engine."""

    def ahead(self, sequences: int) -> int:
        """How many tokens may be drafted for each of ``sequences`` in the next step; 0: nothing is drafted."""
        raise NotImplementedError

    def kept(self, confidence: Sequence[Sequence[float]]) -> list[int]:
        """How many of the first drafted tokens of each sequence are verified: here all. Asked where the controller
        weighs.

        Args:
            confidence: of each sequence and each of its drafted tokens, the probability of the token that was the
                likeliest in its place. It is not that of the token that was drafted: whether a place is verified must
                not depend on what was drawn for it, or the output would no longer have the target's distribution.
        """
        return [len(each) for each in confidence]

    def goes_on(self, chances: Sequence[float]) -> bool:
        """Whether another token is drafted for a sequence, here always. Asked behind each drafted token where the
        controller predicts, or decides by confidence.

        Args:
            chances: of each token that was drafted for the sequence in this step, the predicted probability that it is
                accepted if those before it are, or the drafting model's own probability of it; of a tree, those on the
                way that this model would take itself. All of them are verified, so that these may depend on what was
                drafted.
        """
        return True

    def seconds(self, rows: np.ndarray) -> np.ndarray:
        """What steps of so many ``rows`` take, in any unit, for those who shape trees; here all the same."""
        return np.ones(rows.shape)

    def learn(self, seen: Seen) -> None:
        """A step is over."""

    def rests(self) -> int:
        """For how many steps more, behind one for which it has just said 0, it says 0 whatever comes out of them, as
        long as so many sequences run: of those it is neither asked nor told one by one. Here for none."""
        return 0

    def rested(self, steps: int) -> None:
        """So many steps of which it was not told have been begun since it was asked last."""

    def asks(self) -> Sequence[int]:
        """Of which lengths it wants to know beforehand what such steps take, shorter ones first; here of none."""
        return ()

    def expect(self, sequences: int, ahead: int, seconds: float) -> None:
        """A step in which so many tokens were drafted for each of so many sequences has taken so many seconds, before
        there were any requests."""


@contract(
    "speculate.controller",
    law="no more is drafted than the drafter can, and no more is verified than was drafted, whatever was seen before; "
    "two that have seen the same decide the same; as long as it rests it would draft nothing; where it predicts or "
    "goes by confidence, drafting ends behind a certain rejection and not for certain acceptances, what ends it does "
    "so behind more tokens as well, and the engine drafts as far as it says of the whole text; what it is told that a "
    "step takes is what one more costs; one that goes by it loses next to nothing where drafting loses; the tokens "
    "that come out are the target's",
)
class Controller(Policy):
    """Decides how many tokens are drafted."""

    @property
    def weighs(self) -> bool:
        """Whether it chooses among drafted tokens by how sure the drafter was of them."""
        return False

    @property
    def predicts(self) -> bool:
        """Whether it is asked behind each drafted token if there is to be another, by what a head predicts that is
        trained for the model that drafts and the one that it drafts for (:mod:`penstock.models.acceptance.folder`)."""
        return False

    @property
    def by_confidence(self) -> bool:
        """Whether it is asked behind each drafted token if there is to be another, by the drafting model's own
        probability of each."""
        return False

    @property
    def goes_by_time(self) -> bool:
        """Whether it goes by what steps take, and drafts nothing, but for a few trials, where that is slower."""
        return False

    @property
    def predictions(self) -> str | None:
        """The folder of that head; None takes the one beside the model that drafts."""
        return None

    def refuses(self, drafter: Drafter, branches: bool) -> str | None:
        """Why it does not decide for ``drafter``, where trees are drafted if it ``branches``, and what to do about it;
        None if it does."""
        if branches and (self.weighs or self.predicts):
            return f"the controller {self.policy_name!r} weighs chains: leave draft_tree out"
        if drafter.superposes and (self.weighs or self.predicts or self.by_confidence):
            return (
                f"the controller {self.policy_name!r} judges one draft by itself, and {drafter.policy_name!r} drafts "
                "several at once: leave the controller out"
            )
        if drafter.widths and self.weighs:
            return f"the controller {self.policy_name!r} weighs chains, and {drafter.policy_name!r} drafts trees"
        if (self.predicts or self.by_confidence) and drafter.model is None:
            return (
                f"the controller {self.policy_name!r} judges what a model drafts, and the drafter "
                f"{drafter.policy_name!r} has no model: draft with one, or leave the controller out"
            )
        if self.predicts and drafter.meanwhile:
            return (
                f"the controller {self.policy_name!r} predicts for a model that waits while its drafts are verified, "
                f"and {drafter.policy_name!r} goes on: take the controller fallback, or the drafter model"
            )
        return None

    def start(self, most: int) -> Control:
        """One for an engine whose drafter drafts ``most`` tokens at a time at most."""
        raise NotImplementedError
