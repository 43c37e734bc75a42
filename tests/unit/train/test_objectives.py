"""The next-token objective against cross-entropy of all logits at once, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from penstock.models.attention import PackedRows
from penstock.models.config import MoEConfig
from penstock.ops.cross_entropy import IGNORE
from penstock.testing.train_objective import SHAPE, loss_and_gradients, packed_batch, small_decoder
from penstock.train.objectives.next_token import NextToken


@pytest.mark.parametrize("chunk", [1, 7, 64, 2048])
def test_next_token_equals_cross_entropy_of_all_logits(chunk: int):
    """Loss and gradients, whatever the chunk; the tied embedding gets its gradient from both ends."""
    model, batch = small_decoder(), packed_batch(rows=5, length=12)
    ours = loss_and_gradients(NextToken(chunk=chunk), model, [batch])
    model.zero_grad()
    logits = model.logits(model(batch.tokens, PackedRows.of(batch.documents)).hidden)
    theirs = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
    theirs.backward()
    assert (batch.targets == IGNORE).any()
    torch.testing.assert_close(ours[0], theirs.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours[1], [p.grad for p in model.parameters()], rtol=0, atol=1e-11)


def test_the_balance_loss_counts_once_for_each_token():
    moe = MoEConfig(experts=4, ffn=6, balance_weight=0.25)
    model, batch = small_decoder(SHAPE.model_copy(update={"moe": moe})), packed_batch(rows=5, length=12)
    loss, _ = loss_and_gradients(NextToken(), model, [batch])
    hidden, balance = model(batch.tokens, PackedRows.of(batch.documents))
    plain = F.cross_entropy(model.logits(hidden).flatten(0, 1), batch.targets.flatten(), reduction="sum")
    assert balance > 2 * 0.99 * batch.tokens.numel()  # two layers, each at least about 1 a token
    torch.testing.assert_close(loss, (plain + 0.25 * balance).detach(), rtol=1e-12, atol=0)
