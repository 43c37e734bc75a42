"""A model that is divided among ranks says token for token what it says on one device."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

import gguf_files
from divided_ranks import FAMILIES, ending_all, example, together
from penstock.core.channel import Channel
from penstock.core.errors import ModelError, PenstockError, UsageError
from penstock.models import hub
from penstock.models.adapters import slots
from penstock.models.adapters.slots import matrices
from penstock.models.decoder import Decoder
from penstock.models.formats.schemes import SCHEMES
from penstock.models.quantized import QuantizedExperts, packed_layers
from penstock.models.shares import Share
from penstock.parallel.world import World
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.link import follower
from penstock.serve.link.follower import follow
from penstock.serve.messages import Request
from penstock.serve.opening import open_engine, open_share
from penstock.serve.ranks import group
from penstock.serve.ranks.group import RankLostError, Ranks
from penstock.serve.ranks.wire import body, parse
from penstock.testing.ranks import agreed, ranks
from penstock.testing.transformers_peer import peer, prompt, randomize
from quantized_folders import mixture, mxfp4
from served import Forked
from small_tokenizers import byte_level
from tiny_adapters import written

#: Norms over all heads, of which two ranks have the same; experts with biases; latents; a layout of its own.
DIFFERENT = ("minimax_m2", "gpt_oss", "deepseek_v3", "gpt2")

CONFIG = EngineConfig(tokens=8, sequences=2, block_size=4, cache_tokens=80, check=True)

#: For more requests at a time.
FOUR = CONFIG.model_copy(update={"sequences": 4})

#: Greedy, and drawn with everything that is kept of a sequence.
SAMPLINGS = (
    {"temperature": 0},
    {"temperature": 1.0, "seed": 7, "top_p": 0.9, "presence_penalty": 0.5, "logprobs": 2},
)


def said(engine: Engine, tokens: int) -> list[list[int]]:
    """What ``engine`` answers: so many ``tokens`` to each prompt."""
    answers: dict[str, list[int]] = {}
    for row, (given, sampling) in enumerate(zip(prompt(2, 6).tolist(), SAMPLINGS, strict=True)):
        params = SamplingParams.model_validate({**sampling, "max_tokens": tokens, "ignore_eos": True})
        engine.add(Request(str(row), given, params))
    while engine.busy:
        for delta in engine.step():
            answers.setdefault(delta.id, []).extend(delta.tokens)
    return [answers[row] for row in sorted(answers)]


def said_with(more: Path, engine: Engine, tokens: int) -> list[list[int]]:
    """What ``engine`` answers, which has the adapters ``a`` and ``b``: all in one batch, by the model alone too; then
    that of the folder ``more`` is loaded in the place of one of them, while a request with that is under way."""
    answers: dict[str, list[int]] = {}

    def add(row: int, adapter: str) -> None:
        params = SamplingParams.model_validate({**SAMPLINGS[row % 2], "max_tokens": tokens, "ignore_eos": True})
        engine.add(Request(str(row), prompt(2, 6).tolist()[0], params, adapter=adapter))

    def step() -> None:
        for delta in engine.step():
            answers.setdefault(delta.id, []).extend(delta.tokens)

    for row, adapter in enumerate(("", "", "a", "a", "b", "b")):
        add(row, adapter)
    step()
    engine.adapters.drop("a")
    engine.adapters.load("c", more)
    for row in (6, 7):
        add(row, "c")
    while engine.busy:
        step()
    return [answers[str(row)] for row in range(8)]


Saying = Callable[[Engine, int], list[list[int]]]


def check(
    size: int,
    folders: Mapping[str, Path],
    tokens: int,
    config: EngineConfig = CONFIG,
    adapters: Mapping[str, Mapping[str, Path]] = MappingProxyType({}),
) -> None:
    """Asserts that ``size`` ranks say of each model in ``folders`` what one device does; with its ``adapters`` a, b and
    c, where it has some."""

    def options(name: str) -> EngineConfig:
        own = {each: adapters[name][each] for each in ("a", "b")} if name in adapters else {}
        return config.model_copy(update={"adapters": own, "adapter_slots": 3 if own else 0})

    def saying(name: str) -> Saying:
        return functools.partial(said_with, adapters[name]["c"]) if name in adapters else said

    ends = [socket.socketpair() for _ in range(1, size)]
    cpu = torch.device("cpu")

    def work(world: World) -> dict[str, list[list[int]]]:
        torch.set_num_threads(1)
        share, answers = Share(world.rank, size), {}
        channels = [Channel(pair[min(world.rank, 1)], body, parse) for pair in ends]
        if world.rank:
            channels[world.rank - 1].listen()
        with ending_all(ends):
            for name, folder in folders.items():
                model = open_share(folder, config, cpu, share)
                if world.rank:
                    follow(model, options(name), channels[world.rank - 1], world)
                else:
                    others = Ranks(share, channels, world=world)
                    answers[name] = saying(name)(build_engine(model, options(name), ranks=others), tokens)
                    others.tell("leave")
                # What comes for the next model may not come to one who has not left this one yet.
                torch.distributed.barrier()
        return answers

    (together, *_) = agreed(size, work)
    for pair in ends:
        for end in pair:
            end.close()
    for name, folder in folders.items():
        alone = saying(name)(build_engine(hub.load_for_inference(folder).eval(), options(name)), tokens)
        assert together[name] == alone, f"{size} ranks say of {name} something else"


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family."""
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        hub.save(randomize(Decoder(example(name))), folder / name, family=name)
    return {name: folder / name for name in FAMILIES}


