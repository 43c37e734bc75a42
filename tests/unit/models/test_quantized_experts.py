"""Embeddings, tied heads and experts that stay in the format that they are stored in compute what plain ones do, and
take no more memory than on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gguf_files import SHAPE, coded, write
from penstock.core.errors import ModelError, UsageError
from penstock.models import hub
from penstock.models.acceptance.head import AcceptanceHead
from penstock.models.adapters.low_rank import attached, merged
from penstock.models.attention import CausalRows
from penstock.models.decoder import Decoder
from penstock.models.quantized import QuantizedEmbedding, QuantizedExperts, packed_layers
from penstock.serve.run.weights import Weights
from penstock.testing.transformers_peer import peer, prompt, stepwise, whole
from penstock.train.tuners.lora import LoRA
from quantized_folders import METHODS, mixture, mxfp4
from tiny_adapters import written

TOKENS = prompt()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that describe GGUF files go into a cache of their own."""
    monkeypatch.setattr("penstock.models.formats.gguf_folder.cache_folder", lambda name: tmp_path / "cache" / name)


def same(packed: Decoder, plain: Decoder) -> None:
    wanted = whole(plain, TOKENS)
    bound = 1e-4 * float(wanted.abs().max())
    torch.testing.assert_close(whole(packed, TOKENS), wanted, rtol=1e-4, atol=bound)
    torch.testing.assert_close(stepwise(packed, TOKENS), wanted, rtol=1e-4, atol=bound)


def gguf(path: Path, kind: str, *, tied: bool) -> Path:
    """A mixture with all matrices in the type ``kind`` but for the routers."""

    def code(name: str, weight: Any) -> Any:
        return coded("F32" if name.endswith("mlp.gate.weight") else kind)(name, weight)

    keys = {**SHAPE, "tie_word_embeddings": tied, "moe_intermediate_size": 256}
    write(path, peer("qwen3_moe", **keys), "qwen3moe", code)
    return path


def plain_matrices(decoder: Decoder) -> list[str]:
    return [name for name, weight in decoder.named_parameters() if weight.dim() > 1 and ".router." not in name]


def held(decoder: Decoder) -> int:
    """Bytes of what matrices are stored in."""
    return sum(part.nbytes for _, layer in packed_layers(decoder) for part in layer.buffers())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_logits_are_those_of_plain_numbers(method, tied, tmp_path):
    folder = mixture(tmp_path / "m", method, tied=tied)
    packed, plain = (load(folder, dtype=torch.float32) for load in (hub.load_for_inference, hub.load))
    assert not plain_matrices(packed)
    assert isinstance(packed.embedding, QuantizedEmbedding)
    assert all(isinstance(layer.mlp.gate_up, QuantizedExperts) for layer in packed.layers)
    assert (packed.head is packed.embedding.matrix) is tied
    assert packed.parameter_count() == plain.parameter_count()
    same(packed, plain)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_so_are_those_of_a_gguf_file_which_takes_the_bytes_that_it_takes_on_disk(kind, tied, tmp_path):
    """The head that is tied to the embedding is in memory once."""
    packed = hub.load_for_inference(gguf(tmp_path / "m.gguf", kind, tied=tied), dtype=torch.float32)
    assert not plain_matrices(packed)
    same(packed, hub.load(tmp_path / "m.gguf", dtype=torch.float32))
    config = packed.config
    each = config.heads * config.head_dim, 2 * config.kv_heads * config.head_dim
    rows = config.layers * (each[0] + each[1] + 3 * 5 * 256) + (1 if tied else 2) * config.vocabulary
    others = config.layers * config.hidden * each[0]
    numbers = rows * config.hidden + others
    bits = {"Q8_0": 8.5, "Q4_0": 4.5, "Q4_K": 4.5, "Q6_K": 6.5625}[kind]
    assert held(packed) == numbers * bits / 8


def test_gpt_oss_is_computed_as_it_is_published(tmp_path):
    """Half a byte for a number, and a float32 in the place of each exponent; clamped, and with biases."""
    folder = mxfp4(tmp_path / "m")
    packed, plain = (load(folder, dtype=torch.float32) for load in (hub.load_for_inference, hub.load))
    assert not [name for name in plain_matrices(packed) if ".mlp." in name and not name.endswith("_bias")]
    same(packed, plain)
    numbers = packed.config.layers * 5 * (2 * 96 * 64 + 64 * 96)
    assert held(packed) == numbers // 2 + 4 * numbers // 32


def test_formats_that_differ_within_a_stack_are_each_read_as_they_are(tmp_path):
    """Gates in more bits than the rest, as some who quantize have them; and a matrix that is plain."""

    def code(name: str, weight: Any) -> Any:
        return coded("F32" if "down" in name or "mlp.gate." in name else "Q6_K" if "gate_proj" in name else "Q4_K")(
            name, weight
        )

    write(tmp_path / "m.gguf", peer("qwen3_moe", **SHAPE, moe_intermediate_size=256), "qwen3moe", code)
    packed = hub.load_for_inference(tmp_path / "m.gguf", dtype=torch.float32)
    mlp: Any = packed.layers[1].mlp
    assert len(mlp.gate_up.matrix.pieces()) == 2 * 5 and isinstance(mlp.down, Tensor)
    same(packed, hub.load(tmp_path / "m.gguf", dtype=torch.float32))


