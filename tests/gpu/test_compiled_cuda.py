"""Compiled layers on CUDA: I and W apart, as of layers that are not compiled."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from penstock.models.attention import CausalRows, PackedRows
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.pipeline.run.compiled import compile_layers
from penstock.pipeline.run.split_backward import Deferral
from penstock.train.compiling import once_for_any_documents

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SHAPE = {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 512, "vocabulary": 512}
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)], ids=str)
def test_the_halves_are_those_of_layers_that_are_not_compiled(packed, dtype, tolerance):
    """Relative to the largest entry of a gradient; twelve layers' worth of graphs are two."""
    torch._dynamo.reset()
    counters.clear()
    ours, theirs = (Decoder(DecoderConfig(**SHAPE)).initialize(0).to(DEVICE, dtype) for _ in range(2))
    compile_layers(ours)
    documents = (torch.arange(128) > 50).long().expand(2, 128).to(DEVICE)
    context = PackedRows.of(documents) if packed else CausalRows.of(128, DEVICE)
    hidden = 0.5 * torch.randn(2, 128, 256, device=DEVICE).to(dtype)
    for split in (False, True, True):
        found = []
        for model in (ours, theirs):
            model.zero_grad()
            x = hidden.clone().requires_grad_()
            deferral = Deferral()
            rotary = model.rotary(context.positions, dtype)
            y = x
            if split:
                with deferral:
                    for layer in model.layers:
                        y, _ = layer(y, rotary, context)
            else:
                for layer in model.layers:
                    y, _ = layer(y, rotary, context)
            y.float().square().mean().backward()
            deferral.run()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found.append({"x": x.grad, **gradients})
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[0].items():
            error = (gradient - found[1][name]).abs().max() / found[1][name].abs().max()
            assert error < tolerance, f"{name} is off by {error}"
    assert counters["stats"]["unique_graphs"] == 2


def test_a_loss_is_compiled_once_for_any_number_of_documents():
    torch._dynamo.reset()
    counters.clear()
    model = Decoder(DecoderConfig(**SHAPE)).initialize(0).to(DEVICE, torch.bfloat16)
    tokens = torch.arange(512, device=DEVICE).view(1, 512)

    def loss(model: Decoder, batch: torch.Tensor, context: PackedRows) -> torch.Tensor:
        return model(batch, context).hidden.float().square().mean()

    compiled = once_for_any_documents(loss)
    for length in (300, 100, 20, 4):
        context = PackedRows.of(tokens // length)
        assert compiled(model, tokens, context).item() == pytest.approx(loss(model, tokens, context).item(), rel=1e-2)
    assert counters["stats"]["unique_graphs"] == 1
