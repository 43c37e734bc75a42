"""Quantized checkpoints: read as those who defined them say, written so that they read them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from penstock import cli
from penstock.core.errors import ModelError, UsageError
from penstock.models import hub
from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.decoder import Decoder
from penstock.models.formats.quantized import layout_of
from penstock.models.formats.schemes import SCHEMES
from penstock.ops.quantized.fp8 import Fp8
from penstock.testing.transformers_peer import expected, peer, prompt, published, whole
from quantized_folders import awq, gptq, mxfp4

TOKENS = prompt()
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": False}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_activations_are_rounded_where_the_scheme_of_fp8_says_so():
    """Whether they are is part of what the matrix is multiplied as; other schemes have no part in it."""
    values = draw(256, 128).to(torch.float8_e4m3fn)
    tensors = {"weight": values, "weight_scale": torch.ones(256, 1)}
    for given, rounds in (
        (None, False),
        ({"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}, True),
        ({"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}, False),
    ):
        weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": given}
        config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"0": group}}
        assert layout_of(config).pack("m", tensors).format == Fp8(rounds=rounds)
    tensors = {"weight": values, "weight_scale_inv": torch.ones(2, 1)}
    for given, rounds in ((None, False), ("dynamic", True)):
        config = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": given}
        assert layout_of(config).pack("m", tensors).format == Fp8(group=128, rounds=rounds)


# compressed-tensors.


def compressed(args: dict[str, Any], format: str, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that the package writes for ``matrix``, and what it reads from them."""
    weights = QuantizationArgs(**args)
    rows, columns = matrix.shape
    by = {"tensor": (rows, columns), "channel": (1, columns), "group": (1, args.get("group_size", 1))}
    size = by.get(args["strategy"], tuple(args.get("block_structure", ())))
    blocks = matrix.view(rows // size[0], size[0], columns // size[1], size[1])
    scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), weights)
    if args["strategy"] == "tensor":
        scale, zero = scale.flatten(), zero.flatten()
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=format)
    codec = BaseCompressor.get_value_from_registry(format)
    given = {"weight": matrix, "weight_scale": scale, "weight_zero_point": zero}
    stored = codec.compress(given, scheme)
    return stored, codec.decompress(dict(stored), scheme)["weight"]


