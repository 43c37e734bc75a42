"""The law of ``speculate.drafter``: whatever is drafted, the tokens are those of plain decoding, draw for draw.

What each clause is there to catch:

- :func:`check_distribution` enumerates every draw on a model that is a table: a rule that accepts too much or too
  little, takes the wrong row's token, or draws with the wrong number shifts a probability, and nothing shifts unseen;
- :func:`check_engine` compares an engine that drafts with one that does not, over requests of every kind: keys and
  values of rejected tokens that are read later or shared, penalties, grammars and rules that do not follow the
  tentative tokens, draws and log-probabilities that belong to another place, a text that goes on behind its end, a
  neighbour that is not drafted for and gets another's token;
- :func:`check_loops` does so with texts that circle: much is accepted at once, ends lie within it, and a neighbour that
  drafts nothing goes on with a token that is not known yet, and may be another's;
- :func:`check_twin` lets a model draft for itself: whatever it gets wrong of a text, a place, a draw, a penalty, or of
  keys and values that somebody else wrote, cut back or left out, makes it draft what it does not say itself;
- :func:`check_meanwhile`: what is drafted while something is verified is not what would be drafted behind it, since it
  is of another text, sequence, place, draw or penalty, or what it was drawn from is told of another token;
- :func:`check_proposals`: more tokens than were asked for, or a draft that a text's growth by pieces changes;
- :func:`check_trees`: the same of trees, and ways that are no trees, or not the chain's; then the engine and the twin
  again, where sequences go on by any of several ways: keys and values of a way that was not taken, or that stay where
  they were computed, positions by place, penalties and grammars of another way;
- :func:`check_runs`: of those whose drafts go through a pipeline in runs, a run that sees what is behind it or does not
  see what is before it, or is given up although it can be reached;
- :func:`check_superposed`: of those that superpose, drafts that are not the best of those that they are crossed to, a
  row that is another sum of embeddings, stands elsewhere or does not see those before it, and passes that more drafts
  make more or larger;
- :func:`check_shapes`: of those that probe, trees that are too large or too tall, and probes for what nobody will read.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.core.randomness import numpy_generator
from penstock.models.decoder import Decoder
from penstock.models.heads.contract import HeadModule
from penstock.models.heads.early_exit import EarlyExit
from penstock.models.prompted import PromptedDecoder
from penstock.models.shares import Share
from penstock.ops.draw import draw_softmax
from penstock.ops.paged.reference import Reference
from penstock.serve.build import build_engine
from penstock.serve.choose.sampler import Sampled
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.choose.window import accept_prefix
from penstock.serve.config import EngineConfig
from penstock.serve.decode.momentum import Momentum
from penstock.serve.engine.batch import Batch
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.sequence import Sequence as EngineSequence
from penstock.serve.messages import Delta, Finish, Request
from penstock.serve.ranks.stages import StageDecoder
from penstock.serve.run.cascade import CascadeDraft
from penstock.serve.run.step import Step
from penstock.serve.run.superposed import SuperposedModel
from penstock.speculate.contract import AWAITED, Branching, Drafter, Probing, Superposing
from penstock.speculate.controllers.fixed import Fixed
from penstock.speculate.drafters.model import Model
from penstock.speculate.tree import Tree, chain, depths, drafts_at, path
from penstock.speculate.verifiers.accept_residual import AcceptResidual
from penstock.speculate.verifiers.recursive_distinct import RecursiveDistinct
from penstock.testing.divided_engine import together
from penstock.testing.drafting_engines import engine_with, gather, logprobs_of, played, tokens_of
from penstock.testing.reference import charged, greedy, next_logits
from penstock.testing.serve_model import SHAPE, draft_of, head_for, head_of, small_model

#: Chances, in eighths, of the token (column) after the token (row): a model that likes to repeat itself.
TABLE = ((1, 5, 1, 1), (1, 0, 6, 1), (5, 1, 1, 1), (2, 2, 2, 2))
EIGHTHS = 8

#: The same of a model that drafts, and is sometimes wrong.
DRAFTS = ((2, 4, 1, 1), (0, 2, 6, 0), (5, 0, 3, 0), (1, 3, 2, 2))


def check(drafter: Drafter) -> None:
    """Asserts the law."""
    check_proposals(drafter, seed=0)
    check_distribution(drafter)
    check_twin(drafter)
    check_engine(drafter)
    check_loops(drafter)
    check_meanwhile(drafter)
    check_trees(drafter)
    check_superposed(drafter)
    check_shapes(drafter)
    check_runs(drafter)


def check_runs(drafter: Drafter) -> None:
    """Asserts that an engine of two stages says what one without drafts says on one device, if the drafter's tokens go
    through a pipeline in runs."""
    if drafter.tokens_of_run is None:
        return
    config = EngineConfig(attention=Reference(), tokens=48, sequences=3, block_size=4, cache_tokens=160, check=True)
    options = {"draft": drafter, "controller": Fixed(), "pipeline_parallel": 2}

    def part(share: Share) -> Decoder:
        return StageDecoder(SHAPE, share).take(small_model())

    results = together(2, part, config.model_copy(update=options), _repeated)
    wanted = _repeated(build_engine(small_model(), config))
    assert results[0].get("returned") == wanted, "in runs, the tokens are not those of plain decoding"


def _repeated(engine: Engine) -> list[list[int]]:
    """What ``engine`` answers to texts that repeat themselves: greedy, drawn, and with penalties."""
    found: dict[str, list[int]] = {}
    for number, more in enumerate(({}, {"temperature": 0.3, "seed": 5}, {"repetition_penalty": 1.2})):
        text = [int(token) for token in numpy_generator(number, "testing/runs").integers(SHAPE.vocabulary, size=5)] * 3
        params = SamplingParams.model_validate({"temperature": 0, "max_tokens": 24, "ignore_eos": True, **more})
        engine.add(Request(str(number), text, params))
    while engine.busy:
        for delta in engine.step():
            found.setdefault(delta.id, []).extend(delta.tokens)
    return [found[id] for id in sorted(found)]


def check_distribution(drafter: Drafter, length: int = 3) -> None:
    """Asserts that the first ``length`` tokens have exactly the model's distribution, over all draws."""
    prompt = [0, 1, 2, 0, 1, 2, 0]
    grid = [(place + 0.5) / EIGHTHS for place in range(EIGHTHS)]
    found: Counter[tuple[int, ...]] = Counter()
    for draws in itertools.product(grid, repeat=length):
        found[tuple(_speculated(drafter, prompt, draws))] += 1
    wanted = {}
    for tokens in itertools.product(range(len(TABLE)), repeat=length):
        chance = Fraction(1)
        for before, token in itertools.pairwise([prompt[-1], *tokens]):
            chance *= Fraction(TABLE[before][token], EIGHTHS)
        if chance:
            wanted[tokens] = chance * EIGHTHS**length
    assert found == wanted


