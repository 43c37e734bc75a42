"""Quantized matrices on a CUDA device: products by any number of rows, in graphs, and in an engine."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from penstock.models import hub
from penstock.models.attention import CausalRows
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.quantized import QuantizedExperts, QuantizedLinear
from penstock.ops.quantized import cuda
from penstock.ops.quantized.codebook import Codebook4
from penstock.ops.quantized.contract import Packed, PackedStack, Parts, WeightFormat
from penstock.ops.quantized.fp8 import Fp8
from penstock.ops.quantized.integers import Int4, Int8
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.offline.llm import LLM
from penstock.testing.enrolled import enrolled
from penstock.testing.weight_format import check
from quantized_folders import mixture, mxfp4

pytest.importorskip("triton")
from penstock.ops.quantized import packed_kernel, rounded_kernel

pytestmark = pytest.mark.gpu

#: Around all numbers of rows from which on others multiply.
COUNTS = (1, 2, 16, 17, cuda.FEW_BY_BLOCK, cuda.FEW_BY_BLOCK + 1, cuda.FEW, cuda.FEW + 1, 128, cuda.SOME, cuda.SOME + 1)
FORMATS: list[WeightFormat] = [
    *(Int4(group=group) for group in (None, 32, 64, 128)),
    *(Int8(group=group) for group in (None, 32, 128)),
    *(Fp8(group=group, rounds=rounds) for group in (None, 128) for rounds in (False, True)),
    Codebook4(table="fp4", group=32),
]


def random(format: Any, rows: int, columns: int, shifted: bool = False) -> Parts:
    """A matrix [rows, columns] of random bits and scales."""
    draw = torch.Generator().manual_seed(rows)
    width = columns // 2 if isinstance(format, Int4 | Codebook4) else columns
    values = torch.randint(256, (rows, width), generator=draw).to(torch.uint8)
    if isinstance(format, Fp8):  # no NaN
        values = torch.where(values & 127 == 127, 0, values).to(torch.uint8).view(torch.float8_e4m3fn)
    if isinstance(format, Int8):
        values = values.view(torch.int8)
    shape = (rows, -(-columns // format.group) if format.group else 1)
    parts = {"values": values, "scale": torch.rand(shape, generator=draw)}
    parts |= {"offset": torch.randn(shape, generator=draw)} if shifted else {}
    return {name: part.cuda() for name, part in parts.items()}


@pytest.mark.parametrize("name", enrolled("weight.format"))
def test_the_law_of_weight_formats_holds(name: str) -> None:
    check(enrolled("weight.format")[name], "cuda")


@pytest.mark.parametrize("shape", [(256, 512), (77, 384), (80, 448), (4096, 1536), (6144, 4096), (16, 160)])
@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_products_are_those_with_the_dequantized_matrix(format: Any, shape: tuple[int, int]) -> None:
    """Up to bfloat16's rounding of the result and of the matrix, and that of rows to e4m3 where they are rounded."""
    for shifted, count in itertools.product((False, True), COUNTS):
        if shifted and isinstance(format, Fp8 | Codebook4):
            continue
        parts = format.arranged(random(format, *shape, shifted))
        x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(count)).cuda().bfloat16()
        found, matrix = format.product(x, parts), format.dequantize(parts).double()
        wanted, terms = x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
        over = (found.double() - wanted).abs() - 2**-7 * wanted.abs() - 2**-8 * terms - format.rounding(x, parts)
        assert found.dtype == torch.bfloat16
        assert (over <= 0).all(), f"{count} rows: off by {over.max():.3g} more than may be"


@pytest.mark.parametrize("format", [Int4(group=128), Int8(), Fp8(), Fp8(group=128)], ids=repr)
def test_few_rows_are_multiplied_as_exactly_as_in_float32(format: Any) -> None:
    parts = format.arranged(random(format, 512, 4096))
    x = torch.randn(16, 4096, generator=torch.Generator().manual_seed(0)).cuda().bfloat16()
    found, matrix = format.product(x, parts).double(), format.dequantize(parts).double()
    wanted, terms = x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
    assert ((found - wanted).abs() <= 2**-8 * wanted.abs() + 2**-16 * terms).all()


