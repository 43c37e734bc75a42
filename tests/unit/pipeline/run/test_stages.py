"""Stages: parts are those of the whole Decoder."""

from __future__ import annotations

import pytest
import torch

from penstock.core.errors import UsageError
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.pipeline.run.stages import SHARDED, Part, Stage, parameter_names
from penstock.testing.pipeline_runtime import dense, sparse, untied


def cut(config, *layers: range) -> list[Stage]:
    """Stages in order, the first with the embedding and the last with the head."""
    return [Stage(own, own.start == 0, own.stop == config.layers) for own in layers]


@pytest.mark.parametrize("config", [dense(5), sparse(5)], ids=["dense", "sparse"])
@pytest.mark.parametrize("layers", [[range(5)], [range(2), range(2, 5)], [range(i, i + 1) for i in range(5)]], ids=len)
def test_the_stages_one_after_another_are_the_decoder(config, layers):
    """Drawn by seed, stage by stage, with the whole's names and values."""
    stages = cut(config, *layers)
    whole = Decoder(config).initialize(3)
    named = dict(whole.named_parameters())
    parts = [Part(config, [stage]) for stage in stages]
    tokens, context = torch.arange(6).reshape(2, 3), CausalRows.of(3)
    x, balance = tokens, torch.zeros(())
    for part, stage in zip(parts, stages, strict=True):
        part.initialize(3)
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, named[name]), name
        x, extra = part.run(stage.layers, x, context, last=stage.ends)
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
    both = Part(config, cut(config, range(1), range(3, 4)))
    assert both.head.weight is both.embedding.weight
    assert {name.split(".")[1] for name, _ in both.named_parameters() if name.startswith("layers.")} == {"0", "3"}
    middle = Part(config, cut(config, range(1, 3)))
    assert not hasattr(middle, "embedding")
    assert not hasattr(middle, "head")
    with torch.device("meta"):
        assert all(p.is_meta for p in Part(config, cut(config, range(2))).parameters())
    with pytest.raises(UsageError, match="no forward pass"):
        middle(torch.zeros(1, 1, dtype=torch.int64), CausalRows.of(1))


def test_a_part_takes_its_weights_from_a_whole():
    whole = Decoder(sparse(3)).initialize(1)
    part = Part(sparse(3), cut(sparse(3), range(1, 3))).take(whole)
    named = dict(whole.named_parameters())
    assert all(torch.equal(parameter, named[name]) for name, parameter in part.named_parameters())


@pytest.mark.parametrize("config", [dense(2), untied(2)], ids=["tied", "untied"])
def test_rows_of_a_sharded_vocabulary_are_those_of_the_whole(config):
    """Drawn by seed, and taken from a whole; the middle stage has them too, and no stage is said to."""
    whole = Decoder(config).initialize(1)
    named = dict(whole.named_parameters())
    stages, rows = cut(config, range(1), range(1, 2)), range(4, 9)
    for part in (Part(config, stages[1:], rows).initialize(1), Part(config, stages[:1], rows).take(whole)):
        found = {name: p for name, p in part.named_parameters() if name in SHARDED}
        assert found.keys() == ({"embedding.weight"} if config.tied else set(SHARDED))
        for name, parameter in found.items():
            assert torch.equal(parameter, named[name][4:9])
    assert not set(SHARDED) & {name for stage in parameter_names(config, stages, sharded=True) for name in stage}
