"""Layers that are compiled, and whose backward passes are still in two halves, I and W.

A compiler makes one graph of a layer's backward pass, in which the gradients of weights come when they come. So a layer
is compiled without them: each product with a trained matrix takes two more inputs, *probes*, which it does not read,
and says that their gradients are its activation and the gradient of its output. The compiled backward pass is then I,
with all that the compiler can fuse, and what it leaves in the probes is what W multiplies. W itself is nothing but
products, which a library computes and a compiler would not improve.

All layers of one shape share one graph, so that compiling takes as long for many as for one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.models.attention import AttentionContext
from penstock.models.decoder import Decoder, Layer
from penstock.models.linear import Linear
from penstock.models.rotary import Turns
from penstock.pipeline.run.split_backward import Deferral

#: What a layer makes of hidden states, rotary angles and a context.
Forward = Callable[[Layer, Tensor, Turns, AttentionContext], tuple[Tensor, Tensor | None]]


def compile_layers(model: Decoder) -> None:
    """Compiles the layers that are here, from their next pass on: one graph for plain backward passes, and one for
    those inside of a :class:`~penstock.pipeline.run.split_backward.Deferral`.

    Of mixtures of experts, the gradients of the experts' matrices stay with I.
    """
    plain: Forward = torch.compile(_forward, dynamic=False, fullgraph=True)
    probed = torch.compile(_probed_forward, dynamic=False, fullgraph=True)
    for layer in model.layers:
        if isinstance(layer, Layer):
            for module in layer.modules():
                if type(module) is Linear:
                    module.__class__ = _ProbedLinear
            layer.forward = _CompiledLayer(layer, plain, probed)  # type: ignore[method-assign]


def use_eager(model: Decoder) -> None:
    """Undoes :func:`compile_layers`."""
    for layer in model.layers:
        vars(layer).pop("forward", None)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function``, compiled; inside of a Deferral, which it does not take part in, too."""
    run = torch.compile(function, dynamic=False, fullgraph=True)

    def call(*arguments: Any) -> Tensor:
        with Deferral.suspended():
            return run(*arguments)

    return call


class _CompiledLayer:
    """The forward pass of one layer."""

    def __init__(self, layer: Layer, plain: Forward, probed: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
        self._layer, self._plain, self._probed = layer, plain, probed
        self._forms: dict[tuple[object, ...], list[_Form]] = {}

    def __call__(self, x: Tensor, rotary: Turns, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        deferral = Deferral.active()
        with Deferral.suspended():
            if deferral is None:
                return self._plain(self._layer, x, rotary, context)
            forms = self._rehearsed(x, rotary, context)
            anchor = torch.empty((), device=x.device, requires_grad=True)
            caught: list[Tensor | None] = []
            shapes = [form for product in forms for form in product[1:]]
            probes = _Caught.apply(anchor, shapes, caught)  # type: ignore[no-untyped-call]
            deferral.expect([weight for weight, *_ in forms], caught)
            return self._probed(probes, self._layer, x, rotary, context)

    def _rehearsed(self, x: Tensor, rotary: Turns, context: AttentionContext) -> list[_Form]:
        """The products of the layer in their order, from a pass that is not compiled, once for each shape."""
        key = x.shape, x.dtype, type(context), torch.is_autocast_enabled(x.device.type)
        if key not in self._forms:
            with torch.no_grad(), _probes.recording() as forms:
                _forward(self._layer, x.detach(), rotary, context)
            self._forms[key] = forms
        return self._forms[key]


#: Of a product its weight, and shape and dtype of its activation and of its output.
_Form = tuple[Tensor, tuple[torch.Size, torch.dtype], tuple[torch.Size, torch.dtype]]


class _Probes:
    """The probes of the layer that is being run, if it has any, and which of them is next."""

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] | None = None
        self.number = 0
        self.forms: list[_Form] | None = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[_Form]]:
        """Notes the products of a pass."""
        self.forms = []
        try:
            yield self.forms
        finally:
            self.forms = None


_probes = _Probes()


class _ProbedLinear(Linear):
    """A linear layer that takes probes where there are any."""

    def forward(self, x: Tensor) -> Tensor:
        if _probes.tensors is None and _probes.forms is None:
            return super().forward(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if _probes.tensors is None:
            assert _probes.forms is not None
            out = super().forward(x)
            _probes.forms.append((self.weight, (x.shape, x.dtype), (out.shape, out.dtype)))
            return out
        first = _probes.number
        _probes.number = first + 2
        probes = _probes.tensors[first], _probes.tensors[first + 1]
        found: Tensor = _Product.apply(x, self.weight.detach(), self.bias, *probes)  # type: ignore[no-untyped-call]
        return found


def _forward(layer: Layer, x: Tensor, rotary: Turns, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
    return Layer.forward(layer, x, rotary, context)


def _probed_forward(
    probes: tuple[Tensor, ...], layer: Layer, x: Tensor, rotary: Turns, context: AttentionContext
) -> tuple[Tensor, Tensor | None]:
    _probes.tensors, _probes.number = probes, 0
    try:
        return Layer.forward(layer, x, rotary, context)
    finally:
        _probes.tensors = None


class _Product(torch.autograd.Function):
    """A product whose probes get its activation and the gradient of its output, and its weight gets nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *probes: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_bias = gradient.flatten(0, -2).sum(0) if ctx.biased else None
        return gradient @ weight.to(x.dtype), None, to_bias, x, gradient


class _Caught(torch.autograd.Function):
    """Tensors without memory of given shapes, whose gradients, when they come, are put into a list as they are."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, shapes: list[tuple[torch.Size, torch.dtype]], caught: list[Tensor | None]
    ) -> tuple[Tensor, ...]:
        ctx.caught = caught
        ctx.set_materialize_grads(False)
        return tuple(torch.empty((), dtype=dtype, device=anchor.device).expand(shape) for shape, dtype in shapes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        ctx.caught.extend(gradients)
        return None, None, None