FLOAT = {"num_bits": 8, "type": "float"}
CASES = {
    "fp8, tensor": ("float-quantized", {**FLOAT, "strategy": "tensor"}),
    "fp8, channel": ("float-quantized", {**FLOAT, "strategy": "channel"}),
    "fp8, block": ("float-quantized", {**FLOAT, "strategy": "block", "block_structure": [16, 32]}),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8, asymmetric": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "w4a16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "w4a16, channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "w4a16, asymmetric": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    "w8a16": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}),
    "w3a16": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": torch.uint8,
            "zp_dtype": torch.uint8,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_package_compressed_tensors_writes_is_read(case):
    format, args = CASES[case]
    stored, wanted = compressed(args, format, draw(48, 96))
    kept = {key: value for key, value in args.items() if not key.endswith("dtype")}
    layout = layout_of(
        {
            "quant_method": "compressed-tensors",
            "format": format,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": kept}},
        }
    )
    packed = layout.pack("m", stored)
    assert packed.shape == (48, 96)
    torch.testing.assert_close(packed.dequantize(), wanted.float(), rtol=1e-6, atol=1e-6)
    assert (wanted - draw(48, 96)).abs().max() < 1  # it is this matrix, coarsely


def written(folder: Path, scheme: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model that transformers wrote, quantized in ``folder``; the model."""
    reference = peer("llama", dtype, **SHAPE)
    reference.save_pretrained(folder / "plain")
    hub.save(hub.load(folder / "plain"), folder / scheme, scheme=scheme)
    return reference


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_quantized_is_read_by_transformers(scheme, tmp_path):
    """The same numbers there and here, no further from what they were than a step."""
    original = written(tmp_path, scheme)
    theirs, ours = published(tmp_path / scheme), hub.load(tmp_path / scheme, dtype=torch.float32)
    expected(theirs, TOKENS)  # what is compressed is decompressed at the first pass
    steps = {"fp8": 2**-4, "int8": 1 / 127, "w4a16": 1 / 7}
    for here, there, before in zip(ours.layers, theirs.model.layers, original.model.layers, strict=True):
        for mine, his, was in (
            (here.attention.output.weight, there.self_attn.o_proj.weight, before.self_attn.o_proj.weight),
            (here.mlp.down.weight, there.mlp.down_proj.weight, before.mlp.down_proj.weight),
            (here.mlp.gate_up.weight[:96], there.mlp.gate_proj.weight, before.mlp.gate_proj.weight),
        ):
            torch.testing.assert_close(mine, his.float(), rtol=2**-7, atol=0)
            assert not torch.equal(mine, was.float())
            assert ((mine - was.float()).abs() <= steps[scheme] * was.float().abs().amax(1, keepdim=True)).all()


def test_where_activations_stay_as_they_are_logits_are_those_of_transformers(tmp_path):
    written(tmp_path, "w4a16", torch.float32)
    theirs, ours = published(tmp_path / "w4a16"), hub.load(tmp_path / "w4a16")
    torch.testing.assert_close(whole(ours, TOKENS), expected(theirs, TOKENS), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_are_quantized_and_routers_are_not(scheme, tmp_path):
    peer("qwen3_moe", torch.bfloat16, **SHAPE, moe_intermediate_size=32).save_pretrained(tmp_path / "plain")
    before = hub.load(tmp_path / "plain")
    hub.save(before, tmp_path / "made", scheme=scheme)
    after = hub.load(tmp_path / "made")
    assert torch.equal(after.layers[0].mlp.router.weight, before.layers[0].mlp.router.weight)
    assert torch.equal(after.head.weight, before.head.weight)
    step = {"fp8": 2**-4, "int8": 1 / 127, "w4a16": 1 / 7}[scheme]
    off = (after.layers[1].mlp.down.float() - before.layers[1].mlp.down.float()).abs()
    assert 0 < off.max() <= step * before.layers[1].mlp.down.float().abs().max()
    config = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.gate" in config["ignore"] and "lm_head" in config["ignore"]


def test_shards_of_a_quantized_model_have_an_index(tmp_path):
    peer("llama", torch.bfloat16, **SHAPE).save_pretrained(tmp_path / "plain")
    decoder = hub.load(tmp_path / "plain")
    hub.save(decoder, tmp_path / "one", scheme="int8")
    hub.save(decoder, tmp_path / "many", scheme="int8", shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    ours, theirs = hub.load(tmp_path / "many").state_dict(), hub.load(tmp_path / "one").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# AWQ, GPTQ, DeepSeek's fp8, bitsandbytes: packed here number by number, as their makers define it.


def integers(bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers [16, 64] of ``bits``, zeros and scales of groups of 32 columns, and what they stand for."""
    draws = torch.Generator().manual_seed(0)
    values = torch.randint(2**bits, (16, 64), generator=draws)
    zeros = torch.randint(1, 2**bits, (16, 2), generator=draws)
    scale = torch.rand(16, 2, generator=draws).half()
    wide = [each.repeat_interleave(32, 1) for each in (zeros, scale)]
    return values, zeros, scale, (values - wide[0]) * wide[1].float()


def test_awq_is_read():
    values, zeros, scale, wanted = integers(4)
    for config in ({"bits": 4, "group_size": 32}, {"w_bit": 4, "q_group_size": 32}):
        packed = layout_of({"quant_method": "awq", **config}).pack("m", awq(values, zeros, scale))
        torch.testing.assert_close(packed.dequantize(), wanted, rtol=1e-5, atol=1e-5)


def test_a_group_may_be_a_whole_row():
    values, zeros, scale, _ = integers(4)
    zeros, scale = zeros[:, :1], scale[:, :1]
    wanted = (values - zeros) * scale.float()
    for method, tensors in (("awq", awq(values, zeros, scale)), ("gptq", gptq(values, zeros, scale, 4))):
        packed = layout_of({"quant_method": method, "bits": 4, "group_size": -1}).pack("m", tensors)
        torch.testing.assert_close(packed.dequantize(), wanted, rtol=1e-5, atol=1e-4)


def test_a_scheme_may_name_modules():
    """The first that names one is for it, whether by its name, by a pattern, or as one of all."""
    matrix = draw(48, 96)
    eight, four = ({"num_bits": bits, "strategy": "group", "group_size": 32} for bits in (8, 4))
    stored, wanted = compressed(four, "pack-quantized", matrix)
    for targets in (["layers.0.m"], ["re:.*m$"], ["other", "layers.0.m"]):
        groups = {"0": {"targets": targets, "weights": four}, "1": {"targets": ["Linear"], "weights": eight}}
        config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
        found = layout_of(config).pack("layers.0.m", stored).dequantize()
        torch.testing.assert_close(found, wanted.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_is_read(bits):
    values, zeros, scale, wanted = integers(bits)
    tensors, config = gptq(values, zeros, scale, bits), {"quant_method": "gptq", "bits": bits, "group_size": 32}
    packed = layout_of(config).pack("m", tensors)
    torch.testing.assert_close(packed.dequantize(), wanted, rtol=1e-5, atol=1e-4)
    second = layout_of({**config, "checkpoint_format": "gptq_v2"}).pack("m", tensors)
    wide = scale.repeat_interleave(32, 1).float()
    torch.testing.assert_close(second.dequantize(), wanted + wide, rtol=1e-5, atol=1e-4)
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(ModelError, match="order of their own"):
        layout_of(config).pack("m", tensors)


def test_fp8_in_blocks_is_read_where_the_last_ones_are_cut_off():
    values, scale = draw(40, 80).to(torch.float8_e4m3fn), draw(3, 3, seed=1).abs()
    packed = layout_of({"quant_method": "fp8", "weight_block_size": [16, 32]}).pack(
        "m", {"weight": values, "weight_scale_inv": scale}
    )
    wanted = [[float(values[m, k]) * float(scale[m // 16, k // 32]) for k in range(80)] for m in range(40)]
    torch.testing.assert_close(packed.dequantize(), torch.tensor(wanted))


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("size", [{"weight_block_size": None}, {}])
def test_fp8_with_one_scale_a_matrix_is_read_under_both_names(name, size):
    """The largest numbers are beyond the default block of 128."""
    values, scale = draw(40, 160).to(torch.float8_e4m3fn), torch.tensor(0.37)
    layout = layout_of({"quant_method": "fp8", "activation_scheme": "static", **size})
    packed = layout.pack("m", {"weight": values, name: scale})
    assert packed.format == Fp8(rounds=True)
    assert torch.equal(packed.dequantize(), values.float() * scale)
    assert torch.equal(layout.pack("m", {"weight": values, name: scale.view(1)}).dequantize(), packed.dequantize())


def fp8(folder: Path, change: Callable[[dict[str, Tensor]], object] = lambda _: None) -> Path:
    """A model in fp8 with one scale for a matrix and one for its activations, as transformers names them."""
    peer("llama", **SHAPE).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for number, module in enumerate([name.removesuffix(".weight") for name in tensors if "_proj." in name]):
        scale = torch.tensor(0.01 * (number + 1))
        tensors[f"{module}.weight"] = (tensors[f"{module}.weight"] / scale).to(torch.float8_e4m3fn)
        tensors |= {f"{module}.weight_scale_inv": scale, f"{module}.activation_scale": torch.tensor(1.0)}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    method = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    config["quantization_config"] = {**method, "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_in_fp8_with_one_scale_a_matrix_is_read_as_transformers_reads_it(tmp_path):
    theirs, ours = AutoModelForCausalLM.from_pretrained(fp8(tmp_path), dtype=torch.float32), hub.load(tmp_path)
    for here, there in zip(ours.layers, theirs.model.layers, strict=True):
        assert torch.equal(here.mlp.down.weight, there.mlp.down_proj.weight)
        assert torch.equal(here.attention.output.weight, there.self_attn.o_proj.weight)
    torch.testing.assert_close(whole(ours, TOKENS), expected(theirs, TOKENS), rtol=1e-5, atol=1e-3)


# gpt-oss's MXFP4.

EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"


def test_gpt_oss_as_it_is_published_is_what_transformers_makes_of_it(tmp_path):
    ours = hub.load(mxfp4(tmp_path), dtype=torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    for number, layer in enumerate(ours.layers):
        for name, matrix in (("gate_up_proj", layer.mlp.gate_up), ("down_proj", layer.mlp.down)):
            stack = f"model.layers.{number}.mlp.experts.{name}"
            wanted = convert_moe_packed_tensors(tensors[f"{stack}_blocks"], tensors[f"{stack}_scales"])
            assert torch.equal(matrix, wanted.mT.float())
    # The same numbers in a folder that has them plainly.
    hub.save(ours, tmp_path / "plain")
    reference = published(tmp_path / "plain")
    torch.testing.assert_close(whole(ours, TOKENS), expected(reference, TOKENS), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{EXPERTS}_blocks"), f"{EXPERTS} lacks {EXPERTS}_blocks"),
        (lambda tensors: tensors.pop(f"{EXPERTS}_scales"), f"{EXPERTS} lacks {EXPERTS}_scales"),
        (
            lambda tensors: tensors.update({f"{EXPERTS}_scales": tensors[f"{EXPERTS}_scales"][:, 1:].contiguous()}),
            r"_blocks in .* is \[5, 192, 2, 16\] and .*_scales \[5, 191, 2\]: they must be",
        ),
        (lambda tensors: tensors.update({f"{EXPERTS}_scales": torch.ones(5, 192, 2)}), "_scales in .* holds F32"),
        (
            lambda tensors: tensors.update(
                {f"{EXPERTS}_{end}": tensors[f"{EXPERTS}_{end}"][:, :-2].contiguous() for end in ("blocks", "scales")}
            ),
            r"gate_up_proj in .* is \[5, 64, 190\], but config.json implies \[5, 64, 192\]",
        ),
    ],
)
def test_what_is_wrong_with_the_experts_of_gpt_oss_is_said(change, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        hub.load(mxfp4(tmp_path, change))


@pytest.mark.parametrize("nested", [False, True])
def test_nf4_of_bitsandbytes_is_read(nested):
    """Its quantiles from their definition: those of a normal distribution, seven below zero and eight above."""
    normal, offset = NormalDist(), 0.9677083
    upper = [normal.inv_cdf(p) for p in torch.linspace(offset, 0.5, 9)[:-1].tolist()]
    lower = [-normal.inv_cdf(p) for p in torch.linspace(offset, 0.5, 8)[:-1].tolist()]
    table = torch.tensor(sorted([*upper, *lower, 0.0]))
    table /= table.max()
    codes, largest = torch.randint(16, (8, 128), generator=torch.Generator().manual_seed(0)), draw(16, seed=1).abs()
    tensors = {
        "weight": (codes.flatten()[::2] << 4 | codes.flatten()[1::2]).to(torch.uint8).view(-1, 1),
        "weight.absmax": largest,
        "weight.quant_map": table,
    }
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 128]}
    if nested:
        code, map_ = torch.arange(16, dtype=torch.uint8), draw(256, seed=2)
        inner = torch.tensor([2.0, 0.5, 1.0, 4.0])
        tensors |= {"weight.absmax": code, "weight.nested_quant_map": map_, "weight.nested_absmax": inner}
        state |= {"nested_blocksize": 4, "nested_offset": 0.25, "nested_dtype": "float32"}
        largest = torch.tensor([float(map_[n]) * float(inner[n // 4]) + 0.25 for n in range(16)])
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    packed = layout_of(config).pack("m", tensors)
    wanted = table[codes] * largest.view(8, 2).repeat_interleave(64, 1)
    torch.testing.assert_close(packed.dequantize(), wanted, rtol=1e-5, atol=1e-5)


# What is wrong.


def edited(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def int8(tmp_path: Path) -> Path:
    written(tmp_path, "int8")
    return tmp_path / "int8"


def configured(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {**config["quantization_config"], **changes}
    path.write_text(json.dumps(config))
    return folder


NAME = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{NAME}.weight"), f"{NAME} lacks weight\n"),
        (lambda tensors: tensors.update({f"{NAME}.weight_scale": torch.ones(5, 1)}), f"scales of {NAME} are"),
        (lambda tensors: tensors.update({f"{NAME}.weight_scale": torch.ones(1, 64)}), f"scales of {NAME} are"),
        (
            lambda tensors: tensors.update({f"{NAME}.weight_scale": torch.ones(64, 1, dtype=torch.int32)}),
            f"scales of {NAME} are torch.int32, and no real numbers",
        ),
        (
            lambda tensors: tensors.update({f"{NAME}.weight": torch.zeros(64, 96, dtype=torch.float16)}),
            f"the weight of {NAME} is torch.float16, which is none that has scales",
        ),
        (lambda tensors: tensors.update({f"{NAME}.weight": torch.zeros(64, 90, dtype=torch.int8)}), "implies"),
        (lambda tensors: tensors.update({f"{NAME}.more": torch.ones(1)}), "also has"),
        (lambda tensors: tensors.pop(f"{NAME}.weight_scale"), f"{NAME} in .* has a weight and lacks weight_scale"),
    ],
)
def test_tensors_that_are_missing_extra_or_misshapen_are_named(int8, change, message):
    with pytest.raises(ModelError, match=message):
        hub.load(edited(int8, change))


def test_packed_weights_that_are_cut_or_without_a_scale_are_named(tmp_path):
    """The header of packed weights tells the rows alone."""
    written(tmp_path, "w4a16")
    folder = tmp_path / "w4a16"
    whole = load_file(folder / "model.safetensors")[f"{NAME}.weight_packed"]
    edited(folder, lambda tensors: tensors.update({f"{NAME}.weight_packed": whole[:-1].contiguous()}))
    with pytest.raises(ModelError, match=r"down_proj\.weight in .* is \[63, \?\], but config\.json implies \[64, 96\]"):
        hub.load(folder)
    edited(folder, lambda tensors: tensors.update({f"{NAME}.weight_packed": whole}))
    with pytest.raises(ModelError, match=f"{NAME} in .* has a weight_packed and lacks weight_scale"):
        hub.load(edited(folder, lambda tensors: tensors.pop(f"{NAME}.weight_scale")))


def test_a_scale_of_an_activation_has_no_part_in_the_weights(int8):
    before = hub.load(int8).state_dict()
    edited(int8, lambda tensors: tensors.update({f"{NAME}.input_scale": torch.ones(1)}))
    assert all(torch.equal(before[name], weight) for name, weight in hub.load(int8).state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "quanto"}, "quantized by 'quanto', which is not supported"),
        ({"format": "nvfp4-pack-quantized"}, "format nvfp4-pack-quantized are not supported"),
        ({"config_groups": {}}, "no group"),
        ({"config_groups": 3}, "malformed"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 8}, "GPTQ of 3 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "only nf4"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "malformed"),
        ({"quant_method": "mxfp4"}, "none has _blocks"),
    ],
)
def test_methods_that_are_not_supported_are_named(int8, config, message):
    with pytest.raises(ModelError, match=message):
        hub.load(configured(int8, **config))


def test_a_scheme_that_does_not_fit_or_is_not_there(tmp_path):
    peer("llama", **SHAPE, num_key_value_heads=2).save_pretrained(tmp_path / "plain")
    decoder = hub.load(tmp_path / "plain")
    with pytest.raises(UsageError, match="there is no scheme 'w4a61': did you mean 'w4a16'"):
        hub.save(decoder, tmp_path / "none", scheme="w4a61")
    peer("llama").save_pretrained(tmp_path / "odd")
    with pytest.raises(ModelError, match="matrices of 40, 48 columns have no groups"):
        hub.save(hub.load(tmp_path / "odd"), tmp_path / "none", scheme="w4a16")
    assert not (tmp_path / "none").exists()


def test_the_command_writes_a_folder_that_is_served_like_the_model(tmp_path, monkeypatch, capsys):
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["penstock", "quantize", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0

    out = tmp_path / "made"
    assert run("python-1m", "--scheme", "int8", "--out", str(out)) == 0
    told = capsys.readouterr()
    assert "1.091 M weights in" in told.out and not told.err
    assert run(str(out), "--scheme", "fp8", "--out", str(tmp_path / "again")) == 0
    assert f"{out} is quantized already" in capsys.readouterr().err
    assert hub.load_tokenizer(out).get_vocab() == hub.load_tokenizer("python-1m").get_vocab()
    assert hub.read_config(out) == hub.read_config(hub.resolve("python-1m"))
    assert run("python-1m", "--scheme", "int8", "--out", str(out)) == 2
    assert "exists already" in capsys.readouterr().err


MEASURE_PACKED = """
import sys, torch
from pathlib import Path
from penstock.models import hub
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.quantized import QuantizedLinear

def memory(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))

torch.set_num_threads(1)
hub.load_for_inference(sys.argv[1])  # imports what it needs
for source in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    decoder = hub.load_for_inference(source)
    print(memory("VmHWM") - before)
    assert sum(isinstance(module, QuantizedLinear) for module in decoder.modules()) >= 40
    del decoder
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory")
@pytest.mark.parametrize("moe", [None, MoEConfig(experts=32, ffn=256)])
def test_opening_a_quantized_model_takes_its_own_bytes_and_one_shard(moe, tmp_path):
    """Of each scheme, with experts and without: at no time are matrices plain numbers."""
    shape = {"vocabulary": 512, "hidden": 512, "layers": 10, "heads": 8, "kv_heads": 4, "head_dim": 64, "ffn": 1536}
    decoder, shard = Decoder(DecoderConfig(**shape, moe=moe)).initialize(0), 12_000_000
    for scheme in SCHEMES:
        hub.save(decoder, tmp_path / scheme, shard_bytes=shard, scheme=scheme)
    line = [sys.executable, "-c", MEASURE_PACKED, *(str(tmp_path / scheme) for scheme in SCHEMES)]
    run = subprocess.run(line, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for scheme, peak in zip(SCHEMES, run.stdout.split(), strict=True):
        size = sum(file.stat().st_size for file in (tmp_path / scheme).glob("*.safetensors"))
        assert int(peak) < size + shard + 12e6, f"{scheme}: {int(peak):,} for {size:,} bytes"
        assert size + shard + 12e6 < 4 * decoder.parameter_count() / 2
