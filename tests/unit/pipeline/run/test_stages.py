"""Stages: parts are those of the whole Decoder."""

from __future__ import annotations

import pytest
import torch

from penstock.core.errors import UsageError
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.pipeline.run.stages import Part, parameter_names
from penstock.testing.pipeline_runtime import dense, sparse


@pytest.mark.parametrize("config", [dense(5), sparse(5)], ids=["dense", "sparse"])
@pytest.mark.parametrize("stages", [[range(5)], [range(2), range(2, 5)], [range(i, i + 1) for i in range(5)]], ids=len)
def test_the_stages_one_after_another_are_the_decoder(config, stages):
    """Drawn by seed, stage by stage, with the whole's names and values."""
    whole = Decoder(config).initialize(3)
    named = dict(whole.named_parameters())
    parts = [Part(config, [stage]) for stage in stages]
    tokens, context = torch.arange(6).reshape(2, 3), CausalRows.of(3)
    x, balance = tokens, torch.zeros(())
    for part, stage in zip(parts, stages, strict=True):
        part.initialize(3)
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, named[name]), name
        x, extra = part.run(stage, x, context)
        balance = balance if extra is None else balance + extra
    expected = whole(tokens, context)
    assert torch.equal(x, expected.hidden)
    torch.testing.assert_close(balance, torch.zeros(()) if expected.balance is None else expected.balance)
    assert torch.equal(parts[-1].logits(x), whole.logits(expected.hidden))
    names = parameter_names(config, stages)
    assert {k: v for stage in names for k, v in stage.items()} == {k: p.requires_grad for k, p in named.items()}
    assert sum(map(len, names)) == len(set().union(*names)) + (config.tied and len(stages) > 1)


def test_a_part_holds_no_more_than_its_layers_and_shares_a_tied_matrix():
    config = dense(4)
    both = Part(config, [range(1), range(3, 4)])
    assert both.head.weight is both.embedding.weight
    assert {name.split(".")[1] for name, _ in both.named_parameters() if name.startswith("layers.")} == {"0", "3"}
    middle = Part(config, [range(1, 3)])
    assert not hasattr(middle, "embedding")
    assert not hasattr(middle, "head")
    with torch.device("meta"):
        assert all(p.is_meta for p in Part(config, [range(2)]).parameters())
    with pytest.raises(UsageError, match="no forward pass"):
        middle(torch.zeros(1, 1, dtype=torch.int64), CausalRows.of(1))


def test_a_part_takes_its_weights_from_a_whole():
    whole = Decoder(sparse(3)).initialize(1)
    part = Part(sparse(3), [range(1, 3)]).take(whole)
    named = dict(whole.named_parameters())
    assert all(torch.equal(parameter, named[name]) for name, parameter in part.named_parameters())
