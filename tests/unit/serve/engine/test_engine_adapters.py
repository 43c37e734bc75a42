"""An engine with adapters answers each request as an engine of the merged model alone does, whoever else is in the
batch, and whatever becomes of requests and adapters meanwhile."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from penstock.core.config import build
from penstock.core.errors import ConfigError, UsageError
from penstock.models import hub
from penstock.models.adapters import peft
from penstock.models.config import MoEConfig
from penstock.models.decoder import Decoder
from penstock.models.heads.eagle import Eagle
from penstock.models.heads.early_exit import EarlyExit
from penstock.models.heads.hidden_transfer import HiddenTransfer
from penstock.models.heads.ppd import ParallelPrompts
from penstock.serve.batching.sarathi import Sarathi
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.decode.roster import Roster
from penstock.serve.decode.uscd import UncertaintyAwareContrast
from penstock.serve.engine.adapters import Adapter
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.memory.memory import Memory
from penstock.serve.engine.sequence import Sequence
from penstock.serve.messages import Finish, Request
from penstock.testing.alike import alike
from penstock.testing.engine.accounts import Name
from penstock.testing.engine.crowds import crowd
from penstock.testing.engine.machine import EngineMachine, machine_of
from penstock.testing.serve_model import draft_of, head_of, small_model
from tiny_adapters import written

SIZES = {"tokens": 24, "sequences": 4, "block_size": 4, "cache_tokens": 160, "check": True}

#: What may hold something that an adapter has a part in: overlapped steps, parts of a step, drafts of the model alone
#: or of heads on its layers or its hidden states, tiers below the cache, a policy that compresses, a codec.
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {"loop": "plain"},
    "overlapped": {"loop": "overlapped"},
    "nanoflow": {"batching": "nanoflow"},
    "ngram": {"draft": {"name": "ngram", "shortest": 1}},
    "model": {"draft": "model"},
    "tree": {"draft": "model", "draft_tree": (2, 2)},
    "head": {"draft": "head"},
    "transfer": {"draft": "transfer"},
    "eagle": {"draft": "eagle"},
    "ppd": {"draft": "ppd"},
    "host": {"kv_host": 1 << 20, "cache_tokens": 48},
    "disk": {"kv_host": 1 << 20, "cache_tokens": 48, "kv_disk": "here"},
    "snapkv": {"kv": "snapkv"},
    "int8": {"codec": "int8"},
}

HEADS = {
    "head": EarlyExit(layers=1),
    "transfer": HiddenTransfer(left=1, tokens=2),
    "eagle": Eagle(),
    "ppd": ParallelPrompts(),
}

#: Those that have nothing that no other one has are for ``-m slow``.
KINDS = [
    pytest.param(kind, marks=() if kind in ("overlapped", "tree", "disk") else pytest.mark.slow) for kind in ENGINES
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Adapters of the small model, of different ranks and matrices."""
    root = tmp_path_factory.mktemp("adapters")
    hub.save(small_model(), root / "base")
    base = {"base_model_name_or_path": str(root / "base")}
    model = hub.load(root / "base")
    return {
        "a": written(root / "a", model, 0, rank=2, **base),
        "b": written(root / "b", model, 1, rank=4, **base),
        "c": written(root / "c", model, 2, rank=3, wanted=lambda name: "q_proj" in name or "down" in name, **base),
    }


@pytest.fixture(scope="module")
def merged(folders) -> dict[str, Decoder]:
    """What requests of each name are answered by, without any for the empty one."""
    return {"": small_model()} | {name: hub.load(hub.resolve(folder)).eval() for name, folder in folders.items()}


