"""Models whose matrices stay in the format that they are stored in compute what they do with plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gguf_files import SHAPE, coded, write
from penstock.core.errors import ModelError
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.models.formats.schemes import SCHEMES
from penstock.models.quantized import QuantizedLinear
from penstock.ops.quantized.contract import Packed
from penstock.ops.quantized.fp8 import Fp8
from penstock.ops.quantized.ggml import Ggml
from penstock.serve.config import EngineConfig
from penstock.serve.opening import open_engine
from penstock.testing.transformers_peer import peer, prompt, stepwise, whole

TOKENS = prompt()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that describe GGUF files go into a cache of their own."""
    monkeypatch.setattr("penstock.models.formats.gguf_folder.cache_folder", lambda name: tmp_path / "cache" / name)


def mixed(name: str, weight: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """As in Q4_K_M: values and the way back in more bits than queries and keys."""
    return coded("Q6_K" if "v_proj" in name or "down" in name else "Q4_K")(name, weight)


def quantized(decoder: Decoder) -> list[str]:
    return [name for name, module in decoder.named_modules() if isinstance(module, QuantizedLinear)]


def same(packed: Decoder, plain: Decoder) -> None:
    wanted = whole(plain, TOKENS)
    torch.testing.assert_close(whole(packed, TOKENS), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    torch.testing.assert_close(stepwise(packed, TOKENS), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_plain_matrices(family, tied, tmp_path):
    """Of a GGUF file with several types, with biases and norms of heads, and a head of its own or none."""
    write(tmp_path / "m.gguf", peer(family, **{**SHAPE, "tie_word_embeddings": tied}), family, mixed)
    packed = hub.load_for_inference(tmp_path / "m.gguf")
    assert len(quantized(packed)) == 3 * 4 + (1 if tied else 2)
    same(packed, hub.load(tmp_path / "m.gguf"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_so_are_those_of_each_scheme(scheme, tmp_path):
    keys = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    peer("llama", **keys).save_pretrained(tmp_path / "plain")
    hub.save(hub.load(tmp_path / "plain"), tmp_path / scheme, scheme=scheme)
    packed = hub.load_for_inference(tmp_path / scheme)
    assert len(quantized(packed)) == 3 * 4
    same(packed, hub.load(tmp_path / scheme))


def test_parts_lie_as_products_on_a_device_want_them():
    """Also where matrices are joined, and after they were moved."""
    format, draw = Fp8(group=128, rounds=True), torch.Generator().manual_seed(0)
    scales = [torch.rand(rows, 2, generator=draw) for rows in (16, 32)]
    values = [torch.zeros(len(scale), 256).to(torch.float8_e4m3fn) for scale in scales]
    pieces = [Packed(format, {"values": v, "scale": s}) for v, s in zip(values, scales, strict=True)]
    layer = QuantizedLinear(pieces, None)
    (kept,) = layer.pieces()
    assert kept.parts["scale"].stride() == (2, 1) and torch.equal(kept.parts["scale"], torch.cat(scales))
    (moved,) = layer.to("meta").pieces()
    assert moved.parts["scale"].stride() == (1, 48)
    assert [name for name, _ in layer.named_buffers()] == ["values_0", "scale_0"]


def test_matrices_are_plain_where_the_device_does_not_compute_in_their_format(tmp_path, monkeypatch):
    """Of a file with two formats, those in one of them."""
    monkeypatch.setattr(Ggml, "computes", lambda self, device, dtype: self.kind == "Q6_K" and dtype is torch.float32)
    write(tmp_path / "m.gguf", peer("llama", **SHAPE), "llama", mixed)
    packed = hub.load_for_inference(tmp_path / "m.gguf")
    # Queries, keys and values are one matrix here.
    assert quantized(packed) == [name for name in quantized(packed) if name.endswith("mlp.down")] != []
    same(packed, hub.load(tmp_path / "m.gguf"))
    assert quantized(hub.load_for_inference(tmp_path / "m.gguf", dtype=torch.bfloat16)) == []


def test_it_takes_the_bytes_that_it_takes_on_disk(tmp_path):
    write(tmp_path / "m.gguf", peer("llama", **SHAPE), "llama", coded("Q4_0"))
    packed = hub.load_for_inference(tmp_path / "m.gguf")
    for name in quantized(packed):
        module: Any = packed.get_submodule(name)
        rows, columns = (sum(piece.shape[0] for piece in module.pieces()), module.pieces()[0].shape[1])
        assert sum(buffer.nbytes for buffer in module.buffers()) == rows * columns * 18 // 32
        assert not any(weight.dim() > 1 for weight in module.parameters())


def test_plain_folders_are_as_they_were():
    assert quantized(hub.load_for_inference("python-1m")) == []


def test_a_deterministic_engine_has_plain_matrices(tmp_path):
    hub.save(hub.load("python-1m"), tmp_path / "made", scheme="int8")
    hub.load_tokenizer("python-1m").save_pretrained(tmp_path / "made")
    small = {"cache_tokens": 64, "sequences": 2, "tokens": 16}
    engines = [open_engine(tmp_path / "made", EngineConfig(**small, deterministic=each), "cpu") for each in (0, 1)]
    models: list[Any] = [engine.executor.model for engine in engines]
    assert [len(quantized(model)) > 0 for model in models] == [True, False]


def test_a_matrix_of_another_shape_is_named(tmp_path):
    write(tmp_path / "m.gguf", peer("llama", **SHAPE), "llama", coded("Q8_0"))
    folder = hub.resolve(tmp_path / "m.gguf")
    index = folder / "gguf.json"
    index.write_text(index.read_text().replace("256,\n        256", "255,\n        256", 1))
    with pytest.raises(ModelError, match=r"is \[255, 256\], but config.json implies \[256, 256\]"):
        hub.load_for_inference(folder)
