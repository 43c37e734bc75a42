"""Small folders of quantized models, packed number by number as those who made the formats define them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock.models.formats.schemes import SCHEMES
from penstock.ops.quantized.codebook import TABLES
from penstock.testing.transformers_peer import peer


def awq(values: Tensor, zeros: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """``values`` [M, K], ``zeros`` and ``scale`` [M, k] as AutoAWQ packs them."""

    def words(numbers: Tensor) -> Tensor:
        """[n, M] to [n, M / 8]."""
        out = torch.zeros(numbers.shape[0], numbers.shape[1] // 8, dtype=torch.int64)
        for column in range(out.shape[1]):
            for place, row in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                out[:, column] |= numbers[:, 8 * column + row].long() << (4 * place)
        return out.to(torch.int32)

    return {"qweight": words(values.T), "qzeros": words(zeros.T), "scales": scale.T.contiguous()}


def gptq(values: Tensor, zeros: Tensor, scale: Tensor, bits: int) -> dict[str, Tensor]:
    """The same as AutoGPTQ packs them: columns from the lowest bits up, zeros less one."""

    def words(numbers: Tensor) -> Tensor:
        """[n, M] to [n bits / 32, M]."""
        each = 32 // bits
        out = torch.zeros(numbers.shape[0] // each, numbers.shape[1], dtype=torch.int64)
        for row in range(numbers.shape[0]):
            out[row // each] |= numbers[row].long() << (bits * (row % each))
        return out.to(torch.int32)

    size = values.shape[1] // scale.shape[1]
    order = torch.arange(values.shape[1], dtype=torch.int32) // size
    return {
        "qweight": words(values.T),
        "qzeros": words(zeros - 1).T.contiguous(),
        "scales": scale.T.contiguous(),
        "g_idx": order,
    }


def mxfp4(folder: Path, change: Callable[[dict[str, Tensor]], object] = lambda _: None, ffn: int = 96) -> Path:
    """A gpt-oss whose experts are random numbers of four bits with random exponents."""
    peer("gpt_oss", torch.bfloat16, hidden_size=64, intermediate_size=ffn).save_pretrained(folder)
    tensors, draws = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=draws).to(torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 125, shape, generator=draws).to(torch.uint8)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


#: What config.json says of each of the :func:`packers`.
METHODS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "gptq, 8 bits": {"quant_method": "gptq", "bits": 8, "group_size": 32},
    "fp8 in blocks": {"quant_method": "fp8", "weight_block_size": [16, 32]},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    **{
        name: {
            "quant_method": "compressed-tensors",
            "format": scheme.format,
            "config_groups": {"0": {"targets": ["Linear"], "weights": scheme([64]).weights()}},
        }
        for name, scheme in SCHEMES.items()
    },
}


def packed(method: str, matrix: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """Tensors of one of the :data:`METHODS` in the place of a matrix, whose numbers are about as large; with random
    ones where the method's integers have zeros."""
    rows, columns = matrix.shape
    if method in SCHEMES:
        return SCHEMES[method]([columns]).compress(matrix)
    if method == "fp8 in blocks":
        scale = 0.01 * (1 + torch.rand(-(-rows // 16), -(-columns // 32), generator=draw))
        return {"weight": (matrix / 0.01).to(torch.float8_e4m3fn), "weight_scale_inv": scale}
    if method == "nf4":
        table = torch.tensor(TABLES["nf4"])
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns]}
        return {
            "weight": torch.randint(256, (rows * columns // 2, 1), generator=draw).to(torch.uint8),
            "weight.absmax": torch.rand(rows * columns // 64, generator=draw),
            "weight.quant_map": table,
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }
    bits = 8 if "8" in method else 4
    values = torch.randint(2**bits, (rows, columns), generator=draw)
    zeros = torch.randint(1, 2**bits, (rows, columns // 32), generator=draw)
    scale = 2.0**-bits * torch.rand(rows, columns // 32, generator=draw)
    return awq(values, zeros, scale) if method == "awq" else gptq(values, zeros, scale, bits)


def mixture(folder: Path, method: str, *, tied: bool) -> Path:
    """A mixture of experts all of whose matrices are packed by one of the :data:`METHODS`: the embedding, a head of its
    own where it is not ``tied``, layers and experts; but not the routers."""
    shape = {"vocab_size": 64, "hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 64}
    peer("qwen3_moe", **shape, tie_word_embeddings=tied).save_pretrained(folder)
    tensors, draw = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name, each in tensors.items() if each.dim() == 2 and not name.endswith("mlp.gate.weight")]:
        parts = packed(method, tensors.pop(name), draw)
        tensors |= {f"{name.removesuffix('weight')}{part}": stored for part, stored in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": METHODS[method]}))
    return folder
