"""Hidden transfer: what is guessed for all places at once is what one place after the other guesses."""

from __future__ import annotations

import pytest
import torch

from penstock.models.attention import CausalRows, PackedRows
from penstock.models.decoder import Decoder
from penstock.models.heads.headed import Headed
from penstock.models.heads.hidden_transfer import HiddenTransfer
from penstock.models.tapped import TappedDecoder
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.decode.roster import Roster
from penstock.serve.messages import Request
from penstock.speculate.drafters.head import Head
from penstock.testing.drafting_engines import engine_with, outcomes
from penstock.testing.model_head import check_drafts, learnt, watched
from penstock.testing.serve_model import SHAPE, small_mixture

DEEP = SHAPE.model_copy(update={"layers": 4})


def deep(**changes) -> Decoder:
    return Decoder(DEEP.model_copy(update=changes)).initialize(0).eval()


@torch.no_grad()
def one_by_one(model: Headed, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What is guessed behind each of ``tokens`` [T], by passes over the text up to it and the pseudo states behind it,
    of which each sees all that stand before it: hidden states [reach, hidden] each."""
    found = []
    for end in range(1, len(tokens) + 1):
        target, head, context = model.target, model.head, CausalRows.of(end + model.head.reach)
        states = target.embed(tokens[None, :end], CausalRows.of(end).positions)
        for layer in target.layers[: head.layers]:
            states, _ = layer(states, target.rotary(CausalRows.of(end).positions, states.dtype), CausalRows.of(end))
        pseudo = torch.stack([each(states[:, -1]) for each in head.transfers], 1)
        x, rotary = torch.cat([states, pseudo], 1), target.rotary(context.positions, states.dtype)
        for layer in target.layers[head.layers :]:
            x, _ = layer(x, rotary, context)
        found.append(target.finish(x)[0, end:])
    return found


@pytest.mark.parametrize("left", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"window": 4}])
def test_guesses_of_all_places_are_those_of_each_one_alone(left, changes):
    model = learnt(deep(**changes), HiddenTransfer(left=left, tokens=3)).double()
    tokens = torch.randint(SHAPE.vocabulary, (11,), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 4 + [1] * 7])
    context = PackedRows.of(documents)
    with torch.no_grad():
        guesses = [*model.head.guesses(model.target, torch.empty(0), tokens[None], context)]
    assert [each.ahead for each in guesses] == [1, 2, 3]
    found = torch.stack([each.hidden[0] for each in guesses], 1)
    alone = torch.stack([*one_by_one(model, tokens[:4]), *one_by_one(model, tokens[4:])])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-12)


def test_a_tapped_decoder_is_its_target_bit_for_bit():
    target, tokens, context = deep(), torch.arange(9)[None], CausalRows.of(9)
    tapped = TappedDecoder(target, 2)
    assert tapped.state_dict().keys() == target.state_dict().keys()
    with torch.no_grad():
        x, attended, between = tapped.trunk(tokens, context)
        assert torch.equal(tapped.tip(x, attended, between), target(tokens, context).hidden)
        rotary = target.rotary(context.positions, x.dtype)
        for layer in target.layers[2:-1]:
            between, _ = layer(between, rotary, context)
        assert torch.equal(between, x)


@pytest.mark.slow
@pytest.mark.parametrize("left", [1, 2, 3])
def test_an_engine_drafts_those_guesses_wherever_the_transfer_is(left):
    check_drafts(HiddenTransfer(left=left, tokens=4), deep())


@pytest.mark.slow
@pytest.mark.parametrize("tree", [(), (2, 2)])
def test_random_transfers_change_no_token(tree):
    target = deep()
    model = learnt(target, HiddenTransfer(left=2, tokens=3))
    engine = engine_with(Head(source="a head"), target, draft=model.head.requires_grad_(False).eval(), tree=tree)
    assert outcomes(engine) == outcomes(engine_with(None, target))
    assert engine.snapshot().drafted_tokens > 0


def test_what_is_drafted_does_not_depend_on_copies_with_noise_beside_it():
    """Steps with those are computed otherwise, and keep the states all the same."""
    kind = HiddenTransfer(left=1, tokens=2)
    head = learnt(small_mixture(), kind).head.requires_grad_(False).eval()
    drafted = []
    for rules in ([None], [None, Roster(copies=2)]):
        engine = engine_with(Head(source="a head"), small_mixture(), draft=head)
        drafts = watched(engine)
        for number, rule in enumerate(rules):
            sampling = SamplingParams(temperature=0, max_tokens=12, rule=rule, drafts=rule is None)
            engine.add(Request(str(number), [3 + number, 1, 4, 1, 5], sampling))
        while engine.busy:
            engine.step()
        drafted.append({text: tree for text, tree in drafts if text[0] == 3})
    alone, beside = drafted
    assert len(alone) > 3
    assert alone == beside
