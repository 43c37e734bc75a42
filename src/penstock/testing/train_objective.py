"""The law of ``train.objective``.

Bugs that its clauses are there to catch:

- the example: another loss than the paper's; a mean where the loop wants a sum; a wrong sign; a base other than e.
- microbatches: a divisor of the microbatch's own, such as its predicted tokens, which the loop divides by again; for
  mixtures of experts, statistics of the microbatch where those of the whole belong.
- gradient: parts of the loss that are cut off from it, or counted twice in it.
- unpredicted: targets that are masked and count nevertheless, in the loss or in a gradient.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch import Tensor

from penstock.core.randomness import torch_generator
from penstock.data.loader import Batch
from penstock.models.attention import PackedRows
from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.decoder import Decoder, MixtureOfExperts
from penstock.ops.cross_entropy import IGNORE
from penstock.train.objectives.contract import Objective

#: A dense Decoder, and one with a mixture of experts whose balance counts much.
SHAPE = DecoderConfig(vocabulary=23, hidden=12, layers=2, heads=2, kv_heads=1, head_dim=6, ffn=16, tied=True)
EXPERTS = SHAPE.model_copy(update={"moe": MoEConfig(experts=4, ffn=6, balance_weight=0.5)})


def check(objective: Objective) -> None:
    """Asserts the law of ``train.objective``, in float64."""
    check_example(objective)
    for shape in (SHAPE, EXPERTS):
        check_microbatches(objective, shape)
        check_gradient(objective, shape)
    check_unpredicted(objective)


def check_example(objective: Objective) -> None:
    """For the scores of some tokens the loss is the one that the policy gives."""
    example, scores, targets, loss, documents, extras = objective.example()
    assert IGNORE in targets, "the example has a token that is not predicted"
    hidden, width = torch.tensor([scores], dtype=torch.float64), len(scores[0])
    model = Decoder(SHAPE.model_copy(update={"vocabulary": width, "hidden": width, "tied": False})).double()
    model.head.weight.data = torch.eye(width, dtype=torch.float64)  # so that hidden states are scores
    row = torch.zeros(1, len(targets), dtype=torch.int64)
    beside = {name: torch.tensor([values], dtype=torch.float64) for name, values in extras.items()}
    batch = Batch(row, torch.tensor([targets]), row if documents is None else torch.tensor([documents]), beside)
    found = example.hidden_loss(example.trained(model), hidden, batch).item()
    assert math.isclose(found, loss, rel_tol=1e-9), f"the loss is {found}, and {loss} in the example"


def check_microbatches(objective: Objective, shape: DecoderConfig) -> None:
    """Losses and gradients of microbatches add up to those of the whole batch, however it is cut.

    The same over data-parallel workers: k workers with n rows each make the gradient of one with k n rows. As in
    training, the experts' load is given.
    """
    decoder, batch = small_decoder(shape), batch_for(objective, rows=6)
    model = objective.trained(decoder)
    for module in decoder.modules():
        if isinstance(module, MixtureOfExperts):
            module.load = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    whole, gradients = loss_and_gradients(objective, model, [batch])
    assert whole > 0
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    for rows in (1, 2, 4):
        parts = [batch.each(operator.itemgetter(slice(start, start + rows))) for start in range(0, 6, rows)]
        summed, partial = loss_and_gradients(objective, model, parts)
        torch.testing.assert_close(summed, whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(partial, gradients, rtol=0, atol=1e-11)


def check_gradient(objective: Objective, shape: DecoderConfig) -> None:
    """Along a random direction, the loss changes as its gradient says."""
    model, batch = objective.trained(small_decoder(shape)), batch_for(objective, rows=3)
    _, gradients = loss_and_gradients(objective, model, [batch])
    draw = torch_generator(0, "testing/objective/direction")
    direction = [torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in model.parameters()]
    slope = sum((g * d).sum().item() for g, d in zip(gradients, direction, strict=True))
    losses = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            for parameter, along in zip(model.parameters(), direction, strict=True):
                parameter.add_(along, alpha=step)
        losses.append(loss_and_gradients(objective, model, [batch])[0].item())
        with torch.no_grad():
            for parameter, along in zip(model.parameters(), direction, strict=True):
                parameter.sub_(along, alpha=step)
    change = (losses[0] - losses[1]) / 2e-6
    assert math.isclose(change, slope, rel_tol=1e-5), f"the loss changes by {change} a unit, its gradient says {slope}"


def check_unpredicted(objective: Objective) -> None:
    """A batch that predicts nothing has no loss and no gradient; a row of it adds none to another."""
    model, batch = objective.trained(small_decoder()), batch_for(objective, rows=4)
    nothing = dataclasses.replace(batch, targets=torch.full_like(batch.targets, IGNORE))
    loss, gradients = loss_and_gradients(objective, model, [nothing])
    assert loss == 0, f"where nothing is predicted, the loss is {loss}"
    assert all(gradient.abs().max() == 0 for gradient in gradients), "where nothing is predicted, there is a gradient"


def loss_and_gradients(objective: Objective, model: Any, batches: list[Batch]) -> tuple[Tensor, list[Tensor]]:
    """The summed loss of ``batches``, and the gradients that their backward passes leave, parameter by parameter."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss = objective.loss(model, batch, PackedRows.of(batch.documents))
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def small_decoder(config: DecoderConfig = SHAPE) -> Decoder:
    """A Decoder in float64 whose weights are large enough to make its predictions differ."""
    model = Decoder(config.model_copy(update={"init_std": 0.3})).initialize(0)
    return model.double()


def batch_for(objective: Objective, rows: int) -> Batch:
    """Rows of two documents each, with what the objective's example has beside its tokens: values of those there, drawn
    anew for each document."""
    batch, draw = packed_batch(rows, length=10), torch_generator(0, "testing/objective/extras")
    extras = {}
    for name, given in objective.example().extras.items():
        drawn = torch.randint(len(given), (2 * rows,), generator=draw)
        extras[name] = torch.tensor(given, dtype=torch.float64)[drawn][batch.documents]
    return dataclasses.replace(batch, extras=extras)


def packed_batch(rows: int, length: int, vocabulary: int = SHAPE.vocabulary) -> Batch:
    """Rows that hold two documents of unlike lengths each, so that a part of the batch predicts fewer tokens."""
    draw = torch_generator(0, "testing/objective")
    tokens = torch.randint(vocabulary, (rows, length + 1), generator=draw)
    ends = torch.randint(1, length, (rows, 1), generator=draw)
    documents = 2 * torch.arange(rows).unsqueeze(1) + (torch.arange(length + 1) >= ends)
    same = documents[:, 1:] == documents[:, :-1]
    return Batch(tokens[:, :-1], torch.where(same, tokens[:, 1:], IGNORE), documents[:, :-1].contiguous())