def _speculated(drafter: Drafter, prompt: list[int], draws: Sequence[float]) -> list[int]:
    """As many tokens as there are ``draws``, decoded on the table as an engine does it."""
    tokens, draft = list(prompt), drafter.start(prompt)
    while (left := len(draws) - (len(tokens) - len(prompt))) > 0:
        uniform = draws[len(draws) - left :]
        window = _filled(draft.propose(left - 1) if left > 1 else [], tokens[-1], uniform)
        rows = torch.tensor([TABLE[token] for token in (tokens[-1], *window)]).double().log()
        chosen = _drawn(rows, uniform)
        count = int(accept_prefix(chosen, torch.tensor([0]), torch.tensor([[*window, -1]]))[0])
        draft.extend(chosen[:count].tolist())
        tokens += chosen[:count].tolist()
    return tokens[len(prompt) :]


def _drawn(rows: Tensor, uniform: Sequence[float]) -> Tensor:
    """Tokens by the scores of ``rows`` and as many of the first of ``uniform`` numbers."""
    numbers = torch.tensor(uniform[: len(rows)], dtype=torch.float64)
    return draw_softmax(rows, torch.ones(len(rows), dtype=torch.float64), numbers)


def _filled(window: list[int], last: int, uniform: Sequence[float]) -> list[int]:
    """``window`` with what a table that drafts says, by the draws of the target, where tokens are awaited."""
    for place, token in enumerate(window):
        if token == AWAITED:
            row = torch.tensor([DRAFTS[window[place - 1] if place else last]]).double().log()
            window[place] = int(_drawn(row, uniform[place:])[0])
    return window


