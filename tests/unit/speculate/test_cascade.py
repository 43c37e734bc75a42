"""A small model in memory and a large one on disk: what a step takes, what becomes of guesses, and what is refused."""

from __future__ import annotations

import itertools
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.core.errors import ConfigError
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.models.streamed import StreamedLayer, stream_of
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.serve.run.cascade import CascadeDraft
from penstock.speculate.contract import Drafter
from penstock.speculate.controllers.contract import Seen
from penstock.speculate.controllers.fallback import Fallback, SelfAdjusting
from penstock.speculate.drafters.cascade import Cascade
from penstock.speculate.drafters.model import Model
from penstock.testing.lanes import Lane, Lanes
from penstock.testing.reference import greedy
from penstock.testing.serve_model import SHAPE, draft_of, small_model

TALL = SHAPE.model_copy(update={"layers": 6, "init_std": 0.2})
#: How many tokens are drafted ahead.
AHEAD = 4
PROMPT = [3, 1, 4, 1, 5]


def on_disk(folder: Path) -> tuple[Decoder, Decoder]:
    """A model of which all layers stay on disk, and the same in memory."""
    whole = Decoder(TALL).initialize(0).eval()
    hub.save(whole, folder)
    layer = 4 * sum(each.numel() for each in whole.layers[0].parameters())
    others = 4 * whole.parameter_count() - TALL.layers * layer
    return hub.load_streamed(folder, others + 2 * layer + 1024).eval(), whole


def engine_for(target: Decoder, drafter: Drafter | None, draft: Decoder | None = None, **options: Any) -> Engine:
    sizes = {"tokens": 64, "sequences": 4, "block_size": 4, "cache_tokens": 400, "check": True, "loop": "plain"}
    config = EngineConfig.model_validate({"draft": drafter, "controller": "fixed", **sizes, **options})
    return build_engine(target, config, draft=draft)


def continued(engine: Engine, tokens: int = 40, prompt: list[int] = PROMPT) -> list[int]:
    engine.add(Request("0", prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)))
    found: list[int] = []
    while engine.busy:
        for delta in engine.step():
            found += delta.tokens
    return found


def drafting(engine: Engine) -> CascadeDraft:
    assert engine.steps.speculation is not None and isinstance(engine.steps.speculation.model, CascadeDraft)
    return engine.steps.speculation.model


def timed(engine: Engine, read: float, compute: float, draft: float) -> Lanes:
    """The times of ``engine`` from now on, whose target needs so long to ``read`` a layer and to ``compute`` it, and
    whose draft needs so long for a pass."""
    lanes, stream = Lanes(), stream_of(engine.executor.model)  # type: ignore[attr-defined]
    assert stream is not None and engine.steps.speculation is not None
    fill, hold, model = stream.fill, stream.hold, engine.steps.speculation.model
    passed = model._pass

    def reading(*args: Any) -> Any:
        lanes.spend(read)
        return fill(*args)

    def computing(layer: StreamedLayer) -> None:
        fresh = layer is not stream._held
        hold(layer)
        if fresh:
            lanes.spend(compute)

    def drafted(*args: Any) -> Any:
        lanes.spend(draft)
        return passed(*args)

    stream._lane, stream.fill, stream.hold = Lane(lanes, "reads"), reading, computing  # type: ignore[method-assign]
    model._pass, model.runner.onward = drafted, 0  # one by one
    if isinstance(model, CascadeDraft):
        model._lane = Lane(lanes, "drafts")
    return lanes


def steps(engine: Engine, lanes: Lanes) -> list[float]:
    """What each step takes in which a long text goes on whose drafts are all accepted."""
    engine.add(Request("0", PROMPT, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)))
    ends = []
    while engine.busy:
        told = sum(len(delta.tokens) for delta in engine.step())
        if told == AHEAD + 1:
            ends.append(lanes.now)
    return [after - before for before, after in itertools.pairwise(ends)]


@pytest.mark.parametrize(
    ("read", "compute", "draft"), [(3.0, 1.0, 0.5), (1.0, 2.0, 0.25), (1.0, 0.5, 4.0), (5.0, 0.0, 6.0)]
)
def test_a_step_takes_as_long_as_verifying_or_drafting_whichever_is_longer_and_not_both(tmp_path, read, compute, draft):
    for drafter, wanted in (
        # A token that the target is guessed to say, and those behind it.
        (Cascade(source="a model", tokens=AHEAD), max(TALL.layers * max(read, compute), (AHEAD + 1) * draft)),
        # While it drafts, the first layer is read.
        (
            Model(source="a model", tokens=AHEAD),
            AHEAD * draft + max(0, read - AHEAD * draft - compute) + (TALL.layers - 1) * max(read, compute) + compute,
        ),
    ):
        target, whole = on_disk(tmp_path / drafter.policy_name)
        engine = engine_for(target, drafter, whole)
        found = steps(engine, timed(engine, read, compute, draft))
        assert len(found) > 5
        assert found[2:-1] == pytest.approx([wanted] * (len(found) - 3))  # the first and the last are others