def test_adapters_that_are_there_from_the_start_are_read_once(folders, tmp_path, monkeypatch):
    opened, read = [], peft.read
    monkeypatch.setattr(peft, "read", lambda folder: (opened.append(folder), read(folder))[1])
    engine = open_engine("plain", small_model(), tmp_path, adapters={"a": folders["a"], "b": folders["b"]})
    assert sorted(opened) == sorted([folders["a"], folders["b"]])
    engine.adapters.drop("a")
    engine.adapters.load("a", folders["a"])  # which may have changed meanwhile
    assert len(opened) == 3
    # The same under other names, in another order.
    other = open_engine("plain", small_model(), tmp_path, adapters={"c": folders["a"], "d": folders["b"]})
    first, second = other.snapshot().adapter_keys
    assert first != second and engine.snapshot().adapters == ("b", "a")
    assert engine.snapshot().adapter_keys == (second, first)


def open_engine(kind: str, model: Decoder, place: Path, **more) -> Engine:
    options = {**SIZES, **ENGINES[kind], **more}
    if options.get("kv_disk"):
        options["kv_disk"] = place / "kv"
    drafts, draft = options.pop("draft", None), None
    if isinstance(drafts, str) and drafts in HEADS:
        draft = head_of(model, HEADS[drafts])
        options["draft"] = {"name": HEADS[drafts].drafter, "source": "a"}
    elif drafts == "model":
        draft, options["draft"] = draft_of(small_model()), {"name": "model", "source": "a"}
    elif drafts is not None:
        options["draft"] = drafts
    # Hooks stay with a model, and this one is shared.
    return build_engine(copy.deepcopy(model), build(EngineConfig, options), frozenset({7}), draft=draft)


def requests(*names: str) -> list[Request]:
    """Some of each of the ``names`` in turn, most of which begin alike."""
    draws = torch.Generator().manual_seed(1)
    prefix, found = torch.randint(50, (12,), generator=draws).tolist(), []
    for number in range(9):
        prompt = prefix[: 4 * (number % 4)] + torch.randint(50, (5,), generator=draws).tolist()
        asked: dict[str, Any] = {"temperature": 0.7 if number % 2 else 0, "seed": number, "max_tokens": 10}
        asked |= {"prompt_logprobs": 0 if number == 4 else None, "n": 2 if number == 3 else 1}
        if number == 5:
            asked["rule"] = UncertaintyAwareContrast(prompt=(*prefix[:6], 3))
        name = names[number % len(names)]
        found.append(Request(str(number), prompt, SamplingParams.model_validate(asked), adapter=name))
    return found


def test_tokens_that_other_experts_compute_again_have_the_adapter_too(tmp_path):
    """Of a model with experts, whose attention has adapters."""
    sparse = Decoder(small_model().config.model_copy(update={"moe": MoEConfig(experts=4, ffn=24)})).initialize(0).eval()
    hub.save(sparse, tmp_path / "base")
    base = {"base_model_name_or_path": str(tmp_path / "base")}
    folders = {name: written(tmp_path / name, sparse, seed, **base) for seed, name in enumerate("ab")}
    rule = SamplingParams(temperature=0, max_tokens=8, rule=Roster(copies=3, noise=0.7))
    prompts = {"a": [3, 4, 5, 6], "b": [9, 8, 7], "": [3, 4, 5]}
    engine = open_engine("plain", sparse, tmp_path, adapters=folders)
    told = answers(engine, [Request(name, prompt, rule, adapter=name) for name, prompt in prompts.items()])
    for name, prompt in prompts.items():
        alone = hub.load(hub.resolve(folders[name])).eval() if name else sparse
        assert told[name, 0] == answers(open_engine("plain", alone, tmp_path), [Request(name, prompt, rule)])[name, 0]


Told = dict[tuple[str, int], tuple[list[int], list[float]]]


def answers(engine: Engine, asked: list[Request]) -> Told:
    for request in asked:
        engine.add(request)
    return finished(engine)