@pytest.mark.parametrize("kind", ["int4", "int8", "e4m3"])
def test_tiles_fit_into_the_device(kind: str) -> None:
    """With all sizes of groups, with offsets and without."""
    made = {"int4": Int4, "int8": Int8, "e4m3": Fp8}[kind]
    for group, shifted, count in itertools.product((None, 32, 64, 128), (False, True), (16, 32, 64, 200)):
        if shifted and made is Fp8:
            continue
        parts = random(made(group=group), 96, 4096, shifted)
        x = torch.randn(count, 4096, generator=torch.Generator().manual_seed(count)).cuda().bfloat16()
        own = parts["values"], parts["scale"], parts.get("offset"), group or cuda.WHOLE
        found, matrix = packed_kernel.product(kind, x, *own).double(), made(group=group).dequantize(parts).double()
        wanted, terms = x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
        assert ((found - wanted).abs() <= 2**-8 * wanted.abs() + 2**-16 * terms).all()


@pytest.mark.parametrize("rows", [17, 40, 256, 1000])
def test_products_in_e4m3_by_block_are_those_with_rounded_rows(rows: int) -> None:
    """As exact as sums in float32 that keep few bits in between, and the same whether or not scales were arranged."""
    if not cuda.multiplies_blocks(torch.device("cuda", 0)):
        pytest.skip("no library multiplies by block here")
    format = Fp8(group=128, rounds=True)
    parts = random(format, 528, 1536)
    x = torch.randn(rows, 1536, generator=torch.Generator().manual_seed(rows)).cuda().bfloat16()
    values, scale = rounded_kernel.rounded(x, 128)
    given = format.dequantize({"values": values, "scale": scale})[:rows].double()
    found = rounded_kernel.product(x, parts["values"], parts["scale"], 128)
    wanted, terms = given @ format.dequantize(parts).double().T, given.abs() @ format.dequantize(parts).double().abs().T
    assert ((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 2**-11 * terms).all()
    assert torch.equal(found, rounded_kernel.product(x, parts["values"], cuda.arranged(parts["scale"]), 128))


def test_scales_are_arranged_once_and_stay_so_while_an_engine_sleeps() -> None:
    format = Fp8(group=128, rounds=True)
    layer = QuantizedLinear([_packed(format, 96, 256), _packed(format, 160, 256)], None)
    (kept,) = layer.pieces()
    assert kept.parts["scale"].is_cuda and kept.parts["scale"].stride() == (1, 256)
    away = torch.empty_like(kept.parts["scale"], device="cpu", pin_memory=True).copy_(kept.parts["scale"])
    assert away.to("cuda", copy=True).stride() == (1, 256)


@pytest.mark.parametrize("format", FORMATS, ids=repr)
@torch.inference_mode()
def test_graphs_compute_what_was_there_when_they_are_replayed(format: Any) -> None:
    parts = random(format, 256, 512)
    for count in (1, 16, 65, 513):
        x = torch.zeros(count, 512, dtype=torch.bfloat16, device="cuda")
        format.product(x, parts)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = format.product(x, parts)
        x.normal_()
        graph.replay()
        assert torch.equal(out, format.product(x, parts))


@torch.inference_mode()
def test_a_compiled_layer_is_compiled_once_for_all_numbers_of_rows() -> None:
    layer = QuantizedLinear([_packed(Int4(group=64), 96, 128), _packed(Fp8(rounds=True), 160, 128)], None).cuda()
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer, dynamic=True, fullgraph=True)
    for count in (2, 5, 64, 65, 600):
        x = torch.randn(count, 128, device="cuda").bfloat16()
        assert torch.equal(compiled(x), layer(x))
    assert counters["stats"]["unique_graphs"] == 1


def _packed(format: Any, rows: int, columns: int) -> Packed:
    return Packed(format, random(format, rows, columns))


def written(folder: Path, scheme: str) -> Path:
    """A small model of random weights in a scheme, with python-6m's tokenizer."""
    shape = DecoderConfig(vocabulary=4096, hidden=256, layers=3, heads=4, kv_heads=2, head_dim=64, ffn=768, context=512)
    hub.save(Decoder(shape).initialize(0), folder / scheme, scheme=scheme)
    hub.load_tokenizer("python-6m").save_pretrained(folder / scheme)
    return folder / scheme


