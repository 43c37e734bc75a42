"""A model that is divided among ranks says token for token what it says on one device."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import gguf_files
from penstock.core.channel import Channel
from penstock.models import hub
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family
from penstock.models.formats.schemes import SCHEMES
from penstock.models.shares import Share
from penstock.parallel.world import World
from penstock.serve.build import build_engine, open_share
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.link.follower import follow
from penstock.serve.messages import Request
from penstock.serve.ranks.group import Ranks
from penstock.serve.ranks.wire import body, parse
from penstock.testing.enrolled import enrolled
from penstock.testing.ranks import agreed
from penstock.testing.transformers_peer import SHAPE, TOKEN_IDS, peer, prompt, randomize

FAMILIES: Mapping[str, Family] = enrolled("model.family")

#: Norms over all heads, of which two ranks have the same; experts with biases; latents; a layout of its own.
DIFFERENT = ("minimax_m2", "gpt_oss", "deepseek_v3", "gpt2")

CONFIG = EngineConfig(tokens=8, sequences=2, block_size=4, cache_tokens=80, check=True)

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


def check(size: int, folders: Mapping[str, Path], tokens: int, config: EngineConfig = CONFIG) -> None:
    """Asserts that ``size`` ranks say of each model in ``folders`` what one device does."""
    ends = [socket.socketpair() for _ in range(1, size)]
    cpu = torch.device("cpu")

    def work(world: World) -> dict[str, list[list[int]]]:
        torch.set_num_threads(1)
        share, answers = Share(world.rank, size), {}
        channels = [Channel(pair[min(world.rank, 1)], body, parse) for pair in ends]
        if world.rank:
            channels[world.rank - 1].listen()
        for name, folder in folders.items():
            model = open_share(folder, config, cpu, share)
            if world.rank:
                follow(model, config, channels[world.rank - 1])
            else:
                ranks = Ranks(share, channels, world=world)
                answers[name] = said(build_engine(model, config, ranks=ranks), tokens)
                ranks.tell("leave")
        return answers

    (together, *_) = agreed(size, work)
    for pair in ends:
        for end in pair:
            end.close()
    for name, folder in folders.items():
        alone = said(build_engine(hub.load_for_inference(folder).eval(), config), tokens)
        assert together[name] == alone, f"{size} ranks say of {name} something else"


def example(name: str) -> DecoderConfig:
    """A tiny shape in which everything that the family has makes a difference."""
    family = FAMILIES[name]
    keys = {**SHAPE, **dict.fromkeys(TOKEN_IDS), **family.example}
    return family.config_from_hub(AutoConfig.for_model(name, **keys).to_dict())


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family."""
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        hub.save(randomize(Decoder(example(name))), folder / name, family=name)
    return {name: folder / name for name in FAMILIES}


def test_two_ranks_say_of_every_family_what_one_device_does(families):
    check(2, families, tokens=1)


def test_four_ranks_say_of_different_families_what_one_device_does(families):
    check(4, {name: families[name] for name in DIFFERENT}, tokens=1)


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


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_say_longer_texts_of_every_family(families, size):
    check(size, families, tokens=8)
