"""A model whose layers are divided among ranks says token for token what it says on one device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from divided_ranks import example, together
from penstock.core.config import build
from penstock.core.errors import ConfigError, UsageError
from penstock.models import hub
from penstock.models.decoder import Decoder, Layer
from penstock.models.quantized import packed_layers
from penstock.models.shares import Share
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request
from penstock.serve.opening import open_engine, open_share
from penstock.serve.ranks.group import RankLostError
from penstock.serve.ranks.stages import stages
from penstock.testing.transformers_peer import prompt, randomize
from quantized_folders import mixture

CONFIG = EngineConfig(tokens=12, sequences=4, block_size=4, cache_tokens=40, check=True)

#: Greedy; drawn, with everything that is kept of a sequence; and with log-probabilities of the prompt.
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0, "seed": 7, "top_p": 0.9, "presence_penalty": 0.5, "logprobs": 2},
    {"temperature": 0.7, "seed": 3, "prompt_logprobs": 1},
)

#: A tied head with scaled embeddings; experts with biases; latents; learned positions.
FAMILIES = ("gemma2", "gpt_oss", "deepseek_v3", "gpt2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of a family."""
    root = tmp_path_factory.mktemp("stages")

    def of(name: str) -> Path:
        if not (root / name).exists():
            hub.save(randomize(Decoder(example(name))), root / name, family=name)
        return root / name

    return of


def said(engine: Engine, count: int = 3, tokens: int = 5) -> list[list[int]]:
    """What ``engine`` answers to so many prompts."""
    answers: dict[str, list[int]] = {}
    for row, given in enumerate(prompt(count, 6).tolist()):
        params = {**SAMPLINGS[row % len(SAMPLINGS)], "max_tokens": tokens, "ignore_eos": True}
        engine.add(Request(str(row), given, SamplingParams.model_validate(params)))
    while engine.busy:
        for delta in engine.step():
            answers.setdefault(delta.id, []).extend(delta.tokens)
    return [answers[row] for row in sorted(answers)]


def told_in_a_crowd(engine: Engine) -> dict[str, Any]:
    """What ``engine`` answers to more requests than it has blocks for, half of which begin alike; some are ended after
    their second token. And what became of the cache."""
    answers: dict[str, list[int]] = {}
    for row, given in enumerate(prompt(8, 11).tolist()):
        shared = prompt(1, 9).tolist()[0] if row % 2 else []
        params = {**SAMPLINGS[row % 2], "max_tokens": 9, "ignore_eos": True}
        engine.add(Request(str(row), [*shared, *given[: 3 + row]], SamplingParams.model_validate(params)))
    while engine.busy:
        for delta in engine.step():
            answers.setdefault(delta.id, []).extend(delta.tokens)
            if delta.id in ("2", "5") and len(answers[delta.id]) >= 2:
                engine.abort(delta.id)
    now = engine.snapshot()
    for ended in ("2", "5"):
        answers[ended] = answers[ended][:2]
    return {"answers": answers, "held": now.held, "preempted": now.preemptions > 0, "found": now.cached_tokens > 0}


def alone(folder: Path, act: Callable[[Engine], Any], config: EngineConfig = CONFIG) -> Any:
    """What ``act`` returns of an engine on one device."""
    return act(build_engine(hub.load_for_inference(folder).eval(), config))


def cut(size: int, **options: Any) -> EngineConfig:
    return EngineConfig.model_validate({**CONFIG.model_dump(), "pipeline_parallel": size, **options})


@pytest.mark.parametrize("name", FAMILIES)
def test_two_stages_say_of_different_families_what_one_device_does(folders, name):
    (first, _) = together(2, folders(name), cut(2), said)
    assert first.get("returned") == alone(folders(name), said)


@pytest.mark.parametrize("tied", [True, False])
def test_two_stages_of_a_quantized_mixture_say_what_one_device_does(tied, tmp_path):
    """A tied head is with the last stage, and the embedding with the first."""
    folder = mixture(tmp_path / "m", "int8", tied=tied)
    (first, _) = together(2, folder, cut(2), said)
    assert first.get("returned") == alone(folder, said)
    parts = [open_share(folder, cut(2), torch.device("cpu"), Share(rank, 2)) for rank in (1, 0)]
    names = [{name for name, _ in packed_layers(part) if not name.startswith("layers.")} for part in parts]
    assert names == [{"embedding.matrix"}, {"embedding.matrix"} if tied else {"head"}]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_stages_say_of_every_family_what_one_device_does(folders, size):
    from divided_ranks import FAMILIES as EVERY

    for name in EVERY:
        assert together(size, folders(name), cut(size), said)[0].get("returned") == alone(folders(name), said), name


@pytest.mark.parametrize("loop", ["overlapped", "plain"])
def test_three_stages_keep_the_books_through_preemptions_shared_prefixes_and_aborts(folders, loop):
    wanted = alone(folders("llama"), told_in_a_crowd)
    assert wanted["preempted"] and wanted["found"] and not wanted["held"]
    (first, *_) = together(3, folders("llama"), cut(3, loop=loop), told_in_a_crowd)
    assert first.get("returned") == wanted


def forked(engine: Engine) -> list[list[int]]:
    """What ``engine`` answers to a request, and to two that go on from it, in a block that it has begun."""
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=9, ignore_eos=True)
    given, answers = prompt(1, 6).tolist()[0], dict[str, list[int]]()

    def run() -> None:
        while engine.busy:
            for delta in engine.step():
                answers.setdefault(delta.id, []).extend(delta.tokens)

    engine.add(Request("0", given, params, keep=True))
    run()
    for id, other in (("1", 7), ("2", 9)):
        engine.fork("0", Request(id, [*given, *answers["0"][:5], other], params))
    run()
    return [answers[id] for id in sorted(answers)]