@pytest.mark.parametrize("scheme", ["fp8", "int8", "w4a16"])
def test_a_model_stays_as_it_is_stored_and_computes_what_it_stands_for(tmp_path: Path, scheme: str) -> None:
    folder = written(tmp_path, scheme)
    packed = hub.load_for_inference(folder, device="cuda", dtype=torch.bfloat16).eval()
    plain = hub.load(folder, device="cuda", dtype=torch.float32).eval()
    layers = [module for module in packed.layers.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 4 * packed.config.layers
    assert all(part.is_cuda for layer in layers for part in layer.buffers())
    tokens = torch.arange(200, device="cuda")[None] % packed.config.vocabulary
    found, wanted = (_scores(model, tokens) for model in (packed, plain))
    # Rounding of activations, to bf16 and, of more than a few dozen, to e4m3.
    assert (found - wanted).abs().mean() < (0.2 if scheme == "fp8" else 0.1) * wanted.std()
    exact = hub.load_for_inference(folder, device="cuda", dtype=torch.float32)
    assert not any(isinstance(module, QuantizedLinear) for module in exact.modules())


@pytest.mark.parametrize("method", ["gptq", "w4a16", "int8", "fp8 in blocks", "mxfp4"])
def test_the_experts_of_a_mixture_stay_as_they_are_stored(tmp_path: Path, method: str) -> None:
    """With the embedding to which the head is tied, where that is quantized; for few tokens and for many."""
    folder = mxfp4(tmp_path / "m", ffn=128) if method == "mxfp4" else mixture(tmp_path / "m", method, tied=True)
    packed = hub.load_for_inference(folder, device="cuda", dtype=torch.bfloat16).eval()
    plain = hub.load(folder, device="cuda", dtype=torch.float32).eval()
    for layer in packed.layers:
        assert isinstance(layer.mlp.gate_up, QuantizedExperts) and isinstance(layer.mlp.down, QuantizedExperts)
    assert method == "mxfp4" or packed.head is packed.embedding.matrix
    for count in (1, 40):
        tokens = torch.arange(count, device="cuda")[None] % 60
        found, wanted = (_scores(model, tokens) for model in (packed, plain))
        # Of rounding to bf16 a token may go to another expert.
        off = (found - wanted).abs().mean(-1) / wanted.std()
        assert off.median() < (0.2 if method.startswith("fp8") else 0.1)


@torch.inference_mode()
def test_products_with_experts_are_captured_in_graphs() -> None:
    """They wait for nothing, and where rows go is read anew in each replay."""
    stack = PackedStack([_packed(Int4(group=64), 4 * 96, 256)], 4)
    x = torch.randn(24, 256, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([3, 3, 20, 24], dtype=torch.int32, device="cuda")
    stack.product(x, ends)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stack.product(x, ends)
    for new in ([3, 3, 20, 24], [0, 12, 13, 24], [24, 24, 24, 24]):
        ends.copy_(torch.tensor(new))
        graph.replay()
        matrices = stack.pieces[0].dequantize().view(4, 96, 256)
        owner = torch.searchsorted(ends, torch.arange(24, device="cuda"), right=True)
        wanted = torch.einsum("nk,nmk->nm", x.float(), matrices[owner])
        torch.testing.assert_close(out.float(), wanted, rtol=2**-7, atol=2**-7 * float(wanted.abs().max()))


@torch.inference_mode()
def _scores(model: Any, tokens: Tensor) -> Tensor:
    found: Tensor = model.logits(model(tokens, CausalRows.of(tokens.shape[1], tokens.device)).hidden).float()
    return found


@pytest.mark.parametrize("scheme", ["fp8", "int8", "w4a16"])
def test_an_engine_with_graphs_says_the_same_after_it_has_slept(tmp_path: Path, scheme: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=32)
    with LLM(written(tmp_path, scheme), device="cuda", cache_tokens=8192, sequences=16, compile=True) as llm:
        prompts = ["def add(", "class Stack:", "import os"]
        before = [result.outputs[0].token_ids for result in llm.generate(prompts, params)]
        weights = [part for module in llm.engine.executor.model.modules() for part in _stored(module)]
        llm.sleep()
        assert not any(part.numel() for part in weights)
        llm.wake()
        assert all(part.numel() for part in weights)
        assert [result.outputs[0].token_ids for result in llm.generate(prompts, params)] == before


def _stored(module: Any) -> list[Tensor]:
    return list(module.buffers()) if isinstance(module, QuantizedLinear) else []
