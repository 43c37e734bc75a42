"""The precisions: what multiplies, what is updated, and that small updates are not lost."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.data.samplers.shuffle import Shuffle
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.train.precision import Weights
from penstock.train.run import Run
from tiny_runs import MODEL, VOCABULARY, config

MOE = {"experts": 4, "ffn": 24, "router": {"name": "sigmoid", "top_k": 2}}


def decoder(**changes) -> Decoder:
    return Decoder(DecoderConfig(**{**MODEL, "vocabulary": VOCABULARY, **changes})).initialize(0)


@pytest.mark.parametrize("tied", [False, True])
def test_masters_are_the_parameters_or_beside_them(tied):
    for precision in ("fp32", "autocast"):
        model = decoder(tied=tied)
        weights = Weights(model, precision)
        assert weights.masters == dict(model.named_parameters())
        assert not weights.separate
    model = decoder(tied=tied)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    weights = Weights(model, "bf16")
    assert weights.separate
    assert ("head.weight" in weights.masters) is not tied
    assert (model.head.weight is model.embedding.weight) is tied
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close({n: m.detach() for n, m in weights.masters.items()}, before, rtol=0, atol=0)
    assert all(torch.equal(p, weights.masters[n].bfloat16()) for n, p in model.named_parameters())
    assert model.rotary[0].frequencies.dtype == torch.float32


def test_selection_biases_are_not_trained():
    """They are moved by a rule of their own, and are in no optimizer."""
    model = decoder(moe=MOE)
    assert any("selection_bias" in name for name, _ in model.named_parameters())
    for precision in ("fp32", "bf16"):
        assert not any("selection_bias" in name for name in Weights(decoder(moe=MOE), precision).masters)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("autocast", torch.bfloat16)])
def test_what_multiplies(precision, dtype):
    model = decoder()
    with Weights(model, precision).arithmetic(torch.device("cpu")):
        assert model.head(torch.ones(1, 32)).dtype == dtype


def test_gradients_of_bf16_weights_add_up_in_fp32():
    """A thousand gradients of 2^-9 beside one of 1: bf16 itself would lose every one of them."""
    model = decoder()
    weights = Weights(model, "bf16")
    norm = model.norm.weight
    for value in [1.0, *[2**-9] * 1000]:
        norm.grad = torch.full_like(norm, value)
        weights.collect_gradients()
    assert norm.grad is None
    assert torch.equal(weights.masters["norm.weight"].grad, torch.full((32,), 1 + 1000 / 512))
    assert weights.masters["head.weight"].grad is None


class Calls(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counted[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("together", [1, 2000, 2**26])
def test_gradients_are_collected_by_few_operators(monkeypatch, together):
    """Each in fp32, twice with what was there before; for all of them together where they are few enough."""
    monkeypatch.setattr("penstock.train.precision.TOGETHER", together)
    model = decoder()
    weights = Weights(model, "bf16")
    wanted: dict[str, torch.Tensor] = {}
    for step in range(3):
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if step or number % 2:  # some have none at first
                drawn = torch.Generator().manual_seed(100 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=drawn).bfloat16()
                wanted[name] = wanted.get(name, 0) + parameter.grad.float()
        with Calls() as calls:
            weights.collect_gradients()
        assert all(parameter.grad is None for parameter in model.parameters())
        if together == 2**26:
            assert calls.counted["_foreach_copy_"] == 1
            assert calls.counted["_foreach_add_"] == (step > 0)
            assert calls.counted.keys() <= {"_foreach_copy_", "_foreach_add_", "empty_like", "detach"}
    assert wanted.keys() == weights.masters.keys()
    for name, master in weights.masters.items():
        assert torch.equal(master.grad, wanted[name])


def test_updates_too_small_for_bf16_add_up_in_the_masters():
    model = decoder()
    weights = Weights(model, "bf16")
    with torch.no_grad():
        for _ in range(8):
            weights.masters["norm.weight"] += 2**-10
            weights.publish()
    assert torch.equal(model.norm.weight, torch.full((32,), 1 + 2**-7, dtype=torch.bfloat16))


def test_loading_replaces_masters_and_weights():
    model = decoder()
    weights = Weights(model, "bf16")
    weights.load({name: torch.full_like(master, 1 / 3) for name, master in weights.masters.items()})
    assert all(torch.equal(p, torch.full_like(p, 1 / 3)) for p in model.parameters())
    assert torch.equal(weights.masters["norm.weight"], torch.full((32,), 1 / 3))


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_low_precision_follows_the_loss_of_fp32(store, tmp_path, precision):
    """Twenty updates, within what eight bits of mantissa allow."""
    losses = {}
    for kind in ("fp32", precision):
        trainer = Run.create(config(store, steps=20, precision=kind), tmp_path / kind).trainer
        assert isinstance(trainer.config.data.sampler, Shuffle)
        losses[kind] = []
        trainer.train(lambda report, curve=losses[kind]: curve.append(report.loss))
    assert losses["fp32"][-1] < losses["fp32"][0] - 0.2
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.01)
    assert losses[precision] != losses["fp32"]
