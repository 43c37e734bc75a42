"""The loss of tokens that several processes share out, beside that of one, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from drawn_decoder import drawn
from penstock.data.loader import Batch
from penstock.models.attention import CausalRows
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.shares import Share, parameter_cuts, with_divided_layers
from penstock.ops.cross_entropy import IGNORE
from penstock.parallel.tensor_gradients import found_in_parts, join_layers
from penstock.parallel.world import World
from penstock.testing.ranks import agreed
from penstock.train.objectives.dpo import DPO
from penstock.train.objectives.next_token import NextToken
from penstock.train.objectives.sft import SupervisedFineTuning
from penstock.train.shards.shared_loss import shared_out

SHAPE = {"vocabulary": 19, "hidden": 12, "layers": 1, "heads": 6, "kv_heads": 6, "head_dim": 2, "ffn": 12, "context": 8}
#: Fifteen tokens, which two processes cannot share evenly; of some nothing is predicted.
TOKENS = torch.arange(16) * 5 % 19
TARGETS = torch.where(torch.arange(15) % 4 == 1, IGNORE, TOKENS[1:])
BATCH = Batch(TOKENS[None, :-1], TARGETS[None], torch.zeros(1, 15, dtype=torch.int64))


class Seen(NextToken):
    """Remembers how many tokens it was given."""

    def hidden_loss(self, model, hidden, batch):
        vars(self).setdefault("counts", []).append(hidden.shape[0])
        return super().hidden_loss(model, hidden, batch)


def faults(world: World, **changes: object) -> list[str]:
    whole = drawn(DecoderConfig(**{**SHAPE, "context": 16, **changes}))
    part = Decoder(with_divided_layers(whole.config, world.size)).double()
    cuts = parameter_cuts(whole, part, Share(world.rank, world.size))
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            cut = cuts.get(name)
            parameter.copy_(whole.get_parameter(name) if cut is None else cut.of(whole.get_parameter(name)))
    join_layers(part, dist.group.WORLD)
    objective, context = Seen(chunk=4), CausalRows.of(15)
    wanted = NextToken(chunk=4).loss(whole, BATCH, context)
    found = shared_out(objective, dist.group.WORLD).loss(part, BATCH, context)
    (wanted / 7).backward()
    (found / 7).backward()
    told = [] if torch.allclose(found, wanted, rtol=1e-12) else ["the loss"]
    told += [] if vars(objective)["counts"] == [len(range(world.rank, 15, world.size))] else ["the tokens"]
    in_parts = found_in_parts(part)
    for name, parameter in part.named_parameters():
        gradient, right = parameter.grad, whole.get_parameter(name).grad
        if name in cuts:
            right = cuts[name].of(right)
        else:
            dist.all_reduce(gradient)
            gradient = gradient if name in in_parts else gradient / world.size
        if not torch.allclose(gradient, right, rtol=1e-10, atol=1e-12):
            told.append(name)
    return told


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_find_the_loss_and_the_gradients_of_one(size):
    """With a head of its own, and with one that is the embedding, whose logits are capped."""

    def work(world: World) -> list[str]:
        torch.set_num_threads(1)
        return [*faults(world), *faults(world, tied=True, logits_cap=3.0)]

    assert agreed(size, work) == [[]] * size


def test_only_sums_over_tokens_are_shared_out():
    def work(world: World) -> list[bool]:
        objectives = (SupervisedFineTuning(), DPO())
        return [shared_out(objective, dist.group.WORLD) is objective for objective in objectives]

    assert agreed(1, work) == [[False, True]]
