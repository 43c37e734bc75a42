"""The law of ``model.head``.

Bugs that its clauses are there to catch:

- sight: a guess that looks at the token it is for, or at one behind it; one that does not depend on what it says that
  it has seen.
- learning: weights of the target that are trained along; a head that cannot learn.
- folder: a weight that is lost, renamed or rounded on its way to disk; a head that drafts for a model that it was not
  trained for.
- drafts: an engine that reads another place, another depth or what was there before; what a head learnt is not what
  drafts.
- tokens: those of an engine that drafts with the head are those of one that drafts nothing, for requests of every kind
  (as in :mod:`penstock.testing.speculate_drafter`).
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from penstock.core.errors import UsageError
from penstock.core.randomness import torch_generator
from penstock.data.loader import Batch
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.models.heads import folder as heads
from penstock.models.heads.contract import Continues, Exits, Head, HeadModule
from penstock.models.heads.headed import Headed
from penstock.policy import create
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.engine.batch import Batch as EngineBatch
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.speculate.contract import Drafter
from penstock.speculate.sparse_tree import ranks_of
from penstock.speculate.tree import Tree, path
from penstock.testing.drafting_engines import engine_with, outcomes
from penstock.testing.refusals import refused
from penstock.testing.serve_model import SHAPE, small_model
from penstock.train.objectives.self_distillation import SelfDistillation


def drafter_of(kind: Head) -> Drafter:
    """What drafts with a head of this kind in the suites, wherever that comes from."""
    made = create("speculate.drafter", kind.drafter, source="a head")
    assert isinstance(made, Drafter)
    return made


def check(kind: Head) -> None:
    """Asserts the law."""
    check_sight(kind)
    check_learning(kind)
    check_folder(kind)
    check_drafts(kind)
    check_tokens(kind)


def learnt(target: Decoder, kind: Head) -> Headed:
    """A head for ``target`` whose weights have all moved away from where they began."""
    model = Headed.new(target, kind, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch_generator(1, f"testing/head/{name}")
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
    return model


def check_sight(kind: Head) -> None:
    """A guess depends on the token after which it is made and on what it has seen, and on none behind that."""
    model, length = learnt(small_model(), kind), 9
    tokens = torch.randint(SHAPE.vocabulary, (1, length), generator=torch_generator(0, "testing/head"))
    before = _guesses(model, tokens)
    assert before, "nothing is guessed"
    for place in range(length):
        other = tokens.clone()
        other[0, place] = (other[0, place] + 1) % SHAPE.vocabulary
        for (ahead, seen, was), (_, _, now) in zip(before, _guesses(model, other), strict=True):
            assert seen <= ahead
            changed = (was != now).any(-1)[0]
            first = max(0, place - seen)
            assert not changed[:first].any(), f"a guess {ahead} ahead looks at token {place} from before {first}"
            assert changed[first], f"a guess {ahead} ahead does not see token {place} from {first}"


def _guesses(model: Headed, tokens: Tensor) -> list[tuple[int, int, Tensor]]:
    """How far ahead each guess is, what it has seen, and its logits [1, T, vocabulary]."""
    context = CausalRows.of(tokens.shape[-1])
    with torch.no_grad():
        hidden = model.target(tokens, context).hidden
        every = model.head.guesses(model.target, hidden, tokens, context)
        return [(each.ahead, each.seen, model.target.logits(each.hidden)) for each in every]


def check_learning(kind: Head) -> None:
    """A few steps along the gradient bring the head nearer to the target, which stays as it is."""
    target = Decoder(SHAPE).initialize(3)
    model, objective = learnt(target, kind), SelfDistillation()
    then = {name: each.clone() for name, each in target.named_parameters()}
    tokens = torch.randint(SHAPE.vocabulary, (2, 12), generator=torch_generator(0, "testing/head/learning"))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(2, 11, dtype=torch.int64))
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(6):
        loss = objective.loss(model, batch, CausalRows.of(11))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], f"the head does not learn: {losses}"
    assert all(each.grad is None for each in target.parameters())
    assert all(torch.equal(then[name], each) for name, each in target.named_parameters())


def check_folder(kind: Head) -> None:
    """A head is the same in every bit once it was saved and loaded, and other models are refused."""
    target = small_model()
    model = learnt(target, kind)
    tokens = torch.arange(8).unsqueeze(0)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        heads.save(model, folder)
        again = Headed(target, kind, heads.load(folder, target))
        for (_, _, was), (_, _, now) in zip(_guesses(model, tokens), _guesses(again, tokens), strict=True):
            assert torch.equal(was, now), "a head comes back from its folder as another one"
        wider = Decoder(SHAPE.model_copy(update={"vocabulary": SHAPE.vocabulary + 1})).initialize(0)
        shifted = Decoder(SHAPE).initialize(0)
        with torch.no_grad():
            shifted.norm.weight.mul_(1.5)
        for other in (wider, shifted):
            with refused(UsageError, "penstock train --preset drafter-"):
                heads.load(folder, other)


def check_drafts(kind: Head, target: Decoder | None = None) -> None:
    """What an engine drafts for greedy requests is what the head guesses on the whole text, in each place, and of a
    tree the likeliest tokens in order, also where a text goes on as two, whose last block is copied; for the small
    model of the suites, or another ``target``."""
    target = target or small_model()
    model = learnt(target, kind)
    engine = engine_with(drafter_of(kind), target, draft=_frozen(model))
    drafts = watched(engine)
    for number in range(3):
        prompt = [(7 * place + 3 * number) % SHAPE.vocabulary for place in range(5 + 6 * number)]
        engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=12)))
    engine.step()
    for place in range(2):
        engine.step()
        going = engine.memory.running[place]
        name, prompt = going.request.id, [*going.tokens[:-1], going.tokens[-1] ^ 1]
        engine.fork(name, Request(f"{name} otherwise", prompt, SamplingParams(temperature=0, max_tokens=6)))
    while engine.busy:
        engine.step()
    compared = 0
    for text, tree in drafts:
        ranks = ranks_of(tree.parents)
        for node, token in enumerate(tree.tokens):
            way = [tree.tokens[each] for each in path(tree.parents, node)[:-1]]
            logits = _guessed(model, [*text, *way], len(text), len(way))
            assert logits is not None
            wanted = int(logits.topk(ranks[node] + 1).indices[-1])
            there = f"at depth {len(way)} behind {len(text)} tokens"
            assert token == wanted, f"drafted {token} {there} as number {ranks[node]}, and guessed {wanted}"
            compared += 1
        if isinstance(model.head, Continues):
            ((_, _, logits),) = _guesses(model, torch.tensor([text]))
            first = tree.tokens[0]
            assert first == int(logits[0, -1].argmax()), "a head drafts by other hidden states than it learns from"
    assert compared > 20


def _guessed(model: Headed, tokens: list[int], settled: int, depth: int) -> Tensor | None:
    """The logits [vocabulary] of the token at ``depth`` behind the first ``settled`` of the ``tokens``, by what the
    engine may know: the hidden states of all settled ones but the newest, or whatever the target's layers make of all
    of them."""
    if isinstance(model.head, Continues):
        return _continued(model, model.head, tokens, settled)
    for ahead, _, logits in _guesses(model, torch.tensor([tokens])):
        place = settled + depth - 1 - ahead
        if isinstance(model.head, Exits) or place == settled - 2:
            return logits[0, place]
    return None


@torch.no_grad()
def _continued(model: Headed, head: Continues, tokens: list[int], settled: int) -> Tensor:
    """The logits of the token behind ``tokens``, token by token: by the target's hidden states behind all of the first
    ``settled`` tokens but the newest, and then by the head's own."""
    target, decoder = model.target, head.continuing(model.target)
    known = target(torch.tensor([tokens[: settled - 1]]), CausalRows.of(settled - 1)).hidden
    decoder.before = torch.cat([torch.zeros_like(known[:, :1]), known], 1)
    for length in range(settled, len(tokens) + 1):
        hidden = decoder(torch.tensor([tokens[:length]]), CausalRows.of(length)).hidden
        decoder.before = torch.cat([decoder.before, hidden[:, -1:]], 1)
    return target.logits(hidden[0, -1])


def watched(engine: Engine) -> list[tuple[tuple[int, ...], Tree]]:
    """The texts behind which ``engine`` drafts from now on, each with what is drafted."""
    assert engine.steps.speculation is not None
    draft, seen = engine.steps.speculation.draft, list[tuple[tuple[int, ...], Tree]]()

    def watching(batch: EngineBatch) -> None:
        draft(batch)
        seen.extend((tuple(each.sequence.tokens), each.tree) for each in batch.entries if each.window)

    vars(engine.steps.speculation)["draft"] = watching
    return seen


def check_tokens(kind: Head) -> None:
    """Tokens are those of an engine that drafts nothing."""
    engine = engine_with(drafter_of(kind), draft=_frozen(learnt(small_model(), kind)))
    assert outcomes(engine) == _plain(), "a head changes the tokens of a text"
    assert engine.snapshot().drafted_tokens > 0


@functools.cache
def _plain() -> dict[tuple[str, int], list[int]]:
    """What an engine says that drafts nothing."""
    return outcomes(engine_with(None))


def _frozen(model: Headed) -> HeadModule:
    return model.head.requires_grad_(False).eval()
