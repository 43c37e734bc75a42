"""From data to a served model, for every family and tuner, and for every preset of fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from typer.testing import CliRunner

from penstock import LLM, SamplingParams
from penstock.cli import build_app
from penstock.core.progress import silent
from penstock.models import hub
from penstock.models.attention import CausalRows
from penstock.models.companions import copy_companions
from penstock.models.formats.schemes import SCHEMES
from penstock.policy import index
from penstock.search.scorers.contract import Candidate
from penstock.search.scorers.reward_model import RewardModel
from penstock.testing.enrolled import enrolled
from penstock.testing.transformers_peer import peer, published
from penstock.train.run import Run
from penstock.train.session import train_to_the_end
from tiny_chats import chat_config, make_chat_model, turns, write_lines

FAMILIES, TUNERS = enrolled("model.family"), sorted(index().names("train.tuner"))

#: What every change runs; the rest is slow.
QUICK = {("llama", "full"), ("gpt_oss", "lora"), ("gpt2", "lora"), ("qwen3_moe", "mos"), ("gpt2", "dynmole")}

CHATS = [turns(f"what is {i}?", f"{i} a word") for i in range(6)]
CASES = [
    pytest.param(family, tuner, marks=() if (family, tuner) in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for tuner in TUNERS
]

#: Formats of the base.
FORMATS = sorted(SCHEMES)
#: Columns that groups of 32 divide, which the families' tiny matrices do not have; and heads of so many numbers where a
#: family says nothing of these.
GROUPED = {
    **dict.fromkeys(("intermediate_size", "n_inner", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "kv_lora_rank", "q_lora_rank"), 32),
    "v_head_dim": 8,
}
HEAD = {"head_dim": 8}


def adds(tuner: str) -> bool:
    """Whether it trains weights beside the model's own, which may then stay in whatever format they are in."""
    return index().policies["train.tuner", tuner].load().adds


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="session")
def base_of(chat_model, tmp_path_factory):
    """transformers' own model of a family, tiny and random, with that tokenizer and template, of sizes that it has or
    others."""
    made: dict[tuple[str, bool], Path] = {}

    def base(family: str, sizes: Mapping[str, int] = MappingProxyType({})) -> Path:
        known = family, bool(sizes)
        if known not in made:
            folder, size = tmp_path_factory.mktemp(family), hub.read_config(chat_model).vocabulary
            shape = {"max_position_embeddings": 128, **(HEAD if sizes else {}), **FAMILIES[family].example, **sizes}
            peer(family, **{**shape, "vocab_size": size, "bos_token_id": 0, "eos_token_id": 0}).save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name).write_bytes((chat_model / name).read_bytes())
            made[known] = folder
        return made[known]

    return base


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "chats.jsonl", [{"messages": chat} for chat in CHATS])


@torch.no_grad()
def continued(folder: Path, tokens: list[int], count: int) -> list[int]:
    """What transformers' model of a folder finds most probable, token by token, without a cache."""
    model, found = published(folder), list(tokens)
    for _ in range(count):
        found.append(int(model(torch.tensor([found]), use_cache=False).logits[0, -1].argmax()))
    return found[len(tokens) :]


@torch.no_grad()
def uncached(folder: Path, tokens: list[int], count: int) -> list[int]:
    """What a folder's model finds most probable, token by token, all computed anew each time."""
    model, found = hub.load(folder, dtype=torch.float32), list(tokens)
    for _ in range(count):
        hidden = model(torch.tensor([found]), CausalRows.of(len(found), "cpu")).hidden
        found.append(int(model.logits(hidden)[0, -1].argmax()))
    return found[len(tokens) :]


def said(model: Path, tokens: list[int], count: int) -> list[int]:
    """What is served for the same."""
    sampling = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    llm = LLM(str(model), dtype="fp32", cache_tokens=512, progress=silent)
    return llm.generate([{"prompt_token_ids": tokens}], sampling, progress=silent)[0].outputs[0].token_ids


@pytest.fixture(scope="session")
def packed(base_of, tmp_path_factory):
    """The same model with its matrices in a format."""
    made: dict[tuple[str, str], Path] = {}

    def base(family: str, scheme: str) -> Path:
        if (family, scheme) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{scheme}") / "base"
            plain = base_of(family, GROUPED if scheme == "w4a16" else {})
            hub.save(hub.load(plain, dtype=torch.float32), folder, scheme=scheme)
            copy_companions(plain, folder)
            made[family, scheme] = folder
        return made[family, scheme]

    return base


