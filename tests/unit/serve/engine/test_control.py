"""An engine that is paused, put to sleep and given other weights between steps: requests go on as if nothing had been,
or as an engine that had the weights from the start."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from penstock.core.errors import PenstockError, UsageError
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Delta, Finish, Request
from penstock.serve.run.runner import Runner
from penstock.testing.serve_model import SHAPE, draft_of, head_of

SIZES = {"tokens": 24, "sequences": 4, "block_size": 4, "cache_tokens": 160, "check": True}

#: What may hold something that was computed with the weights: the plain engine, one that drafts, one that keeps hidden
#: states for a head, tiers below the cache, a policy that compresses.
ENGINES = {
    "plain": {"loop": "plain"},
    "overlapped": {"loop": "overlapped"},
    "ngram": {"draft": {"name": "ngram", "shortest": 1}},
    "model": {"draft": "model"},
    "head": {"draft": "head"},
    "host": {"kv_host": 1 << 20, "cache_tokens": 48},
    "disk": {"kv_host": 1 << 20, "cache_tokens": 48, "kv_disk": "here"},
    "snapkv": {"kv": "snapkv"},
    "int8": {"codec": "int8"},
}

#: Those that have nothing that no other one has are for ``-m slow``.
KINDS = [
    pytest.param(kind, marks=pytest.mark.slow if kind in ("plain", "ngram", "host", "head") else ()) for kind in ENGINES
]


def model(seed: int) -> Decoder:
    return Decoder(SHAPE).initialize(seed).eval()


def open_engine(kind: str, folder, seed: int = 0, **more) -> Engine:
    options = {**SIZES, **ENGINES[kind], **more}
    if options.get("kv_disk"):
        options["kv_disk"] = folder / "kv"
    decoder, drafts, draft = model(seed), options.pop("draft", None), None
    if drafts in ("model", "head"):
        draft = draft_of(decoder) if drafts == "model" else head_of(decoder)
        options["draft"] = {"name": drafts, "source": "a"}
    elif drafts is not None:
        options["draft"] = drafts
    return build_engine(decoder, EngineConfig.model_validate(options), frozenset({7}), draft=draft)


def requests() -> list[Request]:
    draws = torch.Generator().manual_seed(1)
    prefix = torch.randint(50, (12,), generator=draws).tolist()
    found = []
    for number in range(5):
        prompt = prefix[: 3 * number] + torch.randint(50, (5,), generator=draws).tolist()
        asked = {"temperature": 0.7 if number % 2 else 0, "seed": number, "max_tokens": MOST, "n": 1 + (number == 3)}
        found.append(Request(str(number), prompt, SamplingParams.model_validate(asked)))
    return found


#: Tokens of each answer.
MOST = 10

Told = dict[tuple[str, int], list[int]]


def note(told: Told, deltas: list[Delta]) -> None:
    for delta in deltas:
        told.setdefault((delta.id, delta.index), []).extend(delta.tokens)


def finished(engine: Engine, told: Told | None = None) -> Told:
    found: Told = {} if told is None else told
    while engine.busy:
        note(found, engine.step())
    return found


def answers(engine: Engine) -> Told:
    for request in requests():
        engine.add(request)
    return finished(engine)


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        *(("pause", kind) for kind in ("plain", "overlapped", "model", "snapkv")),
        # What is computed again would be compressed by other queries.
        *(("sleep", kind) for kind in ENGINES if kind != "snapkv"),
    ],
)
def test_requests_go_on_with_the_same_tokens(kind, act, tmp_path):
    wanted = answers(open_engine(kind, tmp_path / "other"))
    engine, told = open_engine(kind, tmp_path), dict[tuple[str, int], list[int]]()
    late = requests()[-1]
    for request in requests()[:-1]:
        engine.add(request)
    for steps in (1, 3, 2):
        for _ in range(steps):
            note(told, engine.step())
        getattr(engine.control, act)()
        note(told, engine.step())  # what was under way
        assert not engine.busy
        assert engine.step() == []
        if late is not None:
            engine.add(late)  # waits too
            late = None
        getattr(engine.control, {"pause": "resume", "sleep": "wake"}[act])()
    assert finished(engine, told) == wanted
    assert engine.snapshot().held == 0
    if act == "sleep":
        assert engine.snapshot().version == 0


@pytest.mark.parametrize("kind", KINDS)
def test_after_other_weights_every_answer_is_a_fresh_engines(kind, tmp_path):
    engine, other = open_engine(kind, tmp_path), model(1)
    before = answers(engine)
    assert engine.control.load(other.state_dict()) == 1
    told = answers(engine)
    assert told == answers(open_engine(kind, tmp_path / "fresh", seed=1))
    assert told != before
    # And with the old ones again, also where a disk has blocks of both.
    assert engine.control.load(model(0).state_dict(), version=9) == 9
    assert answers(engine) == before


@pytest.mark.parametrize("act", ["sleep", "load"])
def test_who_loses_memory_to_sleep_or_other_weights_is_told_and_counted(act, tmp_path):
    """Between two times that one gets memory, it is said that it lost it, and why."""
    engine = open_engine("overlapped", tmp_path)
    for request in requests():
        engine.add(request)
    for _ in range(4):
        engine.step()
    running = {(each.request.id, each.index): each.computed for each in engine.memory.running}
    assert 0 < len(running) < 6  # some wait
    before = engine.snapshot().preemptions
    if act == "sleep":
        engine.control.sleep()
        engine.control.wake()
    else:
        engine.control.load(model(1).state_dict())
    assert engine.snapshot().preemptions == before + len(running)
    told = engine.events.fresh()
    lost = {(each.id, each.index): each.detail["computed"] for each in told if each.detail.get("why") == act}
    assert lost.keys() == running.keys() and all(lost[name] >= count for name, count in running.items())
    finished(engine)
    told += engine.events.fresh()
    for name in {(each.id, each.index) for each in told}:
        course = [each.kind for each in told if (each.id, each.index) == name]
        course = [kind for kind in course if kind in ("admitted", "preempted")]
        assert all(one != other for one, other in itertools.pairwise(course)), course
    assert engine.snapshot().preemptions == sum(each.kind == "preempted" for each in told)


@pytest.mark.parametrize("kind", ["overlapped", "model", "disk"])
def test_those_under_way_go_on_with_the_new_weights_behind_what_they_have(kind, tmp_path):
    engine, told = open_engine(kind, tmp_path), list[Delta]()
    for request in requests():
        engine.add(request)
    for _ in range(4):
        told += engine.step()
    engine.control.load(model(1).state_dict())
    while engine.busy:
        told += engine.step()
    assert {delta.version for delta in told} == {0, 1}
    fresh = open_engine(kind, tmp_path / "fresh", seed=1)
    for request, index in ((each, index) for each in requests() for index in range(each.sampling.n)):
        own = [delta for delta in told if (delta.id, delta.index) == (request.id, index)]
        old, new = ([token for each in own if each.version == version for token in each.tokens] for version in (0, 1))
        if new:
            given = {"seed": request.sampling.seed + index, "n": 1, "max_tokens": MOST - len(old)}
            sampling = request.sampling.model_copy(update=given)
            fresh.add(Request("again", request.prompt + old, sampling, given=len(request.prompt)))
            assert finished(fresh)["again", 0] == new


def test_weights_of_a_folder_and_sleep_after_them(tmp_path):
    other = model(1)
    hub.save(other, tmp_path / "other", family="llama")
    engine = open_engine("overlapped", tmp_path)
    engine.control.load(str(tmp_path / "other"))
    wanted = answers(open_engine("overlapped", tmp_path, seed=1))
    assert answers(engine) == wanted
    engine.control.sleep()
    assert all(parameter.numel() == 0 for parameter in runner(engine).model.parameters())  # they are read again
    assert runner(engine).cache.shape.blocks == 1
    engine.control.wake()
    assert answers(engine) == wanted


def runner(engine: Engine) -> Runner:
    assert isinstance(engine.executor, Runner)
    return engine.executor


def test_what_cannot_be_read_again_sleeps_on(tmp_path):
    folder = tmp_path / "other"
    hub.save(model(1), folder, family="llama")
    engine = open_engine("overlapped", tmp_path)
    engine.control.load(folder)
    engine.add(requests()[0])
    engine.control.sleep()
    (folder / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(PenstockError, match=r"model\.safetensors"):
        engine.control.wake()
    assert engine.control.asleep and not engine.busy
    (tmp_path / "away").rename(folder / "model.safetensors")
    engine.control.wake()
    fresh = open_engine("overlapped", tmp_path, seed=1)
    fresh.add(requests()[0])
    assert finished(engine) == finished(fresh)


def changed(**others: Tensor | None) -> dict[str, Tensor]:
    given = {**model(1).state_dict(), **{name.replace("__", "."): each for name, each in others.items()}}
    return {name: each for name, each in given.items() if each is not None}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (changed(norm__weight=torch.ones(33)), r"norm.weight as \[33\], and the engine's model as \[32\]"),
        (changed(head__weight=None, norm__weight=None), "lack head.weight, norm.weight"),
        (changed(layers__9__mlp__down__weight=torch.ones(2)), "also have layers.9.mlp.down.weight"),
        ({}, "lack embedding.weight"),
    ],
)
def test_other_weights_are_refused_and_nothing_changes(weights, message, tmp_path):
    engine = open_engine("overlapped", tmp_path)
    wanted = answers(open_engine("overlapped", tmp_path))
    for request in requests():
        engine.add(request)
    told: Told = {}
    note(told, engine.step())
    with pytest.raises(UsageError, match=message):
        engine.control.load(weights)
    assert finished(engine, told) == wanted
    assert engine.control.version == 0


def test_a_folder_of_another_model_is_refused(tmp_path):
    hub.save(Decoder(SHAPE.model_copy(update={"context": 128})).initialize(0), tmp_path / "other", family="llama")
    engine = open_engine("overlapped", tmp_path)
    with pytest.raises(PenstockError, match="they differ in context"):
        engine.control.load(tmp_path / "other")


def test_what_is_asked_of_an_engine_that_is_asleep(tmp_path):
    engine = open_engine("overlapped", tmp_path)
    engine.control.sleep()
    engine.control.sleep()
    with pytest.raises(UsageError, match="asleep"):
        engine.control.load(model(1).state_dict())
    engine.control.pause()
    engine.control.wake()
    engine.control.wake()
    engine.add(requests()[0])
    assert not engine.busy  # it is paused still
    engine.abort("0")
    assert [delta.finish for delta in engine.step()] == [Finish.ABORT]
    with pytest.raises(UsageError, match="from 0 on"):
        engine.control.load(model(1).state_dict(), version=-1)


def test_deadlines_pass_while_it_is_paused(tmp_path):
    engine = open_engine("overlapped", tmp_path)
    assert engine.requests.due is None
    engine.add(Request("a", [1, 2], SamplingParams(), deadline=0.0))
    engine.add(Request("b", [1, 2], SamplingParams(), deadline=1e6))
    engine.control.pause()
    assert engine.requests.due == 0.0
    assert [delta.finish for delta in engine.step()] == [Finish.DEADLINE]
    due = engine.requests.due
    assert due is not None and due > 1e5
    engine.abort("b")
    assert engine.requests.due is None


def test_weights_that_cannot_be_taken_are_not_even_read(tmp_path, monkeypatch):
    """What a model does not fit into memory with, is not read into memory to say so."""
    shape = SHAPE.model_copy(update={"layers": 5})  # two of them are in memory while they compute
    hub.save(Decoder(shape).initialize(0), tmp_path / "whole")
    with pytest.raises(UsageError, match="at least") as told:
        hub.load_streamed(tmp_path / "whole", 1, dtype=torch.float32)
    least = int(str(told.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    streamed = hub.load_streamed(tmp_path / "whole", least, dtype=torch.float32).eval()
    engine = build_engine(streamed, EngineConfig.model_validate(SIZES), frozenset({7}))
    before = answered(engine)
    monkeypatch.setattr(hub, "weights_for", lambda *given: pytest.fail("the weights were read"))
    for weights in (tmp_path / "whole", Decoder(shape).initialize(1).state_dict()):
        with pytest.raises(UsageError, match="without resident_weights"):
            engine.control.load(weights)
    engine.control.sleep()
    engine.control.wake()
    assert answered(engine) == before


def answered(engine: Engine) -> Told:
    told: Told = {}
    for request in requests():
        engine.add(request)
    while engine.busy:
        note(told, engine.step())
    return told


def test_an_engine_that_records_keeps_its_weights(tmp_path):
    engine = open_engine("overlapped", tmp_path, record=tmp_path / "steps")
    for act in (engine.control.sleep, lambda: engine.control.load(model(1).state_dict())):
        with pytest.raises(UsageError, match="records its steps"):
            act()
    engine.close()
