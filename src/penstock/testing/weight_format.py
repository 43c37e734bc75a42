"""The law of ``weight.format``.

Bugs that its clauses are there to catch:

- the example: halves of a byte in the wrong order, a sign or an offset that is lost, a scale of another group or row.
- rows: a scale that belongs to other rows once some were cut off.
- columns: a scale that belongs to other columns; a unit that is cut in two and stands for other numbers then.
- strides: parts that are kept as products want them, and stand for other numbers then.
- product: a kernel that reads other numbers than the format's definition gives, or leaves out what is left over behind
  whole vectors and blocks.
- computes: a format that models have as plain numbers on a CPU, as it has no kernels elsewhere.
- rows that are looked up: another than the one asked for; all of them, made plain for one.
- experts: the matrix of another expert, or that of the wrong product; a stack whose parts lie in several pieces.
- models: a head that is not the embedding to which it is tied, or is in memory beside it; numbers of an embedding in
  another dtype than the rest.
- gradient: one of other rows; numbers that a backward pass would have to keep, where memory is what the format saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.core.errors import UsageError
from penstock.core.randomness import torch_generator
from penstock.models.attention import CausalRows
from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.decoder import Decoder, MixtureOfExperts
from penstock.models.quantized import QuantizedEmbedding, QuantizedExperts, QuantizedLinear, packed_layers
from penstock.models.routers.softmax import SoftmaxRouter
from penstock.ops.quantized.contract import Packed, PackedStack, Parts, WeightFormat, cut
from penstock.ops.quantized.integers import Int8
from penstock.testing.refusals import refused


def check(format: WeightFormat, device: torch.device | str = "cpu") -> None:
    """Asserts the law of ``weight.format`` on the policy's example, and on larger matrices made of its rows."""
    format, parts, matrix = format.example()
    larger = many(parts)  # on the host, where numbers of all kinds can be indexed
    parts, larger = ({name: part.to(device) for name, part in each.items()} for each in (parts, larger))
    wanted = torch.tensor(matrix, dtype=torch.float64, device=device)
    found = format.dequantize(parts)
    assert found.dtype == torch.float32, f"numbers are {found.dtype}"
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
    assert format.shape(parts) == tuple(found.shape), f"the shape is said to be {format.shape(parts)}"
    for dtype in (torch.float32, torch.bfloat16):
        assert format.computes(torch.device("cpu"), dtype), f"models in {dtype} have plain numbers on a CPU"
    check_rows(format, parts, found)
    check_columns(format, parts, found)
    check_lookup(format, larger)
    check_experts(format, larger)
    if torch.device(device).type == "cpu":
        for tied in (True, False):
            check_model(format, parts, tied)
    torch.testing.assert_close(format.dequantize(format.arranged(parts)), found, rtol=0, atol=0)
    for count in (1, 2, 5, 33):
        check_product(format, larger, count)
        check_gradient(format.exact(), larger, count)


def check_rows(format: WeightFormat, parts: Parts, whole: Tensor) -> None:
    """Rows that are cut off stand for the same numbers."""
    for start in range(len(whole)):
        for stop in range(start + 1, len(whole) + 1):
            torch.testing.assert_close(format.dequantize(cut(parts, start, stop)), whole[start:stop], rtol=0, atol=0)


def check_lookup(format: WeightFormat, parts: Parts) -> None:
    """Rows that are looked up, some of them twice, are those of the dequantized matrix, also where it is in pieces of
    several formats; no others are dequantized."""
    whole, dequantized, spied = format.dequantize(parts), list[int](), format.model_copy()

    def noting(parts: Parts) -> Tensor:
        dequantized.append(format.shape(parts)[0])
        return format.dequantize(parts)

    object.__setattr__(spied, "dequantize", noting)
    places = torch.tensor([[4, 0, 36], [4, 11, 35]], device=whole.device)
    values = torch.arange(5 * whole.shape[1], device=whole.device).view(5, -1) % 101
    between = Packed(Int8(), {"values": values.to(torch.int8), "scale": torch.ones(5, 1, device=whole.device)})
    first, last = (Packed(spied, cut(parts, *at)) for at in ((0, 12), (12, 37)))
    for pieces in ([Packed(spied, parts)], [first, between, last]):
        dequantized.clear()
        found = QuantizedLinear(pieces, None).rows(places, torch.float32)
        assert max(dequantized) <= places.numel(), f"for {places.numel()} rows, {max(dequantized)} are dequantized"
        matrix = torch.cat([piece.dequantize() for piece in pieces])
        torch.testing.assert_close(found, matrix[places], rtol=0, atol=0)


def check_experts(format: WeightFormat, parts: Parts) -> None:
    """Products with the matrices of experts, of which one has no rows, are those with what each stands for; in pieces
    that end within a matrix, too. Gradients go through them."""
    parts = cut(parts, 0, 36)
    matrices = format.dequantize(parts).view(4, 9, -1)
    ends = torch.tensor([3, 3, 40, 42], dtype=torch.int32, device=matrices.device)
    x = torch.randn(42, matrices.shape[2], generator=torch_generator(0, "weight.format/experts")).to(matrices.device)
    x.requires_grad_()
    owner = torch.tensor([0] * 3 + [2] * 37 + [3] * 2, device=matrices.device)
    wanted = torch.einsum("nk,nmk->nm", x.double(), matrices.double()[owner])
    (gradient,) = torch.autograd.grad(wanted.sum(), x, retain_graph=True)
    exact = format.exact()
    for pieces in ([Packed(exact, parts)], [Packed(exact, cut(parts, *at)) for at in ((0, 22), (22, 36))]):
        found = PackedStack(pieces, 4).product(x, ends)
        bound = 1e-5 * float(wanted.detach().abs().max())
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=bound)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], gradient, rtol=1e-5, atol=bound)


