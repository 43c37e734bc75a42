"""Prompt tokens: what is guessed for all places at once is what one place after the other guesses."""

from __future__ import annotations

import pytest
import torch

from penstock.data.loader import Batch
from penstock.models.attention import CausalRows, PackedRows
from penstock.models.decoder import Decoder
from penstock.models.heads.headed import Headed
from penstock.models.heads.ppd import ParallelPrompts
from penstock.testing.model_head import learnt
from penstock.testing.serve_model import SHAPE
from penstock.train.objectives.self_distillation import SelfDistillation


def target(**changes) -> Decoder:
    return Decoder(SHAPE.model_copy(update=changes)).initialize(0).eval()


@torch.no_grad()
def one_by_one(model: Headed, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What is guessed behind each of ``tokens`` [T], by passes over the text up to it and the prompt tokens behind it,
    as if those were a text: hidden states [reach, hidden] each."""
    found = []
    for end in range(1, len(tokens) + 1):
        context = CausalRows.of(end + model.head.reach)
        x = torch.cat([model.target.embedding(tokens[None, :end]), model.head.prompts[None]], 1)
        if model.target.config.learned_positions:
            x = x + model.target.position_embedding(context.positions)
        for layer in model.target.layers:
            x, _ = layer(x, model.target.rotary(context.positions, x.dtype), context)
        found.append(model.target.finish(x)[0, end:])
    return found


@pytest.mark.parametrize("changes", [{}, {"window": 4}, {"learned_positions": True}])
def test_guesses_of_all_places_are_those_of_each_one_alone(changes):
    model = learnt(target(**changes), ParallelPrompts(tokens=3)).double()
    tokens = torch.randint(SHAPE.vocabulary, (11,), generator=torch.Generator().manual_seed(0))
    context = PackedRows.of(torch.tensor([[0] * 4 + [1] * 7]))
    with torch.no_grad():
        guesses = [*model.head.guesses(model.target, torch.empty(0), tokens[None], context)]
    assert [each.ahead for each in guesses] == [1, 2, 3]
    found = torch.stack([each.hidden[0] for each in guesses], 1)
    alone = torch.stack([*one_by_one(model, tokens[:4]), *one_by_one(model, tokens[4:])])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"embedding_scale": 3.0}, {"learned_positions": True}])
def test_a_prompted_decoder_is_its_target_bit_for_bit_for_every_token(changes):
    model, tokens, context = target(**changes), torch.arange(9)[None], CausalRows.of(9)
    prompted = Headed.new(model, ParallelPrompts(tokens=2), seed=0).head.prompted(model)
    assert prompted.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(prompted(tokens, context).hidden, model(tokens, context).hidden)
        assert torch.equal(prompted.embedded(torch.tensor([-2, 5, -1]))[::2], prompted.prompts.flip(0))


def test_prompt_tokens_begin_as_tokens_of_the_vocabulary_might():
    model = target(hidden=64, head_dim=16, embedding_scale=2.0)
    with torch.no_grad():
        model.embedding.weight.mul_(torch.linspace(0.1, 2, 64)).add_(0.5)
    prompts = Headed.new(model, ParallelPrompts(tokens=8), seed=0).head.prompts.detach()
    known = 2 * model.embedding.weight
    distance = (prompts - known.mean(0)) / known.std(0)
    assert abs(float(distance.mean())) < 0.1 and float(distance.std()) == pytest.approx(1, abs=0.1)


def test_nothing_but_the_prompt_tokens_gets_a_gradient():
    decoder = target()
    model = Headed.new(decoder, ParallelPrompts(tokens=2), seed=0)
    assert [name for name, _ in model.named_parameters()] == ["head.prompts"]
    tokens = torch.arange(10)[None]
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(1, 9, dtype=torch.int64))
    SelfDistillation().loss(model, batch, CausalRows.of(9)).backward()
    assert all(each.grad is None for each in decoder.parameters())
    assert model.head.prompts.grad.abs().amin(-1).min() > 0