def test_in_bf16_rows_are_rounded_once(tmp_path):
    folder = mixture(tmp_path / "m", "int8", tied=True)
    packed, plain = (load(folder, dtype=torch.bfloat16) for load in (hub.load_for_inference, hub.load))
    assert torch.equal(packed.embedding(TOKENS), plain.embedding(TOKENS))
    assert packed.double().embedding(TOKENS).dtype == torch.float64
    assert torch.equal(packed.embedding(TOKENS), hub.load(folder, dtype=torch.float64).embedding(TOKENS))


@pytest.mark.parametrize("method", ["int8", "nf4", "fp8 in blocks"])
def test_tokens_that_are_not_there_are_an_error_and_none_are_no_rows(method, tmp_path):
    packed = hub.load_for_inference(mixture(tmp_path / "m", method, tied=True))
    with pytest.raises(IndexError):
        packed.embedding(torch.tensor([3, 64]))
    assert packed.embedding(torch.zeros(0, dtype=torch.int64)).shape == (0, 64)


def test_what_is_packed_is_not_written_and_takes_no_other_weights(tmp_path):
    packed = hub.load_for_inference(mixture(tmp_path / "m", "int8", tied=True))
    with pytest.raises(UsageError, match=r"embedding\.matrix is in memory as it is stored, and is not written anew"):
        hub.save(packed, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_what_is_plain_beside_packed_matrices_sleeps_and_comes_back(tmp_path):
    folder = mixture(tmp_path / "m", "gptq", tied=True)
    model = hub.load_for_inference(folder, dtype=torch.float32)
    before, size = whole(model, TOKENS), held(model)
    weights = Weights(model)
    weights.source = lambda: hub.load_for_inference(folder, dtype=torch.float32).state_dict()
    with pytest.raises(UsageError, match="do not take other weights"):
        weights.check()
    weights.release()
    assert not any(weight.numel() for weight in model.parameters()) and held(model) == size
    weights.restore()
    assert torch.equal(whole(model, TOKENS), before)


def test_a_head_that_accepts_drafts_reads_a_packed_drafts_rows(tmp_path):
    folder = mixture(tmp_path / "m", "w4a16", tied=True)
    packed, plain = (load(folder, dtype=torch.float32) for load in (hub.load_for_inference, hub.load))
    head = AcceptanceHead(64).initialize(0)
    torch.nn.init.ones_(head.out.weight)
    hidden = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    found, wanted = (head(draft, hidden, TOKENS.flatten()[:7]) for draft in (packed, plain))
    assert torch.equal(found, wanted) and wanted.abs().min() > 0


def test_a_stack_of_another_shape_is_named(tmp_path):
    folder = mixture(tmp_path / "m", "w4a16", tied=True)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[f"{name}_packed"] = tensors[f"{name}_packed"][:48].contiguous()
    tensors[f"{name}_scale"] = tensors[f"{name}_scale"][:48].contiguous()
    tensors[f"{name}_shape"] = torch.tensor([48, 64])
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"experts.3.up_proj.weight in .* is \[48, \?\], but config.json implies"):
        hub.load_for_inference(folder)


def test_what_an_adapter_adds_to_an_expert_or_the_embedding_is_merged(tmp_path):
    """The matrices that nothing is added to stay as they are stored."""
    folder = mixture(tmp_path / "m", "int8", tied=False)
    added = tmp_path / "adapter"
    written(added, hub.load(folder), 0, base_model_name_or_path=str(folder))
    tensors = load_file(added / "adapter_model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name in ("model.layers.0.mlp.experts.2.down_proj", "model.embed_tokens", "lm_head"):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(3, 64, generator=draw)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(64, 3, generator=draw)
    save_file(tensors, added / "adapter_model.safetensors")
    opened = hub.load_for_inference(added, dtype=torch.float32)
    wanted = whole(hub.load(added, dtype=torch.float32), TOKENS)
    torch.testing.assert_close(whole(opened, TOKENS), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    plain = {name for name in plain_matrices(opened) if ".a." not in name and ".b." not in name}
    assert plain == {"embedding.weight", "head.weight", "layers.0.mlp.down"}


def test_gradients_go_through_experts_beside_which_something_is_trained(tmp_path):
    """As through plain ones; the loss is computed with a plain head."""
    folder, found = mixture(tmp_path / "m", "gptq", tied=True), []
    for load in (hub.load_to_add, hub.load):
        model = load(folder, dtype=torch.float32).double()
        LoRA(rank=3).attach(model, 0)
        draw = torch.Generator().manual_seed(0)
        for _, layer in attached(model):
            for b in layer.b.values():
                b.data.copy_(torch.randn(b.shape, generator=draw))
        assert isinstance(model.layers[0].mlp.gate_up, QuantizedExperts) == (load is hub.load_to_add)
        out = model(TOKENS, CausalRows.of(TOKENS.shape[1]))
        loss = model.logits(out.hidden).square().mean() + out.balance
        found.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
        merged_again = merged(model)
        assert not list(packed_layers(merged_again))
        with torch.no_grad():
            found[-1] += (whole(merged_again, TOKENS),)
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)
