"""The backward pass in two halves: I, the gradient of the input, now; W, the gradients of the weights, later.

Zero-bubble schedules put W where a device would idle. While a stage's forward pass runs inside :class:`Deferral`, each
product of an activation with a trained matrix becomes an autograd function whose backward computes the gradient of the
activation, and leaves (activation, output gradient) for later instead of computing the gradient of the matrix. The
backward pass through that graph is I; :meth:`Deferral.run` is W. Nothing is computed twice.

Deferred are ``torch.nn.functional.linear``, which ``nn.Linear`` calls, and the grouped products of experts. Not
deferred, since cheap or a by-product of I: biases, norms' scales, the embedding's rows, and the head's matrix, whose
gradient the fused cross-entropy computes in the forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from penstock.ops import grouped


class Product(NamedTuple):
    """A product of an activation with a matrix (and a bias), and its two gradients; ``ends`` are where groups of rows
    end."""

    value: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    input_gradient: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    weight_gradient: Callable[[Tensor, Tensor, Tensor | None], Tensor]


class _Owed(NamedTuple):
    """A weight's gradient that is still to be computed."""

    product: Product
    weight: Tensor
    x: Tensor
    gradient: Tensor
    ends: Tensor | None


class Deferral(TorchFunctionMode):
    """Defers the weight gradients of all products that are computed inside its ``with`` block.

    One for each forward pass. After I it holds what W needs; after W, nothing. Exact: the sums are those of the
    ordinary backward pass, in any dtype and under autocast.
    """

    _stack: ClassVar[list[Deferral]] = []

    def __init__(self) -> None:
        super().__init__()
        self._owed: list[_Owed] = []
        self._expected: list[tuple[list[Tensor], list[Tensor | None]]] = []

    def __enter__(self) -> Deferral:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._stack.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.pop()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    @classmethod
    def active(cls) -> Deferral | None:
        """The one whose ``with`` block we are in."""
        return cls._stack[-1] if cls._stack else None

    @classmethod
    @contextlib.contextmanager
    def suspended(cls) -> Iterator[None]:
        """Nothing that is computed in the ``with`` block is deferred."""
        with contextlib.nullcontext() if cls.active() is None else torch._C.DisableTorchFunction():
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        if rule is None:
            return func(*args, **(kwargs or {}))
        return rule(self, *args, **(kwargs or {}))

    def product(
        self, product: Product, x: Tensor, weight: Tensor, bias: Tensor | None = None, ends: Tensor | None = None
    ) -> Tensor:
        """``product`` of ``x`` and ``weight``, the latter's gradient deferred if it is trained."""
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return product.value(x, weight, bias, ends)
        out: Tensor = _Deferred.apply(x, weight, bias, ends, product, self._owed)  # type: ignore[no-untyped-call]
        return out

    def expect(self, weights: list[Tensor], caught: list[Tensor | None]) -> None:
        """Defers the gradients of ``weights`` of a compiled layer, whose backward pass will put into ``caught``, for
        each in turn, the activation and the gradient of the output."""
        self._expected.append((weights, caught))

    @property
    def held(self) -> list[Tensor]:
        """The activations and gradients that are kept for W."""
        caught = [tensor for _, found in self._expected for tensor in found if tensor is not None]
        return caught + [tensor for owed in self._owed for tensor in (owed.x, owed.gradient)]

    def run(self) -> None:
        """W: adds the deferred gradients to ``.grad`` of the weights, and frees what they were computed from."""
        for weights, caught in self._expected:
            found = zip(weights, caught[::2], caught[1::2], strict=True)
            self._owed += [_Owed(_LINEAR, w, x, g, None) for w, x, g in found if x is not None and g is not None]
        self._expected = []
        while self._owed:
            product, weight, x, gradient, ends = self._owed.pop()
            with torch.no_grad():
                ours = product.weight_gradient(gradient, x, ends)
            # Not an assignment to .grad: the weight may be a cast or a view of the parameter.
            torch.autograd.backward(weight, ours.to(weight.dtype))


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ends: Tensor | None,
        product: Product,
        owed: list[_Owed],
    ) -> Tensor:
        # The weight itself, not its cast: a cast for each microbatch in flight would be a copy of the model for each.
        # And not among the saved tensors, which hooks may replace by others: it is what W adds the gradient to.
        ctx.save_for_backward(x, ends)
        ctx.weight, ctx.product, ctx.owed = weight, product, owed
        return product.value(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, ends = ctx.saved_tensors
        weight: Tensor = ctx.weight
        ctx.owed.append(_Owed(ctx.product, weight, x.detach(), gradient.detach(), ends))
        wanted, _, biased, *_ = ctx.needs_input_grad
        to_x = ctx.product.input_gradient(gradient, weight.to(x.dtype), ends) if wanted else None
        to_bias = gradient.flatten(0, -2).sum(0) if biased else None
        return to_x, None, to_bias, None, None, None


_LINEAR = Product(
    value=lambda x, weight, bias, _: F.linear(x, weight, bias),
    input_gradient=lambda gradient, weight, _: gradient @ weight,
    weight_gradient=lambda gradient, x, _: gradient.flatten(0, -2).T @ x.flatten(0, -2),
)

# torch.library's own operators, and PyTorch's fused one, which takes [groups, in, out].
_LOOPED = Product(
    value=lambda x, weight, _, ends: grouped._product(x, weight, ends),
    input_gradient=lambda gradient, weight, ends: grouped._product(gradient.contiguous(), weight.mT, ends),
    weight_gradient=lambda gradient, x, ends: grouped._outer(gradient.contiguous(), x, ends),
)
_FUSED = Product(
    value=lambda x, weight, _, ends: torch._grouped_mm(x, weight, offs=ends),
    input_gradient=lambda gradient, weight, ends: torch._grouped_mm(gradient.contiguous(), weight.mT, offs=ends),
    weight_gradient=lambda gradient, x, ends: torch._grouped_mm(x.mT, gradient.contiguous(), offs=ends),
)


def _linear(deferral: Deferral, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        input = input.to(torch.get_autocast_dtype(kind))
    return deferral.product(_LINEAR, input, weight, bias)


def _looped(deferral: Deferral, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return deferral.product(_LOOPED, x, weight, ends=ends)


def _fused(deferral: Deferral, x: Tensor, weight: Tensor, *, offs: Tensor, **rest: Any) -> Tensor:
    return deferral.product(_FUSED, x, weight, ends=offs)


_RULES: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.ops.penstock.grouped_product.default: _looped,
    torch._grouped_mm: _fused,
}
