"""The loss of a model whose layers several processes compute together: each finds that of some of the tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from penstock.data.loader import Batch
from penstock.parallel.tensor_gradients import spread, summed
from penstock.train.objectives.contract import Objective


def shared_out(objective: Objective, group: dist.ProcessGroup) -> Objective:
    """``objective``, whose loss the processes of ``group`` find together, all with the same batch; itself where its
    loss is no sum over tokens that do not know of each other.

    Hidden states and the head stand on all of them alike, so that it is the tokens that are shared out, in turn: each
    process has the logits of its own alone, of the whole vocabulary, and what they exchange is the gradient of the
    hidden states. Rows of the vocabulary (Megatron-LM) would need the normalizers exchanged as well, and make each
    process read all hidden states.
    """
    if not objective.cross_entropy:
        return objective
    shared = objective.model_copy()
    vars(shared)["hidden_loss"] = functools.partial(_hidden_loss, objective.hidden_loss, group)
    return shared


def _hidden_loss(
    loss_of: Callable[[Any, Tensor, Batch], Tensor],
    group: dist.ProcessGroup,
    model: Any,
    hidden: Tensor,
    batch: Batch,
) -> Tensor:
    """The loss of the last hidden states [*T, hidden], the same in all processes of ``group``."""
    rank, size, name = group.rank(), group.size(), group.group_name
    own = spread(hidden, name).flatten(0, -2)[rank::size]
    loss = loss_of(model, own, batch.each(lambda values: values.flatten(0, 1)[rank::size]))
    # What all processes have alike, such as the head, counts as if each had found its whole gradient, and not a part of
    # it: their sum is divided by how many they are. The sum of the hidden states' gradients is not.
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient / size)  # type: ignore[no-untyped-call]
    if loss.requires_grad:
        loss.register_hook(lambda gradient: gradient * size)  # type: ignore[no-untyped-call]
    return summed(loss, name)