def finished(engine: Engine, told: Told | None = None) -> Told:
    told = {} if told is None else told
    while engine.busy:
        for delta in engine.step():
            tokens, rated = told.setdefault((delta.id, delta.index), ([], []))
            tokens += delta.tokens
            rated += [round(each.logprob, 4) for each in delta.prompt_logprobs or []]
    assert engine.snapshot().held == 0
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_each_request_of_a_batch_is_answered_as_by_the_merged_model_alone(kind, folders, merged, tmp_path):
    names = ("", "a", "b", "c") if kind != "snapkv" else ("", "a")
    engine = open_engine(kind, small_model(), tmp_path, adapters=folders)
    asked, wanted = requests(*names), {}
    for name in names:
        own = [Request(each.id, each.prompt, each.sampling) for each in asked if each.adapter == name]
        wanted |= answers(open_engine(kind, merged[name], tmp_path / f"m{name}"), own)
    told = answers(engine, asked)
    assert told == wanted
    assert wanted[("1", 0)] != answers(open_engine(kind, small_model(), tmp_path / "base"), asked_base(asked))[("1", 0)]
    # Once more, with what is found in the cache, in another order.
    for request in asked[::-1]:
        engine.add(request)
    assert {id: tokens for id, (tokens, _) in finished(engine).items()} == {id: each[0] for id, each in wanted.items()}


def asked_base(asked: list[Request]) -> list[Request]:
    return [Request(each.id, each.prompt, each.sampling) for each in asked]


def test_requests_without_adapters_have_the_bits_that_they_have_elsewhere(folders, tmp_path):
    asked = [
        Request(str(number), list(range(number, number + 9)), SamplingParams(temperature=0, max_tokens=8, logprobs=3))
        for number in range(3)
    ]

    def told(engine: Engine) -> list:
        for request in asked:
            engine.add(request)
        return [
            (each.token, each.logprob)
            for _ in iter(lambda: engine.busy, False)
            for delta in engine.step()
            for each in delta.logprobs or []
        ]

    plain = told(open_engine("plain", small_model(), tmp_path))
    assert len(plain) == 24
    engine = open_engine("plain", small_model(), tmp_path, adapters=folders)
    assert told(engine) == plain
    answers(engine, requests("a", "b"))
    for name in folders:
        engine.adapters.drop(name)
    engine.memory.pool.forget()
    assert told(engine) == plain


def text(engine: Engine, name: str, id: str = "text") -> int:
    """How many tokens of a long prompt are found in the cache."""
    engine.add(Request(id, list(range(2, 22)), SamplingParams(max_tokens=1), adapter=name))
    found = 0
    while engine.busy:
        found += sum(delta.cached for delta in engine.step() if delta.finish)
    return found


def test_prefixes_are_found_by_those_who_have_the_same_adapter(folders, tmp_path):
    engine = open_engine("plain", small_model(), tmp_path, adapters=folders)
    for name in ("", "a", "b"):
        assert text(engine, name) == 0
        assert text(engine, name) == 16
    engine.adapters.drop("a")
    engine.adapters.load("again", folders["a"])
    assert text(engine, "again") == 16, "the same adapter by another name"
    engine.adapters.drop("b")
    engine.adapters.load("b", folders["a"])
    assert text(engine, "b") == 16
    engine.adapters.drop("c")
    written(tmp_path / "new", small_model(), 9, rank=2)
    engine.adapters.load("c", tmp_path / "new")
    assert text(engine, "c") == 0


def test_what_is_cut_back_stays_among_the_prefixes_of_its_adapter():
    """Also of one whose blocks another has put there, who computed the same at the same time."""
    memory, tokens, adapter = Memory(4, 40, 4, 64), list(range(13)), Adapter("a", 1, b"a")
    twins = [
        Sequence(Request(id, tokens, SamplingParams()), 0, SamplingParams(), list(tokens), 40, 0, adapter=adapter)
        for id in ("one", "other")
    ]
    for each in twins:
        assert memory.admit(each)
    for each in twins:
        memory.reserve([(each, 13)])
        memory.advance(each, 13)
    for each in twins:
        memory.commit(each)
    memory.truncate(twins[1], 5)
    memory.reserve([(twins[1], 8)])
    memory.advance(twins[1], 8)
    memory.commit(twins[1])
    memory.check()
    assert memory.pool.match(tokens, 12) == []
    assert memory.pool.match(tokens, 12, memory.pool.root(b"a")) == twins[0].held.blocks[:3]


