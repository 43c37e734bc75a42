"""The law of ``train.tuner``.

Bugs that its clauses are there to catch:

- beginning: additions that are not nothing at first.
- training: frozen weights that change, as by weight decay; trained ones without a gradient; in the backward pass, an
  addition that is cut off.
- gradient: a part of the loss that is cut off from what it depends on.
- merging: rows of a stacked matrix taken for others; a scale that counts twice or not at all.
- removing: a base that was merged into, and rounded.
- quantized: a base of which gradients or merged weights are not those of its numbers; one that is rounded once more
  where weights are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.core.errors import UsageError
from penstock.core.randomness import torch_generator
from penstock.data.loader import Batch
from penstock.models import hub
from penstock.models.adapters import low_rank
from penstock.models.attention import PackedRows
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.models.linear import Linear
from penstock.models.quantized import QuantizedLinear, packed_layers
from penstock.ops.quantized.contract import Packed
from penstock.ops.quantized.integers import Int8
from penstock.testing.train_objective import SHAPE, packed_batch, small_decoder
from penstock.train.objectives.next_token import NextToken
from penstock.train.tuners.contract import Tuner


def check(tuner: Tuner, shape: DecoderConfig = SHAPE) -> None:
    """Asserts the law of ``train.tuner``, in float64."""
    model, batch = small_decoder(shape), packed_batch(rows=3, length=10)
    before, base = outputs(model, batch), {name: p.detach().clone() for name, p in model.named_parameters()}
    tuner.attach(model, 0)
    torch.testing.assert_close(outputs(model, batch), before, rtol=0, atol=0)
    check_training(tuner, model, batch)
    assert not torch.allclose(outputs(model, batch), before), "what was trained changes nothing"
    check_gradient(tuner, model, batch)
    check_merging(tuner, model, batch, set(base))
    tuner.detach(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(base)
    if tuner.adds:
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, base[name]), f"{name} is not what it was"
        assert torch.equal(outputs(model, batch), before)
    if tuner.packs:
        check_quantized(tuner, shape, batch)


def check_quantized(tuner: Tuner, shape: DecoderConfig, batch: Batch) -> None:
    """Beside a base that stays quantized, all is as beside the numbers that it stands for; what is stored does not
    change, not even its dtypes where weights become bf16."""
    packed, plain = both = quantized(shape)
    names, before = {name for name, _ in plain.named_parameters()}, outputs(packed, batch)
    torch.testing.assert_close(before, outputs(plain, batch), rtol=0, atol=1e-9)
    stored = {name: part.clone() for name, part in packed.named_buffers()}
    gradients = []
    for model in both:
        tuner.attach(model, 0)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        draw = torch_generator(0, "testing/tuner/quantized")
        for parameter in trained.values():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
        loss = tuner.loss(NextToken(), model, batch, PackedRows.of(batch.documents))
        gradients.append(dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True)))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)
    check_merging(tuner, packed, batch, names)
    tuner.detach(packed)
    assert torch.equal(outputs(packed, batch), before)
    packed.to(torch.bfloat16)
    for name, part in packed.named_buffers():
        assert torch.equal(part, stored[name]), f"{name} is not what was stored"
    assert next(packed_layers(packed), None) is not None, "the base does not stay quantized"


def quantized(shape: DecoderConfig) -> tuple[Decoder, Decoder]:
    """In float64, a model whose layers have matrices that are stored as 8-bit integers, and one that has the numbers
    which these stand for."""
    packed, plain = small_decoder(shape), small_decoder(shape)
    for name in low_rank.linears(packed, hub.family_of(packed)):
        layer = plain.get_submodule(name)
        assert isinstance(layer, Linear)
        weight = layer.weight.data
        scale = weight.abs().amax(1, keepdim=True).float() / 127
        stored = Packed(Int8(), {"values": (weight / scale).round().to(torch.int8), "scale": scale})
        weight.copy_(stored.dequantize())
        packed.set_submodule(name, QuantizedLinear([stored], layer.bias))
    return packed, plain


def check_merging(tuner: Tuner, model: Decoder, batch: Batch, names: set[str]) -> None:
    """A plain model, of parameters of those ``names``, computes the same; or that is refused."""
    if not tuner.merges:
        try:
            tuner.merged(model)
        except UsageError as error:
            assert error.hint, "that nothing can be merged is told without what to do"
            return
        raise AssertionError("something was merged, though the tuner says that nothing can be")
    tuned = outputs(model, batch)  # before, since merging must not change it
    plain = tuner.merged(model)
    assert {name for name, _ in plain.named_parameters()} == names, "a merged model has parameters of its own"
    torch.testing.assert_close(outputs(plain, batch), tuned, rtol=0, atol=1e-9)


def check_gradient(tuner: Tuner, model: Decoder, batch: Batch) -> None:
    """The gradient of the loss along a random direction equals a central difference."""
    trained = [p for p in model.parameters() if p.requires_grad]
    context, draw = PackedRows.of(batch.documents), torch_generator(0, "testing/tuner/direction")
    along = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in trained]

    def loss() -> Tensor:
        return tuner.loss(NextToken(), model, batch, context)

    def moved(by: float) -> float:
        with torch.no_grad():
            for p, direction in zip(trained, along, strict=True):
                p.add_(direction, alpha=by)
            return loss().item()

    gradients = torch.autograd.grad(loss(), trained)
    wanted = sum((each * direction).sum().item() for each, direction in zip(gradients, along, strict=True))
    step = 1e-6
    found = (moved(step) - moved(-2 * step)) / (2 * step)
    moved(step)
    assert abs(found - wanted) <= 1e-7 * max(1.0, abs(wanted)), f"the gradient is {wanted}, and a difference {found}"


def check_training(tuner: Tuner, model: Decoder, batch: Batch) -> None:
    """A few updates of everything that is to be trained, which change that and no other."""
    former = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.5)
    draw = torch_generator(0, "testing/tuner")
    for _ in range(3):
        tokens = torch.randint(model.config.vocabulary, batch.tokens.shape, generator=draw)
        optimizer.zero_grad()
        given = Batch(tokens, batch.targets, batch.documents)
        tuner.loss(NextToken(), model, given, PackedRows.of(batch.documents)).backward()  # type: ignore[no-untyped-call]
        missing = [name for name, p in trained.items() if p.grad is None]
        assert not missing, f"no gradient reaches {', '.join(missing)}"
        optimizer.step()
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, former[name])
        assert changed == (name in trained), f"{name} {'changed' if changed else 'did not change'}"


@torch.no_grad()
def outputs(model: Decoder, batch: Batch) -> Tensor:
    """The scores of the next token for each of the batch's."""
    return model.logits(model(batch.tokens, PackedRows.of(batch.documents)).hidden)
