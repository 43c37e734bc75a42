"""The law of ``train.tuner``.

Bugs that its clauses are there to catch:

- beginning: additions that are not nothing at first.
- training: frozen weights that change, as by weight decay; trained ones without a gradient; in the backward pass, an
  addition that is cut off.
- gradient: a part of the loss that is cut off from what it depends on.
- merging: rows of a stacked matrix taken for others; a scale that counts twice or not at all.
- removing: a base that was merged into, and rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.core.errors import UsageError
from penstock.core.randomness import torch_generator
from penstock.data.loader import Batch
from penstock.models.attention import PackedRows
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
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