def check_proposals(drafter: Drafter, seed: int) -> None:
    """Asserts that no more is proposed than was asked for, nor than ``most``, and that it depends on the text alone."""
    generator = numpy_generator(seed, "testing/drafter")
    text = [int(token) for token in generator.integers(3, size=60)]
    pieces = drafter.start(text[:5])
    for end in range(5, len(text)):
        for asked in (1, 2, 30):
            proposed = pieces.propose(asked)
            assert len(proposed) <= min(asked, drafter.most)
            assert proposed == drafter.start(text[:end]).propose(asked)
        pieces.extend(text[end : end + 1])


#: Drafts for each place, by depth.
BRANCHES = (3, 2)


def check_trees(drafter: Drafter) -> None:
    """Asserts the law where trees are drafted, if the drafter does."""
    if not drafter.branches:
        return
    check_grown(drafter, seed=0)
    check_engine(drafter, tree=BRANCHES)
    check_twin(drafter, tree=BRANCHES)
    check_meanwhile(drafter, tree=BRANCHES)


def check_grown(drafter: Drafter, seed: int) -> None:
    """Asserts that trees are trees of no more than was asked for, that the chain is one of their ways and the only one
    without branches, and that they depend on the text alone."""
    generator = numpy_generator(seed, "testing/drafter")
    text = [int(token) for token in generator.integers(3, size=40)]
    pieces = drafter.start(text[:5])
    assert isinstance(pieces, Branching), "a drafter that branches starts drafts without grow()"
    for end in range(5, len(text)):
        for ahead, most in ((1, 1), (2, 5), (3, 30), (30, 7)):
            assert pieces.grow((), ahead, most) == chain(pieces.propose(min(ahead, most)))
            tree = pieces.grow(BRANCHES, ahead, most)
            fresh = drafter.start(text[:end])
            assert isinstance(fresh, Branching) and tree == fresh.grow(BRANCHES, ahead, most)
            _check_tree(tree, ahead, most)
            first = pieces.propose(min(ahead, most))
            awaited = first[:1] == [AWAITED]
            ways = [[tree.tokens[node] for node in path(tree.parents, node)] for node in range(len(tree.tokens))]
            assert awaited or not first or first in ways
        pieces.extend(text[end : end + 1])


def _check_tree(tree: Tree, ahead: int, most: int) -> None:
    assert len(tree.tokens) == len(tree.parents) <= most
    assert all(-1 <= parent < node for node, parent in enumerate(tree.parents))
    tall = [0, *depths(tree.parents)]
    assert max(tall) <= ahead
    for parent, drafts in Counter(tree.parents).items():
        assert drafts <= drafts_at(BRANCHES, tall[parent + 1])
    drafted = [pair for pair in zip(tree.parents, tree.tokens, strict=True) if pair[1] != AWAITED]
    assert len(set(drafted)) == len(drafted), "a place has a draft twice"