def test_blocks_are_copied_in_all_stages(folders):
    roomy = CONFIG.model_copy(update={"cache_tokens": 120})
    found = together(2, folders("llama"), cut(2, cache_tokens=120), forked)[0].get("returned")
    assert found == alone(folders("llama"), forked, roomy)


def test_stages_check_what_is_drafted_over_a_coded_cache(folders):
    more = {"draft": "ngram", "codec": "int8"}
    drafting = EngineConfig.model_validate({**CONFIG.model_dump(), **more})
    (first, _) = together(2, folders("llama"), cut(2, **more), lambda engine: said(engine, tokens=16))
    assert first.get("returned") == alone(folders("llama"), lambda engine: said(engine, tokens=16), drafting)


@pytest.mark.parametrize(
    ("family", "rule"),
    [("mixtral", {"rule": {"name": "roster", "noise": 2.0}}), ("llama", {"rule": "superposed", "n": 3})],
)
def test_tokens_with_other_experts_and_texts_in_one_row_are_those_of_one_device(folders, family, rule):
    def act(engine: Engine) -> list[int]:
        params = {"temperature": 0, "max_tokens": 5, "ignore_eos": True, **rule}
        engine.add(Request("0", prompt(1, 6).tolist()[0], SamplingParams.model_validate(params)))
        tokens: list[int] = []
        while engine.busy:
            tokens += [token for delta in engine.step() for token in delta.tokens]
        return tokens

    (first, _) = together(2, folders(family), cut(2), act)
    assert first.get("returned") == alone(folders(family), act)


def test_as_many_steps_are_under_way_as_there_are_stages_each_of_other_sequences(folders):
    """The last stage waits for a step only when the others have been told of two more."""

    def act(engine: Engine) -> list[int]:
        launch, publish, under_way, seen = engine.steps.launch, engine.steps.publish, [], []

        def launched(batch):
            own = {id(entry.sequence) for entry in batch.entries}
            if all(entry.sequence.in_flight for entry in batch.entries):  # decodes
                assert not any(own & other for other in under_way)
            under_way.append(own)
            seen.append(len(under_way))
            launch(batch)

        def published(batch):
            under_way.pop(0)
            return publish(batch)

        engine.steps.launch, engine.steps.publish = launched, published
        said(engine, count=4, tokens=8)
        return [max(seen), sum(number == 3 for number in seen) > len(seen) / 2]

    roomy = cut(3, cache_tokens=200, tokens=48)
    assert together(3, folders("llama"), roomy, act)[0].get("returned") == [3, True]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_stage_that_fails_ends_all_and_is_named(folders, rank):
    def break_(own: int, model: Decoder) -> None:
        calls = 0

        def fail(*_: object) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise ValueError("a bad shape")

        if own == rank:
            next(each for each in model.layers if isinstance(each, Layer)).mlp.register_forward_pre_hook(fail)

    (first, *_) = together(3, folders("llama"), cut(3), said, break_)
    kind, told = first["raised"]
    assert (kind, told.startswith(f"rank {rank}: ValueError('a bad shape')")) == (RankLostError.__name__, True)


def test_a_stage_has_its_layers_and_no_others(folders):
    """Of weights and of the cache; the embedding is the first one's, norm and head are the last one's."""
    whole = hub.load_for_inference(folders("llama"))
    parts = [open_share(folders("llama"), cut(2), torch.device("cpu"), Share(rank, 2)) for rank in (1, 0)]
    names = [dict(part.named_parameters()) for part in parts]
    assert names[0].keys() | names[1].keys() == dict(whole.named_parameters()).keys()
    assert not names[0].keys() & names[1].keys()
    for own in names:
        assert all(torch.equal(weight, dict(whole.named_parameters())[name]) for name, weight in own.items())


@pytest.mark.parametrize(
    ("layers", "count", "wanted"), [(4, 2, [2, 2]), (5, 2, [2, 3]), (7, 3, [2, 2, 3]), (3, 3, [1, 1, 1])]
)
def test_stages_follow_each_other_and_none_is_larger_than_the_last(layers, count, wanted):
    found = stages(layers, count)
    assert [len(each) for each in found] == wanted
    assert [layer for each in found for layer in each] == list(range(layers))


def test_more_stages_than_layers_are_refused_before_anything_starts(folders, tmp_path):
    with pytest.raises(UsageError, match="4 stages cannot divide this model: it has 3 layers") as refusal:
        stages(3, 4)
    assert refusal.value.hint == "Set pipeline_parallel to 3 or fewer."
    with pytest.raises(UsageError, match="9 stages cannot divide this model"):
        open_engine("python-1m", cut(9), "cpu")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tensor_parallel": 2}, "choose one of them"),
        ({"adapter_slots": 1}, "leave out pipeline_parallel"),
        ({"deterministic": True}, "deterministic is for a model on one device: leave it out, or pipeline_parallel"),
        ({"kv_host": "1GB"}, "kv_host is for a model on one device"),
        ({"draft": "ngram", "draft_tree": "2,2"}, "a model divided among ranks verifies chains"),
        ({"resident_weights": "1GB"}, "pipeline_parallel needs all weights in memory"),
    ],
)
def test_what_stages_do_not_go_together_with_is_refused_with_the_reason(options, reason):
    with pytest.raises(ConfigError, match=reason):
        build(EngineConfig, {"pipeline_parallel": 2, **options}, "the engine's options")