def test_two_ranks_say_of_every_family_what_one_device_does(families):
    check(2, families, tokens=1)


def test_four_ranks_say_of_different_families_what_one_device_does(families, tmp_path):
    """And of a model whose ranks all have the same head of keys and values, with its biases."""
    shape = example("qwen2").model_copy(update={"kv_heads": 1})
    assert shape.qkv_bias
    hub.save(randomize(Decoder(shape)), tmp_path / "one", family="qwen2")
    check(4, {name: families[name] for name in DIFFERENT} | {"one head": tmp_path / "one"}, tokens=1)


def test_two_ranks_check_what_is_drafted_over_a_coded_cache(families):
    drafting = EngineConfig.model_validate({**CONFIG.model_dump(), "draft": "ngram", "codec": "int8"})
    check(2, {"llama": families["llama"]}, tokens=12, config=drafting)


def test_two_ranks_say_of_quantized_models_what_one_device_does(tmp_path):
    """Matrices are divided along their groups and blocks, and stay as they are stored."""
    shape = example("llama").model_copy(update={"hidden": 64, "ffn": 128, "head_dim": 32})
    folders = {}
    for scheme in SCHEMES:
        folders[scheme] = tmp_path / scheme
        hub.save(randomize(Decoder(shape)), folders[scheme], scheme=scheme)
    gguf_files.write(tmp_path / "q8.gguf", peer("llama", **gguf_files.SHAPE), "llama", gguf_files.coded("Q8_0"))
    check(2, {**folders, "gguf": hub.resolve(tmp_path / "q8.gguf")}, tokens=2)


def test_two_ranks_say_of_quantized_mixtures_what_one_device_does(tmp_path):
    """Embeddings, with and without a head of their own, and experts in matrices of their own and in a stack."""
    folders = {
        "tied": mixture(tmp_path / "tied", "gptq", tied=True),
        "untied": mixture(tmp_path / "untied", "int8", tied=False),
        "stack": mxfp4(tmp_path / "stack", ffn=128),
    }
    check(2, folders, tokens=2)
    for name, folder in folders.items():
        whole, *shares = (hub.load_for_inference(folder, share=share) for share in (None, Share(0, 2), Share(1, 2)))
        bytes_of = [sum(each.nbytes for _, layer in packed_layers(one) for each in layer.buffers()) for one in shares]
        assert bytes_of[0] == bytes_of[1] and isinstance(shares[0].layers[0].mlp.down, QuantizedExperts), name
        matrices = sum(each.nbytes for _, layer in packed_layers(whole) for each in layer.buffers())
        assert matrices / 2 <= bytes_of[0] < 0.56 * matrices  # the scales of rows are with each part of their columns
        hub.check_divisible(folder, 2)


def test_what_is_stored_in_groups_that_cannot_be_divided_is_refused_before_it_is_loaded(tmp_path):
    odd, why = mxfp4(tmp_path / "odd"), r"down_proj cannot be divided among 2 ranks .*: 32 columns are stored together"
    for attempt in (lambda: hub.load_for_inference(odd, share=Share(0, 2)), lambda: hub.check_divisible(odd, 2)):
        with pytest.raises(UsageError, match=why) as refused:
            attempt()
    assert refused.value.hint == "Leave tensor_parallel out, or take a model that is not quantized."
    shape = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 512, "head_dim": 128}
    model = peer("llama", **{**gguf_files.SHAPE, **shape})
    gguf_files.write(tmp_path / "q4.gguf", model, "llama", gguf_files.coded("Q4_K"))
    with pytest.raises(UsageError, match=r"o_proj.* cannot be divided among 4 ranks .*: 256 columns") as refused:
        hub.check_divisible(tmp_path / "q4.gguf", 4)
    assert refused.value.hint.startswith("Set tensor_parallel to 2, or")
    hub.check_divisible(tmp_path / "q4.gguf", 2)
    # Of 96 columns three ranks have 32 each, but not of four heads.
    with pytest.raises(UsageError, match="among 4 ranks") as refused:
        hub.check_divisible(mxfp4(tmp_path / "three", ffn=96), 4)
    assert refused.value.hint.startswith("Leave tensor_parallel out")