@pytest.mark.slow
@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("tuner", [name for name in TUNERS if adds(name)])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_beside_a_quantized_base_is_served(packed, chats, tmp_path, family, tuner, scheme):
    """As beside a plain base, in each format."""
    base, folder = packed(family, scheme), tmp_path / "run"
    data = {"chats": str(chats), "held_out": 0.2}
    run = Run.create(chat_config(base, data=data, tuner={"name": tuner, "rank": 4}, steps=2), folder)
    assert train_to_the_end(run, silent)["held_out_loss"] > 0
    asked = hub.load_tokenizer(folder).apply_chat_template(turns("what is 3?"), add_generation_prompt=True)["input_ids"]
    wanted = uncached(folder, asked, 5)
    assert said(folder, asked, 5) == said(folder / "adapter", asked, 5) == wanted
    context, rows = CausalRows.of(len(asked), "cpu"), torch.tensor([asked])
    before, after = (hub.load(each, dtype=torch.float32)(rows, context).hidden for each in (base, folder))
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize(("family", "tuner"), CASES)
def test_what_is_trained_is_served(base_of, chats, tmp_path, family, tuner):
    """The run folder, and the adapter on its base, say what transformers says of the model that the run leaves (or, of
    an adapter that it has no model for, what its passes without a cache say); and the base would say something else, or
    the same with other probabilities."""
    base, folder = base_of(family), tmp_path / "run"
    data = {"chats": str(chats), "held_out": 0.2}
    tuner = {"name": tuner, **({} if tuner == "full" else {"rank": 4})}
    run = Run.create(chat_config(base, data=data, tuner=tuner, steps=2), folder)
    assert train_to_the_end(run, silent)["held_out_loss"] > 0
    asked = hub.load_tokenizer(folder).apply_chat_template(turns("what is 3?"), add_generation_prompt=True)["input_ids"]
    wanted = continued(folder / "model", asked, 5) if run.config.tuner.merges else uncached(folder, asked, 5)
    assert said(folder, asked, 5) == wanted
    if run.config.tuner.adds:
        assert said(folder / "adapter", asked, 5) == wanted
    context, rows = CausalRows.of(len(asked), "cpu"), torch.tensor([asked])
    before, after = (hub.load(each, dtype=torch.float32)(rows, context).hidden for each in (base, folder))
    assert not torch.allclose(before, after, atol=1e-3)


PAIRS = [{"prompt": f"what is {i}?", "chosen": f"{i} a word", "rejected": "no " * (i % 3 + 1)} for i in range(6)]
RATED = [{"prompt": f"what is {i}?", "completion": f"{i} a word", "label": i % 2 == 0} for i in range(6)]


@pytest.mark.parametrize(
    ("preset", "key", "records"),
    [
        ("sft", "chats", [{"messages": chat} for chat in CHATS]),
        ("dpo", "preferences", PAIRS),
        ("orpo", "preferences", PAIRS),
        ("kto", "ratings", RATED),
        ("reward", "preferences", PAIRS),
        ("distill", "chats", [{"messages": chat} for chat in CHATS]),
    ],
)
def test_presets_lead_from_data_to_use(chat_model, tmp_path, preset, key, records):
    """By the command line alone, in a size for tests."""
    data, folder = write_lines(tmp_path / "data.jsonl", records), tmp_path / "run"
    changes = [f"start_from={chat_model}", f"data.{key}={data}", "epochs=1", "data.held_out=0.2", "device=cpu"]
    changes += ["batch.tokens=256", "batch.micro_tokens=128", 'batch.stages=[{"length" = 128}]', "precision=fp32"]
    changes += [f"objective.source={chat_model}"] if preset == "distill" else []
    options = [part for change in changes for part in ("--set", change)]
    done = CliRunner().invoke(build_app(), ["train", "--preset", preset, "--out", str(folder), *options])
    assert done.exit_code == 0, done.output
    assert json.loads((folder / "summary.json").read_text())["held_out_loss"] is not None
    if preset == "reward":
        found = RewardModel(model=str(folder)).score({"messages": turns("what is 1?")}, [Candidate("1 a word", "")])
        assert isinstance(found[0], float)
    else:
        results = LLM(str(folder), progress=silent).chat(
            [turns("what is 1?")], SamplingParams(max_tokens=5, temperature=0.0), progress=silent
        )
        assert results[0].error is None
