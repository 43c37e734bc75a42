"""Small GGUF files, written with the ``gguf`` package in llama.cpp's way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel

from small_tokenizers import byte_level

#: Of each architecture of GGUF: transformers' family, and its names of experts.
FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "mixtral": "mixtral",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "glm4": "glm4",
    "granite": "granite",
    "smollm3": "smollm3",
    "starcoder2": "starcoder2",
    "cohere2": "cohere2",
}

#: Keys of those in which they differ from their neighbours, as llama.cpp takes them to be where the file cannot say.
KEYS: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 20.0},
    "gemma3": {
        "num_hidden_layers": 6,
        "sliding_window": 5,
        "query_pre_attn_scalar": 64,
        "final_logit_softcapping": 9.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    },
    "phi3": {"sliding_window": 5, "partial_rotary_factor": 0.5},
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "smollm3": {"num_hidden_layers": 4},
    "starcoder2": {"sliding_window": None},
    "cohere2": {"num_hidden_layers": 4, "sliding_window": 5, "logit_scale": 0.5},
}

#: The names of numbers in transformers' configs that converters write under those of the metadata.
WRITTEN = {
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "norm_epsilon": "attention.layer_norm_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
    "logit_scale": "logit_scale",
}

#: A shape whose rows are blocks of every type.
SHAPE = {"vocab_size": 320, "hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "tie_word_embeddings": True}

Coded = Callable[[str, np.ndarray], tuple[np.ndarray, gguf.GGMLQuantizationType]]


def plain(name: str, weight: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """A weight as it is."""
    return weight, gguf.GGMLQuantizationType.F32


def coded(kind: str, seed: int = 0) -> Coded:
    """Matrices in the type ``kind``: rounded by ``gguf`` where it can, else blocks of random bits with small scales."""
    number = gguf.GGMLQuantizationType[kind]
    draw = np.random.default_rng(seed)

    def code(name: str, weight: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        if weight.ndim == 1:
            return plain(name, weight)
        try:
            return gguf.quantize(weight, number), number
        except NotImplementedError:
            return blocks(draw, kind, weight.shape), number

    return code


def blocks(draw: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random blocks of a type, whose numbers are about as large as weights."""
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = draw.integers(0, 256, (*shape[:-1], shape[-1] // numbers, size), np.uint8)
    # Where a block's float16 scales lie: behind its numbers in Q6_K, before them elsewhere.
    scales = {"Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}.get(kind, [0])
    for at in scales:
        small = draw.uniform(1e-4, 4e-4, raw.shape[:-1]).astype(np.float16)
        raw[..., at : at + 2] = small[..., None].view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def write(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    code: Coded = plain,
    *,
    change: Callable[[Any], None] | None = None,
) -> None:
    """Writes transformers' ``model`` as a GGUF file, its matrices in the form that ``code`` gives, with a byte-level
    tokenizer; ``change`` may do more with the writer."""
    config, name = model.config, "llama" if architecture == "mixtral" else architecture
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if "partial_rotary_factor" in rope:
        writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * SHAPE["head_dim"]))
    for key, theirs in WRITTEN.items():
        if (number := getattr(config, key, None)) is not None:
            writer.add_float32(f"{name}.{theirs}", number)
    if architecture in ("gemma2", "gemma3", "phi3", "cohere2"):
        writer.add_sliding_window(config.sliding_window)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if architecture in ("mixtral", "qwen3moe"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture == "qwen3moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    add_tokenizer(writer)
    numbers = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(numbers, config.num_hidden_layers)
    for key, weight in _weights(model).items():
        if config.tie_word_embeddings and key == "lm_head.weight":
            continue
        if name.startswith("gemma") and key.endswith("norm.weight"):
            weight = weight + 1
        if name in ("llama", "granite", "smollm3") and (found := re.search(r"\.(q|k)_proj\.", key)):
            weight = _in_pairs(weight, config.num_attention_heads if found[1] == "q" else config.num_key_value_heads)
        data, kind = code(key, np.ascontiguousarray(weight))
        writer.add_tensor(names.get_name(key, (".weight", ".bias")), data, raw_dtype=kind)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _weights(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The weights by the names of Hugging Face folders, with experts stacked, as llama.cpp's converter has them."""
    found: dict[str, np.ndarray] = {}
    for key, tensor in model.state_dict().items():
        weight = tensor.float().numpy()
        if key.endswith("experts.gate_up_proj"):
            gate, up = np.split(weight, 2, axis=1)
            found[key.replace("gate_up_proj", "gate_proj.weight")] = gate
            found[key.replace("gate_up_proj", "up_proj.weight")] = up
        elif key.endswith("experts.down_proj"):
            found[f"{key}.weight"] = weight
        else:
            found[key] = weight
    return found


def _in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of the two halves of each head, alternating: the numbers that rotate together side by side."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def add_tokenizer(writer: Any, pre: str = "smollm") -> None:
    """A byte-level tokenizer of 300 tokens, filled up to the vocabulary, with a chat template."""
    tokenizer = byte_level()
    size = SHAPE["vocab_size"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    kinds = [1] * len(tokens)
    special = ["<|end|>", "<|turn|>"]
    filled = [f"<|u{number}|>" for number in range(size - len(tokens) - len(special))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *special, *filled])
    writer.add_token_types([*kinds, *[3] * (len(special) + len(filled))])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]])
    writer.add_eos_token_id(len(tokens))
    writer.add_chat_template("{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}")