def test_a_restart_finds_the_prefixes_of_each_adapter_on_disk(folders, merged, tmp_path):
    asked = requests("", "a", "b")
    for turn in range(2):
        # Other slots than before.
        order = dict(sorted(folders.items(), reverse=bool(turn)))
        engine = open_engine("disk", small_model(), tmp_path, adapters=order)
        told = answers(engine, asked)
        engine.close()
    assert engine.snapshot().tier_hits[1] > 0
    assert told == answers(open_engine("plain", small_model(), tmp_path, adapters=folders), asked)


def test_those_under_way_with_a_dropped_adapter_go_on_with_it(folders, merged, tmp_path):
    engine = open_engine("overlapped", small_model(), tmp_path, adapters={"a": folders["a"], "b": folders["b"]})
    request = Request("old", [3, 4, 5], SamplingParams(temperature=0, max_tokens=20), adapter="a")
    wanted = answers(open_engine("plain", merged["a"], tmp_path), asked_base([request]))
    engine.add(request)
    told: Told = {}
    for _ in range(4):
        for delta in engine.step():
            told.setdefault((delta.id, delta.index), ([], []))[0].extend(delta.tokens)
    engine.adapters.drop("a")
    assert engine.adapters.names == engine.snapshot().adapters == ("b",)
    with pytest.raises(UsageError, match="there is no adapter 'a' here"):
        engine.add(Request("new", [1], SamplingParams(), adapter="a"))
    with pytest.raises(UsageError, match="all 2 slots for adapters are in use"):
        engine.adapters.load("c", folders["c"])
    assert finished(engine, told) == wanted
    engine.adapters.load("c", folders["c"])
    assert answers(engine, requests("c")) == answers(open_engine("plain", merged["c"], tmp_path), requests(""))


def test_aborting_frees_the_slot(folders, tmp_path):
    engine = open_engine("overlapped", small_model(), tmp_path, adapters={"a": folders["a"]}, adapter_rank=4)
    engine.add(Request("one", [3, 4, 5], SamplingParams(max_tokens=40), adapter="a", keep=True))
    engine.step(), engine.step()
    engine.adapters.drop("a")
    engine.abort("one")
    with pytest.raises(UsageError, match="slots for adapters are in use"):
        engine.adapters.load("b", folders["b"])  # it was kept, and others may go on from it
    engine.forget("one")
    finished(engine)
    engine.adapters.load("b", folders["b"])


def test_forks_have_the_adapter_of_their_parent(folders, merged, tmp_path):
    engine = open_engine("overlapped", small_model(), tmp_path, adapters=folders)
    engine.add(Request("parent", [3, 4, 5, 6], SamplingParams(temperature=0, max_tokens=20), adapter="b"))
    told: list[int] = []
    while len(told) < 6:
        told += [token for delta in engine.step() for token in delta.tokens]
    prompt = [3, 4, 5, 6, *told[:5]]
    sampling = SamplingParams(temperature=0, max_tokens=8)
    for other in ("", "a"):
        with pytest.raises(UsageError, match="has another"):
            engine.fork("parent", Request("child", prompt, sampling, adapter=other))
    engine.adapters.drop("b")
    engine.fork("parent", Request("child", prompt, sampling, adapter="b"))
    found = finished(engine)[("child", 0)][0]
    alone = open_engine("plain", merged["b"], tmp_path)
    assert found == answers(alone, [Request("child", prompt, sampling)])[("child", 0)][0]


def test_adapters_stay_where_the_weights_change_and_through_sleep(folders, tmp_path):
    other = Decoder(small_model().config).initialize(1).eval()
    engine = open_engine("overlapped", small_model(), tmp_path, adapters=folders)
    fresh = open_engine("overlapped", other, tmp_path, adapters=folders)
    answers(engine, requests("", "a", "b"))
    engine.control.load(other.state_dict())
    engine.control.sleep()
    engine.control.wake()
    assert answers(engine, requests("", "a", "b")) == answers(fresh, requests("", "a", "b"))


