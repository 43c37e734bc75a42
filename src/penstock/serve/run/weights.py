"""The weights of a model at work: others in their place, and out of the device's memory and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from penstock.core.errors import UsageError
from penstock.models.decoder import Decoder
from penstock.models.quantized import QuantizedLinear
from penstock.models.streamed import stream_of


class Weights:
    """The weights of ``model``, which stay where they are for whoever has noted their place (CUDA graphs).

    Attributes:
        source: reads them again, by name; None where they came from nowhere that could be read again.
    """

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._away: dict[str, Tensor] = {}
        self.source: Callable[[], Mapping[str, Tensor]] | None = None

    def check(self) -> None:
        """Asked before other weights are read, which may be many.

        Raises:
            UsageError: the model takes no others: its matrices are quantized, or some of its layers on disk.
        """
        if any(isinstance(module, QuantizedLinear) for module in self._model.modules()):
            raise UsageError(
                "the model's matrices are computed with as they are quantized, and do not take other weights",
                hint="Open a model that is not quantized, or start a new engine.",
            )
        if stream_of(self._model) is not None:
            raise UsageError(
                "some of the model's layers stay on disk, where they are read from in each pass",
                hint="Open a model without resident_weights, or start a new engine with the other weights.",
            )

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Puts ``weights``, by the names of ``Decoder.state_dict``, in the place of those that are here, in their dtype
        and on their device.

        Raises:
            UsageError: one is missing, or is of no use here or of another shape, or what :meth:`check` refuses.
                Nothing has changed then.
        """
        self.check()
        own = self._model.state_dict()
        tied = {"head.weight"} if self._model.config.tied else set()
        _refuse("lack", own.keys() - weights.keys() - tied)
        _refuse("also have", weights.keys() - own.keys())
        for name, tensor in weights.items():
            if tensor.shape != own[name].shape:
                raise UsageError(
                    f"the weights have {name} as {list(tensor.shape)}, and the engine's model as "
                    f"{list(own[name].shape)}",
                    hint="Weights of the same shapes can be loaded; for another model, start a new engine.",
                )
        if tied & weights.keys() and not torch.equal(weights["head.weight"], weights["embedding.weight"]):
            raise UsageError(
                "the weights have a head.weight that differs from the embedding, to which the model ties it"
            )
        for name, tensor in weights.items():
            own[name].copy_(tensor)

    @torch.no_grad()
    def release(self) -> None:
        """Frees the device's memory: on CUDA the host keeps a copy, on a CPU they are read again by :attr:`source`;
        where there is none, they stay, and so do matrices there as they are quantized."""
        for name, weight in self._all():
            if weight.is_cuda:
                self._away[name] = torch.empty_like(weight, device="cpu", pin_memory=True).copy_(weight)
            if weight.is_cuda or (self.source is not None and isinstance(weight, nn.Parameter)):
                weight.data = weight.new_empty(0)

    @torch.no_grad()
    def restore(self) -> None:
        """Brings them back."""
        gone = {name: weight for name, weight in self._all() if not weight.numel()}
        if not gone:
            return
        found = self._away or ({} if self.source is None else self.source())
        for name, weight in gone.items():
            # A copy, since what is read may lie in a file that is mapped.
            weight.data = found[name].to(weight.device, weight.dtype, copy=True)
        self._away = {}

    def _all(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters, and what quantized matrices are stored in."""
        yield from self._model.named_parameters()
        for prefix, module in self._model.named_modules():
            if isinstance(module, QuantizedLinear):
                yield from module.named_buffers(prefix)


def _refuse(which: str, names: Iterable[str]) -> None:
    listed = sorted(names)
    if listed:
        more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
        raise UsageError(
            f"the weights {which} {', '.join(listed[:3])}{more}",
            hint="Give those of the engine's own model, by the names of Decoder.state_dict().",
        )