def check_model(format: WeightFormat, parts: Parts, tied: bool) -> None:
    """A mixture of experts whose matrices are all in the format computes what it does with those that they stand for;
    none of them is in memory twice."""
    width = format.shape(parts)[1]
    moe = MoEConfig(experts=3, ffn=width, router=SoftmaxRouter(top_k=2))
    shape = DecoderConfig(
        vocabulary=37, hidden=width, layers=2, heads=1, kv_heads=1, head_dim=4, ffn=width, tied=tied, moe=moe
    )
    plain, packed = Decoder(shape).initialize(0), Decoder(shape).initialize(0)
    count = 0
    with torch.no_grad():
        for place, (name, parameter) in enumerate(plain.named_parameters()):
            owner, _, part = name.rpartition(".")
            rows = parameter.numel() // width
            if part in ("gate_up", "down") or owner in ("embedding", "head"):
                stored = Packed(format, many(parts, rows, place))
                parameter.copy_(stored.dequantize().view_as(parameter))
                swap(packed, name, stored)
                count += sum(each.nbytes for each in stored.parts.values())
    held = sum(part.nbytes for _, layer in packed_layers(packed) for part in layer.buffers())
    assert held == count, f"{held} bytes are held of matrices that take {count}"
    tokens = torch.randint(37, (2, 9), generator=torch_generator(0, "weight.format/tokens"))
    with torch.no_grad():
        found, wanted = (each.logits(each(tokens, CausalRows.of(9)).hidden) for each in (packed, plain))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        rows = packed.to(torch.bfloat16).embedding(tokens)
    assert rows.dtype == torch.bfloat16, f"a model in bfloat16 looks up rows in {rows.dtype}"
    torch.testing.assert_close(rows, plain.embedding(tokens).bfloat16(), rtol=0, atol=0)


def swap(model: Decoder, name: str, stored: Packed) -> None:
    """Puts ``stored`` in the place of the parameter of that name, and of a head that is tied to it."""
    owner, _, part = name.rpartition(".")
    matrix, module = QuantizedLinear([stored], None), model.get_submodule(owner)
    if isinstance(module, MixtureOfExperts):
        delattr(module, part)
        setattr(module, part, QuantizedExperts(matrix, module.experts))
    else:
        model.set_submodule(owner, QuantizedEmbedding(matrix, torch.float32) if owner == "embedding" else matrix)
        if owner == "embedding" and model.config.shares_head:
            model.set_submodule("head", matrix)


def check_columns(format: WeightFormat, parts: Parts, whole: Tensor) -> None:
    """Columns between two units stand for the same numbers; where a unit would be cut, that is refused."""
    if whole.shape[1] % format.unit == 0:  # of one unit alone nothing could be cut
        parts, whole = {name: part.repeat(1, 2) for name, part in parts.items()}, whole.repeat(1, 2)
    columns = whole.shape[1]
    for start in range(columns):
        for stop in range(start + 1, columns + 1):
            if start % format.unit or (stop % format.unit and stop != columns):
                with refused(UsageError, "stored together"):
                    format.columns(parts, start, stop)
            else:
                found = format.dequantize(format.columns(parts, start, stop))
                torch.testing.assert_close(found, whole[:, start:stop], rtol=0, atol=0)


def many(parts: Parts, count: int = 37, seed: int = 0) -> Parts:
    """The rows of the example again and again, in another order: ``count`` of them."""
    order = torch.randint(len(next(iter(parts.values()))), (count,), generator=torch_generator(seed, "weight.format"))
    return {name: part[order] for name, part in parts.items()}


def check_product(format: WeightFormat, parts: Parts, count: int) -> None:
    """The product of ``count`` rows is that with the dequantized matrix, in float64."""
    matrix = format.dequantize(parts)
    x = torch.randn(count, matrix.shape[1], generator=torch_generator(count, "weight.format/x")).to(matrix.device)
    for dtype in (torch.float32, torch.bfloat16):
        rows = x.to(dtype)
        found, wanted = format.product(rows, parts), rows.double() @ matrix.double().T
        assert found.dtype == dtype, f"the product of {dtype} is {found.dtype}"
        terms = rows.double().abs() @ matrix.double().abs().T
        bound = 4 * torch.finfo(dtype).eps * terms + format.rounding(rows, parts).to(terms)
        over = (found.double() - wanted).abs() - bound
        assert (over <= 0).all(), f"{count} rows of {dtype}: a number is off by {over.max():.3g} more than may be"


def check_gradient(format: WeightFormat, parts: Parts, count: int) -> None:
    """The gradient of ``count`` rows is that of a product with the dequantized matrix, in float64, and nothing is kept
    for it."""
    matrix, draw = format.dequantize(parts), torch_generator(count, "weight.format/gradient")
    x, along = (torch.randn(count, size, generator=draw).to(matrix.device) for size in reversed(matrix.shape))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rows, given, kept = x.to(dtype).requires_grad_(), along.to(dtype), list[Tensor]()
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda none: none):
            out = Packed(format, parts).product(rows)
        assert not kept, f"tensors of {[tuple(each.shape) for each in kept]} are kept for the gradient"
        (found,) = torch.autograd.grad(out, rows, given)
        rounded = 4 * torch.finfo(dtype).eps + len(matrix) * torch.finfo(torch.float64).eps
        bound = rounded * (given.double().abs() @ matrix.double().abs())
        over = (found.double() - given.double() @ matrix.double()).abs() - bound
        assert found.dtype == dtype, f"the gradient of {dtype} is {found.dtype}"
        assert (over <= 0).all(), (
            f"{count} rows of {dtype}: a number of the gradient is off by {over.max():.3g} too much"
        )