def test_the_first_rank_starts_no_others_where_they_could_not_divide_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "start", lambda *_: pytest.fail("others are started"))
    with pytest.raises(UsageError, match="down_proj cannot be divided among 2 ranks"):
        open_engine(mxfp4(tmp_path / "odd"), EngineConfig(tensor_parallel=2), "cpu", tokenizer=byte_level())


@pytest.fixture(scope="module")
def adapters(families, tmp_path_factory) -> Callable[[str], dict[str, Path]]:
    """Three adapters of a family, of different ranks; the last one is on some of the matrices only."""
    folder = tmp_path_factory.mktemp("adapters")

    @functools.cache
    def of(name: str) -> dict[str, Path]:
        model = hub.load(families[name])
        names = list(matrices(model, hub.family_of(model)))
        kinds = {"a": (3, names), "b": (5, names), "c": (2, names[::3])}
        return {
            each: written(folder / name / each, model, seed, rank, own.__contains__)
            for seed, (each, (rank, own)) in enumerate(kinds.items())
        }

    return of


def test_two_ranks_compute_several_adapters_as_one_device_does(families, adapters):
    chosen = {name: families[name] for name in ("llama", "phi3", "gpt2", "deepseek_v3")}
    check(2, chosen, tokens=4, config=FOUR, adapters={name: adapters(name) for name in chosen})


def test_adapters_make_a_difference(families, adapters):
    """Without which the others would say nothing."""
    engine = build_engine(
        hub.load_for_inference(families["llama"]).eval(),
        FOUR.model_copy(update={"adapters": {each: adapters("llama")[each] for each in "ab"}, "adapter_slots": 3}),
    )
    plain, _, a, _, b, _, c, _ = said_with(adapters("llama")["c"], engine, 6)
    assert len({tuple(each) for each in (plain, a, b, c)}) == 4


def test_adapters_that_do_not_fit_change_nothing_on_any_rank(families, adapters):
    """What refuses is the first rank, before the others hear of it; they go on together."""

    class Told(Ranks):
        def tell(self, what, *arguments):
            pass

        def load_adapter(self, slot, folder, key):
            told.append(folder)

    told: list[Path] = []
    config = CONFIG.model_copy(update={"adapters": {"a": adapters("llama")["a"]}, "adapter_slots": 2})
    model = open_share(families["llama"], config, torch.device("cpu"), Share(0, 2))
    others = Told(Share(0, 2), [])
    others.ask_memory = lambda: None  # type: ignore[method-assign]
    engine = build_engine(model, config, ranks=others)
    assert len(told) == 1
    with pytest.raises(ModelError, match="another base"):
        engine.adapters.load("b", adapters("gpt2")["b"])
    with pytest.raises(UsageError, match="has the rank 5, and there is room for 3"):
        engine.adapters.load("b", adapters("llama")["b"])
    engine.adapters.load("c", adapters("llama")["c"])
    assert told == [adapters("llama")["a"], adapters("llama")["c"]]


def test_all_ranks_have_read_an_adapter_before_it_is_there(families, adapters, tmp_path):
    """The next one may lie in its folder by then."""
    folder, config = tmp_path / "adapter", CONFIG.model_copy(update={"adapter_slots": 1, "adapter_rank": 5})

    def answer(engine: Engine) -> list[list[int]]:
        shutil.copytree(adapters("llama")["a"], folder, dirs_exist_ok=True)
        engine.add(Request("before", prompt(1, 6).tolist()[0], SamplingParams(temperature=0, max_tokens=9)))
        engine.step()
        engine.adapters.load("a", folder)
        shutil.copytree(adapters("llama")["b"], folder, dirs_exist_ok=True)
        engine.add(Request("behind", prompt(1, 6).tolist()[0], SamplingParams(temperature=0), adapter="a"))
        answers: dict[str, list[int]] = {}
        while engine.busy:
            for delta in engine.step():
                answers.setdefault(delta.id, []).extend(delta.tokens)
        return [answers["before"], answers["behind"]]

    alone = answer(build_engine(hub.load_for_inference(families["llama"]).eval(), config))
    assert together(2, families["llama"], config, answer)[0]["returned"] == alone


