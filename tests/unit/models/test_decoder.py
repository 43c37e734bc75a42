"""The Decoder's logits beside transformers' own, for every option that a folder can ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.models import hub
from penstock.models.attention import CausalRows
from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.decoder import Decoder
from penstock.testing.transformers_peer import expected, peer, prompt, stepwise, whole

ROPE = {"rope_theta": 500.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}

# Each with the setting that it is told apart from.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 3.0}}, {"rope_parameters": ROPE}),
    "llama3": ("llama", {"rope_parameters": ROPE | LLAMA3}, {"rope_parameters": ROPE}),
    "yarn": ("qwen3", {"rope_parameters": ROPE | YARN}, {"rope_parameters": ROPE}),
    "yarn mscale": (
        "qwen2",
        {"rope_parameters": ROPE | YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}},
        {"rope_parameters": ROPE | YARN},
    ),
    "yarn attention factor": (
        "mistral",
        {"rope_parameters": ROPE | YARN | {"attention_factor": 1.7, "beta_fast": 8.0, "beta_slow": 2.0}},
        {"rope_parameters": ROPE | YARN},
    ),
    "mistral window": ("mistral", {"sliding_window": 5}, {"sliding_window": 6}),
    "mixtral window": ("mixtral", {"sliding_window": 5}, {"sliding_window": None}),
    "qwen2 windows": ("qwen2", WINDOW | {"max_window_layers": 1}, WINDOW | {"max_window_layers": 2}),
    "qwen3 windows": (
        "qwen3",
        WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        WINDOW | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "qwen3_moe window": ("qwen3_moe", WINDOW, {}),
    "normalized experts": ("qwen3_moe", {"norm_topk_prob": True}, {"norm_topk_prob": False}),
    "experts in every second layer": ("qwen3_moe", {"decoder_sparse_step": 2}, {}),
    "dense first layer": ("qwen3_moe", {"mlp_only_layers": [0]}, {"mlp_only_layers": [1]}),
    "one expert": ("mixtral", {"num_experts_per_tok": 1}, {}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {"attention_bias": True}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "one key head": ("llama", {"num_key_value_heads": 1}, {"num_key_value_heads": 4}),
    "epsilon": ("mixtral", {"rms_norm_eps": 0.3}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers(variant: str, tmp_path: Path) -> None:
    """At once and step by step, in float32 and in float64; and the setting does change transformers' logits."""
    family, keys, otherwise = VARIANTS[variant]
    tokens = prompt()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        reference = peer(family, dtype, **keys)
        want = expected(reference, tokens)
        assert (want - expected(peer(family, dtype, **otherwise), tokens)).abs().max() > 0.01
        folder = tmp_path / str(dtype)
        reference.save_pretrained(folder)
        decoder = hub.load(folder)
        torch.testing.assert_close(whole(decoder, tokens), want, rtol=0, atol=tolerance)
        torch.testing.assert_close(stepwise(decoder, tokens), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("moe", [None, MoEConfig(experts=4, ffn=16)])
def test_the_tip_of_some_tokens_is_the_forward_pass_of_all(moe) -> None:
    config = DecoderConfig(vocabulary=31, hidden=16, layers=3, heads=4, kv_heads=2, head_dim=4, ffn=24, moe=moe)
    model = Decoder(config).double().initialize(0).eval()
    tokens, context = torch.arange(14).view(2, 7), CausalRows.of(7)
    rows = torch.tensor([13, 2, 6])
    x, attended = model.trunk(tokens, context)
    found = model.tip(x.flatten(0, 1)[rows], attended.flatten(0, 1)[rows])
    torch.testing.assert_close(found, model(tokens, context).hidden.flatten(0, 1)[rows], rtol=0, atol=1e-12)
