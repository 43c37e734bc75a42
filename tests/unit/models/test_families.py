"""What config.json says, family by family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from penstock.core.errors import ModelError
from penstock.models import hub
from penstock.models.config import DecoderConfig, LinearScaling, Llama3Scaling, MoEConfig, YarnScaling
from penstock.models.decoder import Decoder
from penstock.models.families.contract import Family, effective
from penstock.models.families.mapping import views_on
from penstock.models.routers.sigmoid import SigmoidRouter
from penstock.models.routers.softmax import SoftmaxRouter
from penstock.policy import create
from penstock.testing.transformers_peer import SHAPE, expected, peer, prompt, whole

# The config.json of published models, less what says nothing of their shape, and their sizes as their makers state.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        8_030_261_248,
        {
            "model_type": "llama",
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "vocab_size": 128256,
        },
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {
            "model_type": "mistral",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
    ),
    "Mixtral-8x7B-v0.1": (
        46_702_792_704,
        {
            "model_type": "mixtral",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": 896,
            "initializer_range": 0.02,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        {
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
}
OPTIONAL = {
    "attention_bias",
    "decoder_sparse_step",
    "hidden_act",
    "initializer_range",
    "max_window_layers",
    "mlp_bias",
    "mlp_only_layers",
    "norm_topk_prob",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "router_aux_loss_coef",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
}


def family(name: str) -> Family:
    return cast(Family, create("model.family", name))


def read(hub: dict[str, Any]) -> DecoderConfig:
    return family(hub["model_type"]).config_from_hub(hub)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_size(name: str) -> None:
    size, hub = PUBLISHED[name]
    config = read(hub)
    with torch.device("meta"):
        decoder = Decoder(config)
    assert decoder.parameter_count() == size
    assert sum(view.numel() for view in views_on(decoder, family(hub["model_type"])).values()) == size
    assert config.context == hub["max_position_embeddings"]
    assert config.rope.theta == hub["rope_theta"]


def test_published_details() -> None:
    llama = read(PUBLISHED["Llama-3.1-8B"][1])
    assert llama.rope.scaling == Llama3Scaling(
        factor=8, low_frequency_factor=1, high_frequency_factor=4, original_context=8192
    )
    assert [read(PUBLISHED["Mistral-7B-v0.1"][1]).window_of(layer) for layer in (0, 31)] == [4096, 4096]
    assert read(PUBLISHED["Qwen2.5-0.5B"][1]).window is None
    mixtral, qwen = read(PUBLISHED["Mixtral-8x7B-v0.1"][1]).moe, read(PUBLISHED["Qwen3-30B-A3B"][1]).moe
    assert mixtral == MoEConfig(experts=8, ffn=14336, router=SoftmaxRouter(top_k=2), balance_weight=0.02)
    assert qwen == MoEConfig(experts=128, ffn=768, router=SoftmaxRouter(top_k=8), balance_weight=0.001)


@pytest.mark.parametrize("name", PUBLISHED)
@given(data=st.data())
def test_absent_keys_mean_what_they_mean_to_transformers(name: str, data: st.DataObject) -> None:
    """Less any of the optional keys, a config.json reads as the one that transformers completes it to."""
    hub = PUBLISHED[name][1]
    dropped = data.draw(st.sets(st.sampled_from(sorted(OPTIONAL & hub.keys()))))
    partial = {key: value for key, value in hub.items() if key not in dropped}
    arguments = {key: value for key, value in partial.items() if key != "model_type"}
    completed = AutoConfig.for_model(hub["model_type"], **arguments).to_dict()
    assert effective(read(partial)) == effective(read(completed))


@pytest.mark.parametrize("missing", ["hidden_size", "num_hidden_layers", "vocab_size", "num_key_value_heads"])
def test_a_missing_key_is_named(missing: str) -> None:
    hub = PUBLISHED["Qwen3-0.6B"][1]
    with pytest.raises(ModelError, match=f"lacks '{missing}'"):
        read({key: value for key, value in hub.items() if key != missing})


@pytest.mark.parametrize("first", [0, 1, 20, 24, 99])
@pytest.mark.parametrize("window", [None, 8])
def test_windows_without_layer_types(first: int, window: int | None) -> None:
    """``max_window_layers`` counts the layers without a window, as transformers completes it; either way is written."""
    hub = PUBLISHED["Qwen2.5-0.5B"][1] | {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": first,
    }
    arguments = {key: value for key, value in hub.items() if key != "model_type"}
    completed = AutoConfig.for_model("qwen2", **arguments).to_dict()
    config = read(hub)
    assert effective(config) == effective(read(completed))
    written = family("qwen2").config_to_hub(config)
    assert written["layer_types"] == completed["layer_types"]
    assert effective(read(written | {"layer_types": None})) == effective(config)


def test_heads_by_default() -> None:
    """No key head count (Llama 1 had none) means one for each head; a null head size divides the width."""
    hub = PUBLISHED["Llama-3.1-8B"][1] | {"head_dim": None}
    absent = {key: value for key, value in hub.items() if key != "num_key_value_heads"}
    for config in (read(absent), read(hub | {"num_key_value_heads": None})):
        assert (config.kv_heads, config.head_dim) == (32, 128)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("Llama-3.1-8B", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("Llama-3.1-8B", {"hidden_size": 4097}, r"hidden_size \(4097\)"),
        ("Llama-3.1-8B", {"hidden_size": "wide"}, "hidden_size is 'wide', and has to be a whole number"),
        ("Llama-3.1-8B", {"vocab_size": -1}, "vocab_size is -1"),
        ("Llama-3.1-8B", {"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0"),
        ("Llama-3.1-8B", {"num_hidden_layers": True}, "num_hidden_layers is True"),
        ("Llama-3.1-8B", {"num_hidden_layers": 10**12}, "num_hidden_layers is 1,000,000,000,000, more than 10,000"),
        ("Llama-3.1-8B", {"rms_norm_eps": "x"}, "rms_norm_eps: "),
        ("Llama-3.1-8B", {"num_key_value_heads": 5}, "multiple of kv_heads"),
        ("Llama-3.1-8B", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic'"),
        (
            "Llama-3.1-8B",
            {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}},
            "longrope.short: Field required",
        ),
        ("Llama-3.1-8B", {"rope_scaling": {"rope_type": "linear"}}, "factor: Field required"),
        ("Llama-3.1-8B", {"rope_scaling": {"rope_type": "linear", "factor": -2}}, "factor: Input should be greater"),
        ("Llama-3.1-8B", {"rope_scaling": "x"}, "rope_scaling is 'x', and no table"),
        ("Llama-3.1-8B", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1.0}, "bases above 1"),
        ("Llama-3.1-8B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("Llama-3.1-8B", {"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("Qwen3-0.6B", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer type"),
        ("Qwen3-0.6B", {"head_dim": 7}, r"head_dim \(7\) must be even"),
        (
            "Qwen3-0.6B",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["chunked_attention"] * 28},
            "layer type 'chunked_attention'",
        ),
        (
            "Qwen3-0.6B",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]},
            "names 1 layers of 28",
        ),
        ("Mixtral-8x7B-v0.1", {"num_experts_per_tok": 9}, "picks 9 of only 8"),
        ("Mixtral-8x7B-v0.1", {"num_experts_per_tok": 0}, "top_k"),
    ],
)
def test_refusals_name_the_thing(name: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(PUBLISHED[name][1] | keys)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.floats(-10, 100, allow_nan=False) | st.just(float("nan")),
    st.text(max_size=3),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "x"]), st.text(max_size=3), max_size=2),
)


@pytest.mark.parametrize("name", PUBLISHED)
@given(data=st.data())
def test_junk_is_a_model_error(name: str, data: st.DataObject) -> None:
    """Whatever a config.json holds, reading it gives a shape or an error for people; the shape can be written again."""
    hub = PUBLISHED[name][1] | {"num_hidden_layers": 4}
    keys = [key for key in hub if key != "model_type"]
    junk = data.draw(st.dictionaries(st.sampled_from([*keys, "rope_parameters", "layer_types"]), JUNK, max_size=3))
    try:
        config = read(hub | junk)
    except ModelError:
        return
    writer = family(hub["model_type"])
    dense = name == "Qwen3-30B-A3B" and not any(config.sparse(layer) for layer in range(config.layers))
    assert dense or not writer.losses(config)


@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
def test_old_and_new_rope_keys(style: str) -> None:
    """transformers 4 wrote rope_theta and rope_scaling with a ``type``, transformers 5 puts all in rope_parameters."""
    hub = {key: value for key, value in PUBLISHED["Qwen2.5-0.5B"][1].items() if key != "rope_theta"}
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768}
    hub |= (
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", **yarn}}
        if style == "rope_scaling"
        else {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **yarn}}
    )
    rope = read(hub).rope
    assert rope.theta == 5e5
    assert rope.scaling == YarnScaling(factor=4.0, original_context=32768)
    assert read(family("qwen2").config_to_hub(read(hub))).rope == rope


def test_yarn_without_a_factor_or_an_original_context() -> None:
    """The one follows from the other; without either, the context is the original."""
    hub = PUBLISHED["Qwen2.5-0.5B"][1]
    derived = read(hub | {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 8192}}).rope
    assert derived.scaling == YarnScaling(factor=4.0, original_context=8192)
    stated = read(hub | {"rope_scaling": {"type": "yarn", "factor": 2.0}}).rope
    assert stated.scaling == YarnScaling(factor=2.0, original_context=32768)


def test_equal_models_have_equal_effective_configs() -> None:
    """Two ways of saying the same windows and sparsity are one model; different windows are two."""
    shape = {"vocabulary": 7, "hidden": 8, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 4, "ffn": 8}
    moe = MoEConfig(experts=2, ffn=4, router=SoftmaxRouter(top_k=1))
    for one, other in (
        ({"window": 3}, {"window": 3, "windowed_layers": (1, 0)}),
        ({}, {"window": 3, "windowed_layers": ()}),
        ({"moe": moe}, {"moe": moe, "ffn": 9}),
        ({}, {"moe": moe.model_copy(update={"dense_layers": (0, 1)})}),
    ):
        assert effective(DecoderConfig(**shape | one)) == effective(DecoderConfig(**shape | other))
    for one, other in (
        ({"window": 3}, {"window": 3, "windowed_layers": (0,)}),
        ({"moe": moe}, {"moe": moe.model_copy(update={"dense_layers": (0,)})}),
        ({}, {"rope": {"scaling": LinearScaling(factor=2.0)}}),
    ):
        assert effective(DecoderConfig(**shape | one)) != effective(DecoderConfig(**shape | other))


def test_losses_name_what_a_family_has_no_place_for() -> None:
    shape = {"vocabulary": 7, "hidden": 8, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 4, "ffn": 8}
    assert family("llama").losses(DecoderConfig(**shape)) == []
    assert family("llama").losses(DecoderConfig(**shape, window=4, qk_norm=True)) == ["qk_norm", "window"]
    assert family("llama").losses(DecoderConfig(**shape, qkv_bias=True)) == ["qkv_bias"]
    assert family("mixtral").losses(DecoderConfig(**shape)) == ["no layer is a mixture of experts"]
    moe = MoEConfig(experts=4, ffn=4, router=SigmoidRouter())
    assert family("mixtral").losses(DecoderConfig(**shape, moe=moe)) == ["moe.router = sigmoid"]
    shared = MoEConfig(experts=4, ffn=4, router=SoftmaxRouter(), shared_ffn=6)
    assert "moe.shared_ffn" in family("qwen3_moe").losses(DecoderConfig(**shape, qk_norm=True, moe=shared))


@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
def test_a_part_of_a_head_is_turned_by_no_family_whose_rotations_differ_by_layer(layer_type: str) -> None:
    nested: dict[str, dict[str, Any]] = {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
    }
    nested[layer_type]["partial_rotary_factor"] = 0.5
    with pytest.raises(ModelError, match="turns whole heads"):
        read({**SHAPE, "model_type": "gemma3_text", "rope_parameters": nested})


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        # As in the smallest, all of whose layers are turned.
        ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
        ("qwen2_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("llama4_text", {"interleave_moe_layer_step": 2, "moe_layers": None}),  # as in Maverick
        ("llama4_text", {"attn_temperature_tuning": False, "no_rope_layer_interval": 2, "floor_scale": 4}),
        ("llama4_text", {"attn_temperature_tuning": True, "no_rope_layer_interval": 2, "floor_scale": 4}),
    ],
)
def test_what_no_example_has_is_computed_as_transformers_does(kind: str, keys: dict[str, Any], tmp_path: Path) -> None:
    reference = peer(kind, torch.float64, **keys)
    reference.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    told = {key: value for key, value in written.items() if keys.get(key, "") is not None or value is None}
    (tmp_path / "config.json").write_text(json.dumps(told))  # what transformers makes of what is absent is not told
    found = whole(hub.load(tmp_path, dtype=torch.float64), prompt())
    torch.testing.assert_close(found, expected(reference, prompt()), rtol=1e-9, atol=1e-9)


def test_the_context_from_which_gpt_oss_is_stretched() -> None:
    """Where nothing is said of its rotation."""
    scaling = read({**SHAPE, "model_type": "gpt_oss"}).rope.scaling
    assert isinstance(scaling, YarnScaling)
    told = AutoConfig.for_model("gpt_oss").rope_parameters
    assert scaling.original_context == told["original_max_position_embeddings"]


def test_longrope_by_its_former_name() -> None:
    keys = {**SHAPE, "model_type": "phi3", "original_max_position_embeddings": 32}
    factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    found, formerly = (read(keys | {"rope_scaling": {"type": kind, **factors}}) for kind in ("longrope", "su"))
    assert found.rope.scaling is not None and formerly == found