def test_what_cannot_be_loaded_is_refused_and_changes_nothing(folders, tmp_path):
    engine = open_engine("plain", small_model(), tmp_path, adapters={"a": folders["a"]}, adapter_slots=2)
    for name, folder, why in (
        ("a", folders["b"], "there is an adapter 'a' already"),
        ("", folders["b"], "is no name for an adapter"),
        ("b", tmp_path, "there is no adapter in"),
        ("b", folders["b"], "has the rank 4, and there is room for 2"),
    ):
        with pytest.raises(UsageError, match=why):
            engine.adapters.load(name, folder)
    with pytest.raises(UsageError, match="there is no adapter 'q'"):
        engine.adapters.drop("q")
    with pytest.raises(UsageError, match="the model itself is no adapter"):
        engine.adapters.drop("")
    assert engine.adapters.names == ("a",)
    with pytest.raises(UsageError, match="no slots for adapters"):
        open_engine("plain", small_model(), tmp_path).adapters.load("a", folders["a"])
    room = open_engine("plain", small_model(), tmp_path, adapter_slots=1)
    room.adapters.load("c", folders["c"])
    assert room.executor.memory["adapters"] > 0


@pytest.mark.parametrize("option", [{"deterministic": True}, {"record": "steps"}])
def test_options_that_do_not_go_with_adapters_say_so(option):
    with pytest.raises(ConfigError, match="adapters"):
        build(EngineConfig, {"adapter_slots": 1, **option})


class AdaptedMachine(EngineMachine):
    """Requests have adapters, which are dropped and loaded meanwhile."""

    merged: dict[str, Decoder]

    def _asked(self, request: Request, of: Name | None) -> tuple[Request, Decoder]:
        if of is not None:
            name = self.accounts[of].request.adapter
        else:
            names = ("", *self.engine.adapters.names)
            name = names[int(request.id) % len(names)]
        return Request(**{**vars(request), "adapter": name}), self.merged[name]

    @rule(name=st.sampled_from(["a", "b", "c"]))
    def drop_or_load(self, name: str) -> None:
        if name in self.engine.adapters.names:
            self.engine.adapters.drop(name)
            return
        used = self.engine.requests.adapters()
        slots = {each.slot for each in used} | {self.engine.adapters.named(n).slot for n in self.engine.adapters.names}
        try:
            self.engine.adapters.load(name, self.options["adapters"][name])
        except UsageError:
            assert len(slots - {0}) == 4, "there was a slot"


@pytest.fixture(scope="module")
def machine(folders, merged) -> type[EngineMachine]:
    fields = {"models": (copy.deepcopy(small_model()), draft_of(small_model())), "merged": merged}
    fields["options"] = {"adapters": folders, "adapter_slots": 4}
    plain = machine_of(Sarathi())
    own = {name: getattr(plain, name) for name in ("batching", "loops", "drafts", "evictions")}
    return type("SarathiAdaptedMachine", (AdaptedMachine,), {**own, **fields})


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_the_law_of_batching_holds_in_a_crowd_with_adapters(machine, seed):
    crowd(machine(), seed)


@pytest.mark.slow
def test_the_law_of_batching_holds_with_adapters(machine):
    run_state_machine_as_test(machine, settings=alike(20, stateful_step_count=20))


def test_a_request_that_runs_out_of_time_frees_its_adapter(folders, tmp_path):
    engine = open_engine("plain", small_model(), tmp_path, adapters={"a": folders["a"]}, adapter_rank=4)
    engine.add(Request("late", [3, 4], SamplingParams(max_tokens=40), adapter="a", deadline=0.0))
    assert [delta.finish for delta in engine.step()] == [Finish.DEADLINE]
    engine.adapters.drop("a")
    engine.adapters.load("b", folders["b"])