def check_shapes(drafter: Drafter) -> None:
    """Asserts of one that probes that its trees, whatever was accepted and whatever steps take, are no larger than they
    may be, no taller than what is guessed, and have no row that is of no use to the text."""
    shaper, draft = drafter.shaper(), drafter.start([0, 1, 2])
    if not drafter.widths:
        assert shaper is None
        return
    assert shaper is not None and isinstance(draft, Probing), "a drafter that probes starts drafts without shape()"
    generator = numpy_generator(0, "testing/drafter/shapes")
    for trial in range(60):
        reach, slope = int(generator.integers(1, drafter.most + 1)), float(generator.random())
        shaper.plan(reach, lambda rows, slope=slope: 1 + slope * rows)  # type: ignore[misc]
        for guessed, ahead, most in generator.integers(0, [drafter.most + 3, 9, drafter.rows + 9], (4, 3)).tolist():
            tree = draft.shape(shaper, guessed, ahead, most)
            assert tree == draft.shape(shaper, guessed, ahead, most), "a shape depends on how often it was asked for"
            tall, counts = [0, *depths(tree.parents)], Counter(tree.parents)
            assert tree.tokens == [AWAITED] * len(tree.parents) and tree.rows <= min(most, drafter.rows)
            assert all(-1 <= parent < node for node, parent in enumerate(tree.parents))
            assert max(tall) <= min(guessed, ahead, reach), f"{max(tall)} tokens, of which {guessed} are guessed"
            assert all(drafts <= drafter.widths[tall[parent + 1]] for parent, drafts in counts.items())
            assert len(tree.probes) == len(tall) and all(0 <= count <= drafter.most for count in tree.probes)
            assert all(depth + count <= ahead for depth, count in zip(tall, tree.probes, strict=True) if count)
            if tree.tokens and trial < 50:
                node = int(generator.integers(-1, len(tree.tokens)))
                shaper.learn(tree, path(tree.parents, node))


def check_engine(drafter: Drafter, seed: int = 0, tree: Sequence[int] = ()) -> Engine:
    """Asserts that an engine that drafts says what one says that does not; returns the former."""
    times = 1 if tree else 2
    drafting = engine_with(drafter, tree=tree)
    wanted, found = plain_played(seed, times), played(drafting, seed, times)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert tokens_of(found[name]) == tokens_of(wanted[name]), f"drafts change the tokens of {name}"
        assert found[name][-1].finish is wanted[name][-1].finish
        told, right = logprobs_of(found[name]), logprobs_of(wanted[name])
        assert len(told) == len(right)
        assert all(abs(one - other) < 1e-4 for one, other in zip(told, right, strict=True))
    assert drafting.snapshot().held == 0
    return drafting


@functools.cache
def plain_played(seed: int, times: int = 2) -> dict[tuple[str, int], list[Delta]]:
    """What an engine says that drafts nothing."""
    return played(engine_with(None), seed, times)


