"""The contract ``optim.optimizer``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import nn

from penstock.policy import Policy, contract, unwritten


@dataclasses.dataclass(frozen=True)
class Limit:
    """A limiting case: options with which a new optimizer is a known one.

    Attributes:
        optimizer: the new one, with these options.
        known: builds the known one of the same parameters; where it is several, each for some of them, they step in
            turn.
    """

    optimizer: Optimizer
    known: Callable[[Mapping[str, nn.Parameter]], Sequence[torch.optim.Optimizer]]


@contract(
    "optim.optimizer",
    law="in the limiting case that the policy gives, equal to a known optimizer bit for bit; nothing moves at the rate "
    "0, nor a parameter without a gradient; gradients stay as they are; parameters do not depend on each other, nor do "
    "the matrices of a stack; all state survives a checkpoint bit for bit; parameters of which processes have some "
    "rows each move as whole ones do, and, of a policy that says that it is elementwise, parts of every kind",
)
class Optimizer(Policy):
    """An optimizer: the peak learning rate ``lr``, decoupled ``weight_decay``, and how to build it.

    A policy gives :meth:`build`, and :meth:`limit` for its law.

    ``elementwise``: how a number moves depends on its own gradients alone, so that processes that hold parts of a
    matrix can update each their own.
    """

    elementwise: ClassVar[bool] = False

    lr: PositiveFloat
    weight_decay: NonNegativeFloat = 0.1

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of the named ``parameters`` (names as in the Decoder).

        Each group's ``lr`` is its peak rate; the loop multiplies it by the schedule's factor. All state lies in
        ``optimizer.state[parameter]`` as tensors, so that checkpoints can name it. Parameters in shards are DTensors:
        what works number by number works on them as it is, and :func:`~penstock.parallel.shard.of_matrices` gives what
        does not its matrices whole.
        """
        raise NotImplementedError

    @classmethod
    def limit(cls) -> Limit:
        """Options with which an optimizer of this kind is a known one, and that one: PyTorch's, or one written down
        without any of the code that makes this one fast. Their updates must be equal bit for bit, of parameters named
        as in the Decoder, no two of one shape.

        A new method mostly is a known one where its new part is switched off: without momentum, for instance, or with
        a threshold of 0.
        """
        raise unwritten(cls, "limit()", "return Limit(optimizer, known), options and the known optimizer of that case")


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices and stacks of them, not norms and biases."""
    return parameter.dim() >= 2