def test_greedy_text_is_the_large_models_own(tmp_path):
    target, whole = on_disk(tmp_path / "model")
    wanted = greedy(whole, PROMPT, 40)
    fallback, tree = {"controller": "fallback"}, {"draft_tree": "3,2"}
    for options in ({}, fallback, tree, {**fallback, **tree}):
        engine = engine_for(target, Cascade(source="a model", tokens=AHEAD), draft_of(whole, 0.03), **options)
        assert continued(engine) == wanted
        assert 0 < drafting(engine).right < drafting(engine).guessed


def test_guesses_are_right_where_the_models_agree_to_the_end_of_the_text():
    engine = engine_for(small_model(), Cascade(source="a model", tokens=AHEAD), small_model())
    assert continued(engine) == greedy(small_model(), PROMPT, 40)
    # The first of 40 tokens comes with the first drafts, and so many with each guess.
    assert drafting(engine).right == drafting(engine).guessed == 40 // (AHEAD + 1) - 1


class Later:
    """Does what it is given when somebody asks for the outcome, as a thread does that is slow."""

    def submit(self, work: Any, *args: Any) -> Any:
        outcome: Future[Any] = Future()

        def result() -> Any:
            outcome.set_result(work(*args))
            return Future.result(outcome)

        vars(outcome)["result"] = result
        return outcome


def test_drafting_behind_a_wrong_guess_ends_with_its_pass():
    other = Decoder(SHAPE).initialize(1).eval()
    engine = engine_for(small_model(), Cascade(source="a model"), other)
    model, passes = drafting(engine), list[str]()
    model._lane = Later()  # type: ignore[assignment]
    passed, go_on, running = model._pass, model._go_on, []

    def counted(*args: Any) -> Any:
        passes.append("meanwhile" if running else "in time")
        return passed(*args)

    def going(*args: Any) -> None:
        running.append(True)
        go_on(*args)
        running.clear()

    vars(model)["_pass"], vars(model)["_go_on"] = counted, going
    assert continued(engine, 20) == greedy(small_model(), PROMPT, 20)
    assert model.guessed > 5 and model.right == 0
    assert passes.count("meanwhile") <= model.guessed  # one, and none of those behind it
    assert passes.count("in time") > model.guessed


def test_what_goes_wrong_while_it_drafts_is_not_lost():
    engine = engine_for(small_model(), Cascade(source="a model"), draft_of(small_model()))

    def fails(*args: Any) -> None:
        raise RuntimeError("no more memory")

    vars(drafting(engine))["_go_on"] = fails
    with pytest.raises(RuntimeError, match="no more memory"):
        continued(engine)


def test_texts_come_to_the_end_of_both_contexts():
    short = SHAPE.model_copy(update={"context": 40})
    draft = Decoder(short).eval()
    draft.load_state_dict(small_model().state_dict())
    for tree in ("", "3,2"):
        engine = engine_for(small_model(), Cascade(source="a model"), draft, draft_tree=tree)
        room = SHAPE.context - len(PROMPT)
        assert continued(engine, room) == greedy(small_model(), PROMPT, room)


def test_drafts_are_made_while_layers_are_read(tmp_path):
    """With threads: reading waits for drafts that no step in turn would make before it has ended."""
    target, whole = on_disk(tmp_path / "model")
    engine = engine_for(target, Cascade(source="a model", tokens=AHEAD), whole)
    stream, model = stream_of(target), drafting(engine)
    assert stream is not None
    fill, waited = stream.fill, []

    def reading(number: int, buffer: torch.Tensor) -> Any:
        running = model._running
        if running is not None and number == TALL.layers - 1:
            running.result(timeout=60)
            waited.append(number)
        return fill(number, buffer)

    stream.fill = reading  # type: ignore[method-assign]
    assert continued(engine) == greedy(whole, PROMPT, 40)
    assert len(waited) >= model.right > 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"controller": "specdec_pp"}, "predicts for a model that waits"),
        ({"draft": "ngram", "controller": "fallback"}, "has no model"),
        ({"controller": {"name": "fallback", "first": 0.95}}, "must be from least"),
    ],
)
def test_what_does_not_go_together_is_refused(options, reason):
    with pytest.raises((ValueError, ConfigError), match=reason):
        EngineConfig.model_validate({"draft": {"name": "cascade", "source": "python-1m"}, **options})


def test_the_threshold_falls_where_all_is_accepted_and_rises_by_what_is_rejected():
    control = SelfAdjusting(Fallback(first=0.1, least=0.05, largest=0.3), 8)
    found = []
    for drafted, accepted in (((4,), (4,)), ((4,), (4,)), ((4, 4), (4, 0)), ((3,), (0,)), ((0,), (0,)), ((2,), (0,))):
        control.learn(Seen(len(drafted), 0, 8, drafted, accepted, 0.0, 1.0))
        found.append(control.threshold)
    # Halved; not below 0.05; half of it rejected; all of it; nothing drafted; not above 0.3.
    assert found == pytest.approx([0.05, 0.05, 0.05 * 2**0.5, 0.1 * 2**0.5, 0.1 * 2**0.5, 0.2 * 2**0.5])
    control.learn(Seen(1, 0, 8, (2,), (0,), 0.0, 1.0))
    assert control.threshold == 0.3
    assert control.goes_on([0.6, 0.5]) and not control.goes_on([0.6, 0.49])
