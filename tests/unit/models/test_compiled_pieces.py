"""A pass in compiled pieces: how many are compiled, and that each layer is at its own place all the same."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from penstock.models.config import DecoderConfig, MoEConfig
from penstock.models.decoder import Decoder
from penstock.models.pieces import AtPlace, CompiledPieces
from penstock.models.tapped import TappedDecoder
from penstock.ops.attention import PLAIN, Extras

LAYERS = 7
SHAPE = DecoderConfig(vocabulary=31, hidden=16, layers=LAYERS, heads=4, kv_heads=2, head_dim=4, ffn=24)
MIXED = MoEConfig(experts=4, ffn=16)


@dataclasses.dataclass(frozen=True)
class ByLayer:
    """Attention of which only the layer is known that it is of, and the window."""

    positions: Tensor
    keeps: bool = True

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        extras: Extras = PLAIN,
    ) -> Tensor:
        return query * (1 + layer) / (1 if window is None else window)


@pytest.fixture
def compiled(monkeypatch) -> Iterator[list[int]]:
    """The sizes of the graphs that are compiled, each as it is."""
    sizes: list[int] = []

    def take(graph: torch.fx.GraphModule, given: list) -> torch.fx.GraphModule:
        sizes.append(len(graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=take))
    with torch._dynamo.config.patch(recompile_limit=8):
        yield sizes
    torch._dynamo.reset()


def model(**changes) -> Decoder:
    config = DecoderConfig.model_validate({**SHAPE.model_dump(), **changes})
    return Decoder(config).double().initialize(0).eval()


def test_each_piece_is_traced_once(monkeypatch):
    """Not once more behind what PyTorch takes for variables at first: a start with all compiled took twice as long."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    counts = torch._dynamo.utils.counters["stats"]
    before = counts["calls_captured"]
    check(model(), CompiledPieces())
    once = counts["calls_captured"] - before
    torch._dynamo.reset()
    with torch._dynamo.config.patch(specialize_float=False):
        pieces = CompiledPieces()
        torch._dynamo.config.specialize_float = False
        check(model(), pieces)
    assert counts["calls_captured"] - before - once > 1.5 * once
    torch._dynamo.reset()


@torch.inference_mode()
def check(decoder: Decoder, pieces: CompiledPieces) -> None:
    for count in (5, 9, 3):
        tokens, context = torch.arange(count), ByLayer(torch.arange(count))
        for found, wanted in zip(decoder.trunk(tokens, context, pieces), decoder.trunk(tokens, context), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    # Beside the beginning: what lies between layers that are all alike; between those with a window and without, both
    # ways; and behind dense layers, and behind sparse ones.
    [
        ({}, 1),
        ({"window": 3, "windowed_layers": (0, 2, 4, 6)}, 2),
        ({"moe": MIXED.model_copy(update={"dense_layers": (0, 1)})}, 2),
    ],
)
def test_layers_that_are_alike_are_compiled_once(changes, kinds, compiled):
    decoder = model(**changes)
    check(decoder, CompiledPieces())
    assert len(compiled) == 1 + kinds
    # Of another model of this shape, and another cache, as little as of more tokens.
    check(model(**changes), CompiledPieces())
    assert len(compiled) == 1 + kinds


def multiplied(by: Tensor, module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
    return out * by


def added(what: Tensor, module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
    return out + what


def hooked(change: Callable[..., Tensor]) -> Decoder:
    """A model whose layers differ in what a ``change`` makes of what attention gives."""
    decoder = model()
    for number, layer in enumerate(decoder.layers):
        factor = torch.tensor(1.5 + number / 10, dtype=torch.float64)
        layer.attention.output.register_forward_hook(functools.partial(change, factor))
    return decoder


def test_what_stands_behind_modules_is_compiled_once_too(compiled):
    check(hooked(multiplied), CompiledPieces())
    assert len(compiled) == 2


def test_what_is_compiled_is_not_taken_for_a_model_with_something_else_behind_its_modules(compiled):
    """In whichever order they come, each is compiled once."""
    made = {"nothing": model, "multiplied": lambda: hooked(multiplied), "added": lambda: hooked(added)}
    for order in itertools.permutations(made):
        torch._dynamo.reset()
        compiled.clear()
        for name in (*order, *order):
            check(made[name](), CompiledPieces())
        assert len(compiled) == 1 + len(made), f"in the order {order}"  # what comes before attention is the same


def test_states_between_layers_are_there_too(compiled):
    check(TappedDecoder(model(), 3), CompiledPieces())
    assert len(compiled) == 2


def test_more_kinds_than_pytorch_expects_are_compiled(compiled):
    for size in range(3, 15):  # each compiles anew
        decoder = Decoder(SHAPE.model_copy(update={"ffn": 8 * size})).double().initialize(0).eval()
        check(decoder, CompiledPieces())
    assert len(compiled) >= 12
    assert torch._dynamo.config.recompile_limit > 12


def test_a_layer_is_at_its_place_whichever_asks():
    context = ByLayer(torch.arange(4))
    placed, x = AtPlace(context, 5), torch.ones(4, 2, 3)
    assert placed.positions is context.positions and placed.keeps
    found = placed.attend(0, x, x, x, scale=1.0, window=2)
    assert torch.equal(found, 3 * x)