def test_ranks_go_on_where_one_has_not_read_an_adapter_as_the_first_has(families, adapters, monkeypatch):
    folder, read = adapters("llama")["a"], slots.read

    def load(engine: Engine) -> list[str]:
        told = []
        for _ in range(3):
            try:
                engine.adapters.load("a", folder)
            except PenstockError as error:
                told.append(str(error))
        engine.add(Request("", [1, 2], SamplingParams(temperature=0, max_tokens=3), adapter="a"))
        while engine.busy:
            engine.step()
        return told

    def change(rank: int, model: Decoder) -> None:
        def reading(place: Path, *more):
            if not missed:
                return read(place, *more)
            missed.pop()
            if not missed:
                raise ModelError("it is not there")
            return read(adapters("llama")["b"], *more)

        missed = [1, 2] if rank == 1 else []
        monkeypatch.setattr(slots, "read", reading)

    config = CONFIG.model_copy(update={"adapter_slots": 1, "adapter_rank": 5})
    adapters("llama")  # are written before ranks are forked
    found, *_ = together(4, families["llama"], config, load, change)
    changed, missing = found["returned"]
    assert "has changed while ranks read it: rank 1 has another one" in changed and missing == "rank 1: it is not there"


def failing(model: Decoder, error: Exception, calls: int) -> None:
    """Makes the last feed-forward block of ``model`` raise ``error`` at so many ``calls``, between two exchanges."""

    def fail(*_: object) -> None:
        nonlocal calls
        calls -= 1
        if not calls:
            raise error

    list(model.layers)[-1].mlp.register_forward_pre_hook(fail)


@pytest.mark.parametrize(
    ("size", "rank", "error", "reason"),
    [
        (2, 0, ValueError("a bad shape"), "rank 0: ValueError('a bad shape')"),
        (2, 1, ValueError("a bad shape"), "rank 1: ValueError('a bad shape')"),
        (4, 2, torch.OutOfMemoryError("nothing left"), "rank 2: the device has too little memory"),
    ],
)
def test_a_rank_that_fails_in_a_step_ends_all_and_is_named(families, size, rank, error, reason):
    """The others wait for it in an exchange: the first rank says whose fault it was, now and if it is asked again."""
    ends = [socket.socketpair() for _ in range(1, size)]

    def work(world: World) -> list[str]:
        torch.set_num_threads(1)
        share = Share(world.rank, size)
        model = open_share(families["llama"], CONFIG, torch.device("cpu"), share)
        if world.rank == rank:
            failing(model, error, calls=3)
        channels = [Channel(pair[min(world.rank, 1)], body, parse) for pair in ends]
        if world.rank:
            channels[world.rank - 1].listen()
            with world.together(print):
                follow(model, CONFIG, channels[world.rank - 1], world)
        engine = build_engine(model, CONFIG, ranks=Ranks(share, channels, world=world))
        told = []
        for act in (lambda: said(engine, 8), engine.step):
            with pytest.raises(RankLostError) as lost:
                act()
            told.append(str(lost.value))
        engine.close()  # quietly: why it ended was said
        return told

    results = ranks(size, work)  # waits until all have ended
    for end in (end for pair in ends for end in pair):
        end.close()
    first, *later = results[0]["returned"]
    assert first.startswith(reason)
    assert {*later} == {first}
    assert results[1:] == [{}] * (size - 1), "the others end themselves"


def test_a_rank_that_is_stopped_stays_no_longer_than_the_others(monkeypatch):
    monkeypatch.setattr(group, "LAST", 0.1)
    stopped, other = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    os.kill(stopped.pid, signal.SIGSTOP)
    other.terminate()
    Ranks(Share(0, 3), [], [other, stopped]).bury()
    assert (stopped.poll(), other.poll()) == (-signal.SIGKILL, -signal.SIGTERM)
    monkeypatch.setattr(group, "LAST", 1.0)
    stopped, ending = [subprocess.Popen(["sleep", "60"]) for _ in range(3)], subprocess.Popen(["sleep", "0.3"])
    for each in stopped:
        os.kill(each.pid, signal.SIGSTOP)
    begun = time.monotonic()
    Ranks(Share(0, 5), [], [ending, *stopped]).bury()
    assert ending.poll() == 0 and time.monotonic() - begun < 2.5


def test_a_rank_that_cannot_be_opened_says_why(families, monkeypatch):
    def fails(*_: object) -> None:
        raise ValueError("nobody foresaw it")

    monkeypatch.setattr(follower, "open_share", fails)
    monkeypatch.setattr(group, "start", functools.partial(Forked, follower.main, False))
    others = Ranks.start(2, str(families["llama"]), CONFIG.model_dump_json(), torch.device("cpu"))
    (process,) = others._processes
    with pytest.raises(PenstockError, match=r"rank 1: ValueError\('nobody foresaw it'\)"):
        others.meet()
    others.close()
    assert process.wait(0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_compute_adapters_of_every_family(families, adapters, size):
    check(size, families, tokens=6, config=FOUR, adapters={name: adapters(name) for name in families})


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_say_longer_texts_of_every_family(families, size):
    check(size, families, tokens=8)