def check_twin(drafter: Drafter, tree: Sequence[int] = ()) -> Engine | None:
    """Asserts that a model which drafts for itself is right in every place, whatever requests ask for: where prompts
    are computed in pieces and found in the cache, sequences are preempted, forked, cut back and fed, and some draft
    nothing. Of a tree, one way is. Returns the engine; None for a drafter without a model or a head, and for one whose
    model is given several texts at once, of which it may say what it says of none."""
    if (drafter.model is None and drafter.head is None) or drafter.superposes:
        return None
    target, itself = _twins(drafter)
    engine = engine_with(drafter, target, draft=itself, cache_tokens=120, tree=tree)
    if drafter.widths and engine.steps.speculation is not None:
        engine.steps.speculation.shaper = Ragged(drafter)
    played(engine, 0, times=1)
    for number in range(4):
        prompt = [(3 * place + number // 2) % 11 for place in range(14 + number)]
        quiet = {"temperature": 0.8, "seed": number, "max_tokens": 40}
        engine.add(Request(f"parent {number}", prompt, SamplingParams(drafts=bool(number % 3), **quiet)))
        for _ in range(3):
            engine.step()
        parent = next((each for each in engine.memory.running if each.request.id == f"parent {number}"), None)
        if parent is None:  # it was preempted
            continue
        engine.fork(parent.request.id, Request(f"child {number}", list(parent.tokens), SamplingParams(**quiet)))
        engine.step()
        if parent.finish is None and number % 2:
            engine.truncate(parent.request.id, max(parent.prompt, len(parent.tokens) - 3))
            engine.feed(parent.request.id, [1, 2])
    while engine.busy:
        engine.step()
    engine.add(Request("cut back", [5, 3, 1], SamplingParams(temperature=0.8, max_tokens=80)))
    for _ in range(3):
        for _ in range(5):
            engine.step()
        # What there is besides is in the cache: the next step can draft at once.
        engine.truncate("cut back", len(engine.memory.running[0].tokens) - 1)
    while engine.busy:
        engine.step()
    now = engine.snapshot()
    assert now.preemptions, "nobody was preempted"
    places = sum(now.drafted_at)
    assert places > now.output_tokens / 4
    wrong = places - sum(now.accepted_at)
    assert not wrong, f"{wrong} of {places} tokens that a model drafted for itself were not its own"
    model = engine.steps.speculation and engine.steps.speculation.model
    if isinstance(model, CascadeDraft):
        # But for those who were preempted, cut back or fed meanwhile, and where the next step had no room.
        assert 3 * model.right > model.guessed, f"{model.right} of {model.guessed} guesses of its own text were right"
    return engine


def check_superposed(drafter: Drafter) -> None:
    """Asserts of one that superposes its drafts that what an engine drafts are those of the definition, computed anew
    from the whole text, and that its model makes a pass for each token ahead, of one row a sequence but for the text
    itself."""
    if not drafter.superposes:
        return
    model = draft_of(small_model())
    engine = engine_with(drafter, draft=model)
    speculation = engine.steps.speculation
    assert speculation is not None and isinstance(speculation.model, SuperposedModel)
    runner, draft, compared = speculation.model.runner, speculation.draft, 0
    execute, passes = runner.execute, list[list[np.ndarray]]()

    def counting(step: Step) -> Sampled | None:
        passes.append([part.inputs[0] for part in step.parts])
        return execute(step)

    def watching(batch: Batch) -> None:
        nonlocal compared
        asked = {entry.slot: entry.ahead for entry in batch.entries if entry.window[:1] == (AWAITED,)}
        passes.clear()
        draft(batch)
        # No token of any text, these are superposed; the first pass is of the texts.
        rows = [np.concatenate(parts) for parts in passes if any((part < 0).any() for part in parts)]
        assert len(rows) <= max(asked.values(), default=1) - 1, "there are more passes than tokens ahead"
        assert all(len(each) <= len(asked) and (each < 0).all() for each in rows), "there are more rows than texts"
        for entry in batch.entries:
            if entry.slot in asked:
                tree = entry.tree
                ways = {tuple(tree.tokens[node] for node in path(tree.parents, end)) for end in range(len(tree.tokens))}
                texts = superposed_texts(model, entry.sequence, asked[entry.slot], drafter.superposes)
                wanted = {text[:count] for text in texts for count in range(1, len(text) + 1)}
                assert ways == wanted, f"behind {entry.sequence.tokens} {ways} are drafted, not {wanted}"
                compared += 1

    vars(runner)["execute"], vars(speculation)["draft"] = counting, watching
    for number, kind in enumerate(SUPERPOSED):
        prompt = [(5 * place + number // 2) % 13 for place in range(10 + number)]
        options = {"temperature": 0, "max_tokens": 16, "seed": number, **kind}
        engine.add(Request(str(number), prompt, SamplingParams.model_validate(options)))
    while engine.busy:
        engine.step()
    assert compared > 40, f"drafts were compared {compared} times alone"


#: What requests ask for whose drafts are computed anew.
SUPERPOSED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_k": 9},
    {"stop_tokens": tuple(range(0, 50, 3)), "min_tokens": 9},
    {"frequency_penalty": 0.8, "repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "logit_bias": {3: 2.0, 4: -1.0}},
    {},
]


def superposed_texts(model: Decoder, sequence: EngineSequence, ahead: int, drafts: int) -> set[tuple[int, ...]]:
    """The texts that ``model`` drafts behind ``sequence``, up to ``ahead`` tokens each, by the definition and without a
    cache."""
    assert isinstance(sequence.draft, Superposing)
    sampling, text, rows = sequence.sampling, sequence.tokens, torch.zeros(ahead, SHAPE.hidden)
    going: dict[tuple[int, ...], float] = {(): 1.0}
    ended: list[tuple[int, ...]] = []
    for depth in range(ahead):
        scores = next_logits(PromptedDecoder(model, rows), [*text, *range(-1, -1 - depth, -1)])
        crossed: dict[tuple[int, ...], float] = {}
        for own, chance in going.items():
            known = charged(scores, sampling, [*text, *own], sequence.prompt)
            if len(text) + depth - sequence.prompt < sampling.min_tokens:
                known[list(sequence.stop)] = -torch.inf
            shares, tokens = (each.tolist() for each in known.softmax(-1).topk(drafts))
            for token, mixed in zip(tokens, sequence.draft.chances(list(own), tokens, shares), strict=True):
                crossed[*own, token] = chance * mixed
        best = sorted(crossed, key=lambda each: -crossed[each])[:drafts]
        ended += [each for each in best if each[-1] in sequence.stop]
        going = {each: crossed[each] for each in best if each not in ended}
        if not going:
            break
        for each, chance in going.items():
            rows[depth] += chance / sum(going.values()) * model.embedding.weight.detach()[each[-1]]
    return {*ended, *going}


def check_meanwhile(drafter: Drafter, tree: Sequence[int] = ()) -> Engine | None:
    """Asserts of a model that drafts on while its drafts are verified that it drafts what one does that waits, token
    for token and from the same distributions, and that some was drafted meanwhile. Returns its engine; None for
    others."""
    if not drafter.meanwhile:
        return None
    # Few tokens by a model that is mostly of the same mind, and room for whatever is drafted: many guesses are right.
    much: dict[str, Any] = {"cache_tokens": 2000, "tokens": 400, "draft": draft_of(small_model(), 0.05), "tree": tree}
    much |= {"controller": Fixed(length=2), "verifier": RecursiveDistinct() if tree else AcceptResidual()}
    engines = [engine_with(each, **much) for each in (drafter, Model(source="a model", tokens=drafter.most))]
    found, wanted = (_proposed(engine) for engine in engines)
    assert len(found) == len(wanted), "drafts are made in other steps"
    for (text, window, chances), (right_text, right_window, right) in zip(found, wanted, strict=True):
        assert text == right_text, "the text is another one"
        assert window == right_window, "what is drafted meanwhile is not what would be drafted"
        assert chances.shape == right.shape and torch.allclose(chances, right, atol=1e-4), "nor drawn from the same"
    drafting = engines[0].steps.speculation and engines[0].steps.speculation.model
    assert isinstance(drafting, CascadeDraft) and drafting.right, "nothing was drafted meanwhile"
    return engines[0]


def _proposed(engine: Engine) -> list[tuple[list[int], tuple[int, ...], Tensor]]:
    """The texts behind which ``engine`` drafts for requests of all kinds, what it drafts, and the distributions that it
    is drawn from, as far as they are told."""
    assert engine.steps.speculation is not None
    draft, seen = engine.steps.speculation.draft, list[tuple[list[int], tuple[int, ...], Tensor]]()

    def watching(batch: Batch) -> None:
        draft(batch)
        for entry in batch.entries:
            if entry.window:
                told = batch.proposals
                rows = [] if told is None else [row for row in told.rows[entry.slot].tolist() if row >= 0]
                chances = torch.empty(0) if told is None else told.chances[rows].clone()
                seen.append((list(entry.sequence.tokens), entry.window, chances))

    vars(engine.steps.speculation)["draft"] = watching
    played(engine, 0, times=1)
    return seen


class Ragged:
    """Shapes trees of all kinds, whatever is accepted: see :class:`~penstock.speculate.contract.Shaper`."""

    def __init__(self, drafter: Drafter) -> None:
        self._most, self._widths = drafter.most, drafter.widths
        self._draw = numpy_generator(0, "testing/drafter/ragged")

    def plan(self, ahead: int, seconds: Callable[[np.ndarray], np.ndarray]) -> None:
        """They cost what they may."""

    def shape(self, guessed: int) -> Tree:
        parents: list[int] = []
        level = [-1]
        for width in self._widths[:guessed]:
            first = len(parents)
            for node in level:
                # The first of them goes on in any case.
                parents += [node] * int(self._draw.integers(int(node == level[0]), min(width, 2) + 1))
            level = list(range(first, len(parents)))
        probes = self._draw.integers(0, self._most + 1, 1 + len(parents)).tolist()
        return Tree([AWAITED] * len(parents), parents, [max(1, probes[0]), *probes[1:]])

    def learn(self, shape: Tree, way: Sequence[int]) -> None:
        """Nothing."""


def _twins(drafter: Drafter) -> tuple[Decoder, Decoder | HeadModule]:
    """A model, and what drafts for it and is always right."""
    if drafter.head is None:
        return small_model(), small_model()
    if drafter.widths:
        # To a model for which all tokens are the same, a probe is the token in its place, if it sees those before it.
        return unseeing_model(), head_for(drafter, unseeing_model())
    # An exit behind all layers that has learnt nothing is the model itself.
    return small_model(), head_of(small_model(), EarlyExit(layers=SHAPE.layers))


@functools.cache
def unseeing_model() -> Decoder:
    """A small model whose text depends on nothing but where it is, and how far what it attends to goes back."""
    model = Decoder(SHAPE.model_copy(update={"learned_positions": True})).initialize(0).eval()
    with torch.no_grad():
        model.embedding.weight.zero_()
    return model


#: What requests ask for whose text goes round in circles.
CIRCLING: list[dict[str, Any]] = [
    {},
    {"frequency_penalty": 0.9, "logit_bias": {5: 6.0, 7: 5.5}},  # ends circles within what is drafted
    {"rule": Momentum(alpha=0.02)},
    {"rule": Momentum(alpha=0.1), "repetition_penalty": 1.05},
    {"rule": Momentum(alpha=0.3)},
]


@functools.cache
def circling_model() -> Decoder:
    """A small model that looks at little but the last token, so that its greedy text soon goes round in circles."""
    model = Decoder(SHAPE).initialize(0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.output.weight", "mlp.down.weight")):
                parameter.mul_(0.02)
    return model


def check_loops(drafter: Drafter) -> None:
    """Asserts the same where much is accepted at a time: prompts in the midst of a greedy circle, with an end within
    what may be drafted; and where most draft nothing, who go on before the tokens of the others are known."""
    wanted = plain_circles()
    for every in (1, 4):
        found = _circled(engine_with(drafter, circling_model()), every)
        assert found.keys() == wanted.keys()
        for name, text in wanted.items():
            assert found[name] == text, (
                f"drafts change a text that circles, {name}, where one of {every} is drafted for"
            )


@functools.cache
def plain_circles() -> dict[str, tuple[list[int], Finish | None]]:
    """What an engine says that drafts nothing."""
    return _circled(engine_with(None, circling_model()))


def _circled(engine: Engine, every: int = 1) -> dict[str, tuple[list[int], Finish | None]]:
    """How ``engine`` goes on with texts that circle, by their start and what is asked, and why it ends; for one of
    ``every`` so many it may draft."""
    for number, (name, (prompt, sampling)) in enumerate(circling().items()):
        drafts = sampling.drafts and number % every == 0
        engine.add(Request(name, prompt, sampling.model_copy(update={"drafts": drafts})))
    deltas: dict[tuple[str, int], list[Delta]] = {}
    while engine.busy:
        gather(engine, deltas)
    return {name: (tokens_of(own), own[-1].finish) for (name, _), own in deltas.items()}


@functools.cache
def circling() -> dict[str, tuple[list[int], SamplingParams]]:
    """Prompts in the midst of a circle, with each of the :data:`CIRCLING` kinds, some with an end nearby."""
    found = {}
    for start in range(6):
        text = [start, *greedy(circling_model(), [start], 70)]
        ahead = text[50:58]
        place = next((place for place in (3, 2, 1) if ahead[place] not in ahead[:place]), None)
        ends = (ahead[place],) if place is not None else ()
        for number, kind in enumerate(CIRCLING):
            options = {"temperature": 0, "max_tokens": 20, "stop_tokens": () if number % 2 else ends, **kind}
            found[f"{start} with {kind}"] = text[:50], SamplingParams.model_validate(options)
    return found
